"""Accuracy over alpha and beta: the surface by hand, and runs that are not run twice."""

import math

import numpy as np
import pytest

from examples import exact, tilt


def _listed() -> exact.Listed:
    is_correct = np.array([True, False])
    log_p0 = np.log([0.25, 0.25])
    return exact.Listed(None, ["a", "b"], np.array([5, 5]), is_correct, log_p0)


def test_an_incorrect_response_costs_beta_nats():
    # Of one length and likelihood: the odds are e^beta.
    assert tilt.target_accuracy([_listed()], 2.0, math.log(3)) == pytest.approx(0.75)
    text = tilt.surface([_listed()], (1.0,), (0.0, math.log(3)))
    assert text.splitlines()[-1] == "| 1 | 0.500 | 0.750 |"


def test_the_verifier_takes_one_from_all_but_the_answer():
    completions = ["1+1=2;\\boxed{2}", "\\boxed{3}", "2", "\\boxed{23}"]
    assert tilt.verifier(completions, ["2"] * 4, state={}) == [0, -1, -1, -1]


def test_a_point_is_trained_once_and_read_back(tmp_path, monkeypatch):
    asked, measured = [], []

    def train(folder, alpha, beta, steps):
        folder.mkdir()
        asked.append((alpha, beta, steps))
        if len(asked) == 5:
            raise KeyboardInterrupt

    def measure_all(policy, base, rows, target):
        measured.append((target.alpha, target.beta))
        values = dict.fromkeys(exact.Match._fields, target.beta / 8)
        return [exact.Match(**values)]

    monkeypatch.setattr(tilt, "train", train)
    monkeypatch.setattr(exact, "measure_all", measure_all)
    with pytest.raises(KeyboardInterrupt):
        tilt.points(tmp_path, [], None, 7)
    (tmp_path / "2_0").rmdir()
    found = tilt.points(tmp_path, [], None, 7)
    assert len(asked) == 13 and asked[4] == asked[5] == (2, 0, 7)
    assert measured == [(a, b) for a in tilt.ALPHAS for b in tilt.BETAS]
    assert tilt.trained(found).splitlines()[2].endswith("| 1.000 1.000 (1.000) |")
