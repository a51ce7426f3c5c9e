"""python -m pfjax.evaluate, as a person runs it."""

import json
import os
import pathlib
import shutil
import socket

import numpy as np
import pytest

from pfjax.evaluation import results
from tests import fork_server
from tests.conftest import run_command


def _run(*args):
    return run_command("pfjax.evaluate", "--max_new_tokens=32", *args)


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")
    args = ("--benchmark=pfjax/toy/eval.jsonl", "--samples=4", f"--out={out}")
    done = _run(*args, "--limit=16")
    assert done.returncode == 0, done.stderr
    return out, (*args, "--limit=16"), done.stdout


def test_scores_are_those_of_the_rows(scored):
    out, _, printed = scored
    rows, found = _rows(out / "eval.jsonl"), json.loads((out / "eval.json").read_text())
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [
        (q, i) for q in range(16) for i in range(4)
    ]
    correct = np.array([r["correct"] for r in rows]).reshape(16, 4)
    scores = found["scores"]
    assert scores["avg@4"] == pytest.approx(correct.mean())
    spread = correct.mean(axis=1).std(ddof=1) / 4
    assert scores["avg@4_se"] == pytest.approx(spread)
    assert scores["pass@4"] == pytest.approx(correct.any(axis=1).mean())
    assert scores["pass@1"] == pytest.approx(scores["avg@4"])
    assert scores["pass@1"] < scores["pass@2"] < scores["pass@4"]
    assert f"avg@4                   {scores['avg@4']:.4f} +- {spread:.4f}" in printed


def test_every_setting_that_moves_a_score_is_stored(scored):
    out, *_ = scored
    found = json.loads((out / "eval.json").read_text())
    assert {
        "model", "fingerprint", "source", "items", "version", "template",
        "chat_template", "first_prompt", "samples", "max_new_tokens", "temperature",
        "top_k", "top_p", "min_p", "stop_ids", "stop_strings", "seed", "dtype", "mesh",
    } <= found["settings"].keys()  # fmt: skip
    assert found["settings"]["first_prompt"].startswith("<|user|>")
    assert found["graded"]["grader"]["version"] == "0.9.0"


@pytest.mark.slow
def test_responses_are_cut_where_a_small_model_ends(tmp_path):
    args = ("--benchmark=pfjax/toy/eval.jsonl", "--limit=1", "--samples=1")
    done = run_command("pfjax.evaluate", *args, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "eval.json").read_text())["settings"]
    assert 400 < settings["max_new_tokens"] < 512  # which are the toy's positions


def test_a_stopped_evaluation_goes_on_and_draws_the_same(scored, tmp_path):
    """Cut in the middle of a line, as by a kill; a prompt with 3 of 4 samples too."""
    out, args, _ = scored
    whole = (out / "eval.jsonl").read_text().splitlines(keepends=True)
    settings = json.loads((out / "eval.json").read_text())
    del settings["scores"]
    (tmp_path / "eval.json").write_text(json.dumps(settings))
    kept = [*whole[4:8], *whole[20:24], *whole[12:15]]
    (tmp_path / "eval.jsonl").write_text("".join(kept) + whole[16][:50])
    done = _run(*args[:-2], "--limit=16", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "16 prompts x 4, 2 done before" in done.stderr
    got = _rows(tmp_path / "eval.jsonl")
    for a, b in zip(got, _rows(out / "eval.jsonl"), strict=True):
        assert a == b


def test_other_settings_do_not_mix_with_what_is_there(scored):
    _, args, _ = scored
    done = _run(*args, "--temperature=0.5")
    assert done.returncode == 1 and "temperature: 1.0 -> 0.5" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_template_that_asks_for_the_time_goes_on_with_that_of_before(tmp_path):
    """Other prompts are refused: under another time, or another template."""
    from pfjax.model import hub

    model = pathlib.Path(shutil.copytree(hub.resolve("pfjax/toy"), tmp_path / "model"))
    template = model / "chat_template.jinja"
    template.write_text(
        "<|user|>{{ messages[-1]['content'] }}{{ 1 if strftime_now('%Y') == '1999' }}"
        "<|assistant|>"
    )
    args = (
        f"--model={model}", "--benchmark=pfjax/toy/eval.jsonl", "--limit=2",
        "--samples=1", f"--out={tmp_path}/out",
    )  # fmt: skip
    assert _run(*args, "--clock=1999-12-31").returncode == 0
    settings = json.loads((tmp_path / "out/eval.json").read_text())["settings"]
    assert settings["clock"] == "1999-12-31" and "1<|as" in settings["first_prompt"]
    assert _run(*args).returncode == 0
    done = _run(*args, "--clock=2026-01-01")
    assert done.returncode == 1 and "clock: '1999-12-31' -> '2026" in done.stderr
    # The first prompt is the same, the second is not.
    template.write_text(
        template.read_text().replace(
            "<|ass", "{{ 1 if '48+98' in messages[-1]['content'] }}<|ass"
        )
    )
    done = _run(*args)
    assert done.returncode == 1 and "\n  prompts: " in done.stderr, done.stderr


def test_a_problem_that_the_template_refuses_is_named(tmp_path):
    from pfjax.model import hub

    model = pathlib.Path(shutil.copytree(hub.resolve("pfjax/toy"), tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] != 'user' %}"
        "{{ raise_exception('users only') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    rows = [{"prompt": "1+2", "id": "a"}]
    rows += [{"prompt": [{"role": "tool", "content": "1"}], "id": "b"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "p.jsonl").write_text(text)
    done = _run(
        f"--model={model}", f"--benchmark={tmp_path}/p.jsonl", f"--out={tmp_path}/out"
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "p.jsonl, problem b: no prompt can be made of it: users only" in done.stderr


def test_responses_of_unknown_settings_are_not_taken_over(tmp_path):
    files = results.Record(tmp_path, "eval.jsonl")
    (tmp_path / "eval.jsonl").write_text('{"prompt_id": 0, "sample": 0}\n')
    with pytest.raises(ValueError, match="but eval.json, which tells how"):
        files.begin({"samples": 1})


@pytest.mark.slow
def test_two_processes_draw_what_one_does_and_the_first_writes(tmp_path):
    """Of greedy responses, which rounding moves least; then one of them goes on alone."""

    def start(out, limit, devices, index=None, port=None):
        args = [
            "--benchmark=pfjax/toy/eval.jsonl", "--temperature=0", "--samples=1",
            "--max_new_tokens=32", f"--limit={limit}", f"--out={tmp_path / out}",
        ]  # fmt: skip
        env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        if port:
            args.append("--multihost")
            names = ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID")
            values = (f"localhost:{port}", "2", str(index))
            env |= {f"PFJAX_{k}": v for k, v in zip(names, values, strict=True)}
        return fork_server.Process("pfjax.evaluate", *args, env={**os.environ, **env})

    def finish(*processes):
        for process in processes:
            out, errors = process.communicate(timeout=900)
            assert process.returncode == 0, errors
            lines = out.splitlines(keepends=True)
            yield "".join(x for x in lines if not x.startswith("[Gloo]"))

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    printed = [*finish(*(start("two", 8, 1, i, port) for i in range(2)))]
    assert "avg@1" in printed[0] and not printed[1]
    (alone,) = finish(start("one", 8, 2))
    assert alone == printed[0]
    assert _rows(tmp_path / "two/eval.jsonl") == _rows(tmp_path / "one/eval.jsonl")
    (again,) = finish(start("two", 8, 2))
    assert again == alone


def test_grading_again_needs_no_model(scored, tmp_path):
    out, args, _ = scored
    for name in ("eval.jsonl", "eval.json"):
        (tmp_path / name).write_text((out / name).read_text())
    rows = _rows(tmp_path / "eval.jsonl")
    rows[0]["completion"] = r"\boxed{1} \boxed{102}"  # 39+63
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "eval.jsonl").write_text(text)
    for box, correct in (("first", False), ("last", True)):
        done = _run(
            *args[:-2], "--limit=16", f"--out={tmp_path}", "--regrade", f"--box={box}",
            "--model=/none",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert _rows(tmp_path / "eval.jsonl")[0]["correct"] is correct
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["graded"]["grader"]["box"] == box
        assert found["settings"]["model"] == "pfjax/toy"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--benchmark=maths",), "hub; did you mean math500?"),
        (("--benchmark=zzz",), "hub; math500, olympiadbench"),
        (("--benchmark=poem",), "name a file of yours instead, DIR/poem.jsonl"),
        (
            ("--benchmark=pfjax/toy/eval.jsonl", "--answer_field=anser"),
            "answer_field=anser: no such column, there are ['answer', 'prompt'",
        ),
        (("--benchmark=math500", "--data=/none"), "/none has none of ['math500.jsonl'"),
        (
            ("--benchmark=pfjax/toy/eval.jsonl", "--style=x"),
            "--style=x: neither one of",
        ),
        (
            ("--benchmark=pfjax/toy/eval.jsonl", "--max_new_tokens=9999"),
            "they exceed the model's 512 positions",
        ),
        (
            ("--benchmark=pfjax/toy/eval.jsonl", f"--style={'1+' * 600}{{question}}"),
            "tokens leaves no room for a response: the model has 512 positions",
        ),
        (("--benchmark=pfjax/toy/eval.jsonl", "--regrade"), "holds no responses"),
        (
            ("--benchmark=pfjax/toy/eval.jsonl,pfjax/assets/toy/eval.jsonl",),
            "two sets of one name would share files",
        ),
        (
            ("--benchmark=pfjax/toy/eval.jsonl", "--chat_template_kwargs=x"),
            "chat_template_kwargs must be a JSON object, got 'x'",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, args, message):
    done = _run(*args, f"--out={tmp_path / 'out'}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr


def test_columns_are_named_and_missing_answers_are_counted(tmp_path):
    rows = [{"instruction": "17+25", "target": "42"}, {"instruction": "1+2"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "mine.jsonl").write_text(text)
    done = _run(
        f"--benchmark={tmp_path}/mine.jsonl", "--samples=1", f"--out={tmp_path}/out",
        "--prompt_field=instruction", "--answer_field=target",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 2 problems have no answer: they count in" in done.stdout
    found = [(r["prompt"], r["gold"]) for r in _rows(tmp_path / "out/mine.jsonl")]
    assert found == [("17+25", "42"), ("1+2", None)]
