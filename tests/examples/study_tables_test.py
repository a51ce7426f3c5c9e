"""Tables of runs, by hand."""

import json

import numpy as np
import pytest

from examples.study import tables
from pfjax.model import hf


def _run(folder, *evaluations):
    """metrics.jsonl of a run: (step, avg@8, length) of each evaluation."""
    folder.mkdir(parents=True)
    rows = [{"step": 1, "entropy": 9.0}]
    for step, avg, length in evaluations:
        row = {"step": step, "eval/avg@8": avg, "eval/avg@8_se": 0.5}
        rows.append(
            row | {"eval/length_mean": length} | ({"entropy": 0.2} if step else {})
        )
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_means_spreads_and_the_best_on_the_way(tmp_path):
    runs = [
        (
            "ours",
            _run(tmp_path / "a0", (0, 0.5, 17.0), (20, 0.9, 20.0), (40, 0.8, 21.0)),
        ),
        (
            "ours",
            _run(tmp_path / "a1", (0, 0.6, 17.0), (20, 0.7, 20.0), (40, 1.0, 23.0)),
        ),
        ("other", _run(tmp_path / "b0", (0, 0.5, 17.0), (40, 0.25, 8.0))),
    ]
    table = tables.table_of_runs(runs).splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in table]
    assert cells[0][:3] == ["run", "accuracy", "best on the way"]
    # Last 0.8 and 1.0, best 0.9 and 1.0, lengths 21 and 23; sd = half gap * sqrt(2).
    found = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert list(found) == ["base", "ours", "other"]
    assert found["base"]["accuracy"] == "0.550 ± 0.071"  # of two seeds
    assert found["base"]["best on the way"] == found["base"]["entropy per token"] == ""
    assert found["ours"]["accuracy"] == "0.900 ± 0.141"
    assert found["ours"]["best on the way"] == "0.950 ± 0.071"
    assert found["ours"]["length"] == "22.000 ± 1.414"
    assert found["ours"]["entropy per token"] == "0.200 ± 0.000"
    assert found["other"]["accuracy"] == found["other"]["best on the way"] == "0.250"


def test_samples_are_graded(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        '{"prompt": "1+1", "answer": "2"}\n{"prompt": "2+2", "answer": "4"}\n'
    )
    sampled = [(1, 1, "4"), (0, 0, "2"), (0, 1, "3"), (1, 0, "4")]
    path = tmp_path / "sampled.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_id": q, "sample": i, "completion": f"\\boxed{{{x}}}",
                    "tokens": 3 + q, "finished": True,
                }
            ) + "\n"
            for q, i, x in sampled
        )
    )  # fmt: skip
    table = tables.table_of_samples({"smc": [path]}, str(prompts)).splitlines()
    cells = [x.strip() for x in table[2].strip("|").split("|")]
    # accuracy 3/4; majority 1/2 (a tie) and 1; any of 2; length (3 + 4) / 2; distinct.
    assert cells == ["smc", "0.750", "0.750", "1.000", "3.500", "0.750"]


@pytest.mark.slow
def test_distances_are_zero_to_itself_and_positive_else(tmp_path):
    base = hf.load("pfjax/toy")
    params = {**base.params, "final_norm": base.params["final_norm"] * 0.4}
    hf.save(base._replace(params=params), tmp_path / "other", base="pfjax/toy")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "17+25"}\n')
    table = tables.table_of_distances(
        {"same": [hf.resolve("pfjax/toy")], "other": [tmp_path / "other"]},
        "pfjax/toy",
        str(prompts),
    )
    found = {}
    for line in table.splitlines()[2:]:
        name, *cells = (x.strip() for x in line.strip("|").split("|"))
        found[name] = [float(x) for x in cells]
    assert found["same"] == pytest.approx([0, 0], abs=1e-5)
    assert min(found["other"]) > 0.01 and np.isfinite(found["other"]).all()
