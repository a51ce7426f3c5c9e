"""Completions packed for the page, up to a size."""

import base64
import gzip
import json
import random

from pfjax.report import runs, samples
from tests.report import fake_runs

ROOM = 100_000


def _read(packed: samples.Packed) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(packed.text)))


def _long(answers: dict, seed: int = 0) -> dict:
    """Texts by answer that nothing compresses."""
    draw = random.Random(seed)
    return {a: "".join(draw.choices("abcdefgh \n{}$", k=3000)) for a in answers}


def test_all_samples_come_back(tmp_path):
    fake_runs.make(tmp_path / "a", texts={None: "half \udcff\0"})
    packed = samples.pack(runs.load([str(tmp_path)]), ROOM)
    said = _read(packed)
    assert packed.left_out == "" and packed.has_math
    assert said["prompts"] == [
        {"text": "problem 0", "gold": "7", "set": ""},
        {"text": "problem 1", "gold": "9", "set": ""},
    ]  # fmt: skip
    first, last = said["evaluations"]
    assert (first["run"], first["step"], last["step"]) == (0, 0, 4)
    assert first["samples"]["0"] == [
        [r"\boxed{3}", 5, True, "3", False], [r"\boxed{7}", 6, True, "7", True]
    ]  # fmt: skip
    assert first["samples"]["1"][1] == ["half ?\ufffd", 6, False, None, False]


def test_what_leaves_no_room_is_left_out_and_said(tmp_path):
    answers = {s: ((f"{s}", f"-{s}"), ("1.5", "2.5")) for s in range(5)}
    texts = _long({a: 0 for mine in answers.values() for a in mine[0]})
    fake_runs.make(tmp_path / "a", answers=answers, texts=texts)
    found = runs.load([str(tmp_path)])
    whole = samples.pack(found, ROOM)
    assert [e["step"] for e in _read(whole)["evaluations"]] == [0, 1, 2, 3, 4]
    ends = samples.pack(found, len(whole.text) - 1)
    assert [e["step"] for e in _read(ends)["evaluations"]] == [0, 1, 2, 4]
    assert ends.left_out == (
        "Left out to keep the page small: 1 of 3 evaluations between first and last."
    )
    none = samples.pack(found, 100)
    assert none.text == "" and "too long" in none.left_out


def test_prompts_are_left_out_of_all_runs_alike(tmp_path):
    for seed in range(2):
        answers = {0: fake_runs.SEED_0[0]}
        texts = _long(dict.fromkeys(("3", "7", "4", None)), seed)
        fake_runs.make(tmp_path / f"{seed}", seed, answers, texts)
    found = runs.load([str(tmp_path)])
    whole = samples.pack(found, ROOM)
    part = samples.pack(found, len(whole.text) - 100)
    assert len(part.text) < len(whole.text) - 100
    assert part.left_out == "Left out to keep the page small: 1 of 2 prompts."
    assert [[*e["samples"]] for e in _read(part)["evaluations"]] == [["0"], ["0"]]


def test_without_completions_there_is_nothing(tmp_path):
    fake_runs.make(tmp_path / "a", answers={})
    assert samples.pack(runs.load([str(tmp_path)]), ROOM) == ("", "", False)


def test_the_work_grows_with_what_there_is(tmp_path, monkeypatch):
    answers = dict.fromkeys(range(5), fake_runs.SEED_0[0])
    for i in range(8):
        texts = _long({"3": 0, "4": 0}, seed=i)
        fake_runs.make(tmp_path / f"{i}", answers=answers, texts=texts, alpha=float(i))
    packed, compress = [], gzip.compress

    def counted(data, *args, **kwargs):
        packed.append(len(data))
        return compress(data, *args, **kwargs)

    monkeypatch.setattr(samples.gzip, "compress", counted)
    said = samples.pack(runs.load([str(tmp_path)]), 10**9)
    assert said.left_out == "" and len(_read(said)["evaluations"]) == 8 * 5
    assert sum(packed) < 3 * max(packed)
