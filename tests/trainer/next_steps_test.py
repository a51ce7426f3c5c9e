"""The commands that a run ends with; that they work is shown in smoke_test."""

import json
import shlex
import shutil
import sys

import pytest
from etils import epath
from ml_collections import FrozenConfigDict

from pfjax.trainer import next_steps, settings


def _commands(folder, **changes):
    c = settings.default_config()
    c.update_from_flattened_dict(changes)
    text = next_steps.next_steps(FrozenConfigDict(c), epath.Path(folder))
    text = text.removeprefix("next:\n").rpartition("\n(")[0]
    before, *lines = text.split(f"  {next_steps.program()} ")
    assert before == ""
    return {name: args for name, *args in map(shlex.split, lines)}


def test_an_evaluation_does_what_the_run_did(tmp_path):
    changes = {
        "data.eval": "my data.jsonl, b.jsonl",
        "data.answer_field": "target",
        "data.suffix": " Box it.",
        "data.chat_template_kwargs": '{"x": true}',
        "eval_sampling.temperature": 0.0,
        "eval_sampling.stop_strings": ("\n\n",),
        "eval_samples": 1,
        "seed": 3,
    }
    folder = tmp_path / "my run"
    assert set(_commands(folder, **changes)["evaluate"]) == {
        f"--model={folder}/hf", "--max_new_tokens=3072", "--benchmark=my data.jsonl,b.jsonl", "--answer_field=target",
        '--chat_template_kwargs={"x": true}', "--style={question} Box it.",
        "--temperature=0.0", "--stop=\n\n", "--samples=1", "--seed=3",
        f"--out={folder}/scores",
    }  # fmt: skip


def test_a_benchmark_is_asked_as_in_the_run(tmp_path):
    flags = _commands(tmp_path, **{"data.eval": "math500"})["evaluate"]
    assert "--style={question}" in flags  # rather than with a suffix of evaluate's


def test_what_a_run_does_not_have_is_not_asked_for(tmp_path):
    found = _commands(tmp_path, **{"data.eval": ""})
    assert list(found) == ["report", "sample", "export"]
    assert found["export"] == [str(tmp_path)]
    rows = [{"prompt": "longer"}, {"prompt": "it's"}]
    (tmp_path / "completions").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "completions/step_000002.jsonl").write_text(text)
    assert "--prompt=it's" in _commands(tmp_path)["sample"]


def test_a_run_in_a_bucket_is_used_where_it_is(bucket):
    found = _commands(f"{bucket}/run")
    assert list(found) == ["report", "sample", "evaluate", "export"]
    assert f"--model={bucket}/run/hf" in found["sample"]
    assert f"--out={bucket}/run/scores" in found["evaluate"]


@pytest.mark.parametrize(
    ("on_path", "said"),
    [
        ({"pfjax": "/env/bin/pfjax", "python": "/env/bin/python"}, "pfjax"),
        ({"pfjax": "/other/pfjax", "python": "/env/bin/python"}, "python -m pfjax"),
        ({"python": "/usr/bin/python"}, "/env/bin/python -m pfjax"),
    ],
)
def test_pfjax_is_called_as_the_shell_finds_it(monkeypatch, on_path, said):
    monkeypatch.setattr(sys, "executable", "/env/bin/python")
    monkeypatch.setattr(shutil, "which", on_path.get)
    assert next_steps.program() == said


def test_an_environment_here_is_called_by_its_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/my env/bin/python")
    assert next_steps.program() == "'./my env/bin/python' -m pfjax"
