"""python -m pfjax.sample, as a person runs it."""

import collections
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from pfjax.targets import Target
from pfjax.tasks import samples
from tests import fork_server
from tests.conftest import ROOT, run_command


def _run(*args):
    return run_command("pfjax.sample", *args)


def test_prompts_in_and_samples_out(tmp_path):
    out = tmp_path / "out.jsonl"
    args = ("--prompts=pfjax/toy/eval.jsonl", "--samples=4", "--max_new_tokens=48")
    done = _run(*args, f"--out={out}", "--stop=;")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len({(r["prompt_id"], r["sample"]) for r in rows}) == 256
    boxed = [r for r in rows if r["completion"].endswith("}")]
    assert all(r["log_prob"] < 0 and 0 < r["tokens"] <= 48 for r in rows)
    assert all(r["completion"].count(";") <= 1 for r in rows) and boxed
    assert any(r["completion"].endswith(";") for r in rows)
    assert "256 responses to 64 prompts" in done.stderr
    tokens = sum(r["tokens"] for r in rows)
    assert f"\n{tokens} tokens in " in done.stderr and " a second" in done.stderr


def test_greedy_samples_of_a_prompt_are_one():
    done = _run("--prompt=17+25", "--prompt=3+9", "--samples=3", "--temperature=0")
    assert done.returncode == 0, done.stderr
    texts = collections.defaultdict(set)
    for line in done.stdout.splitlines():
        row = json.loads(line)
        texts[row["prompt"]].add(row["completion"])
    assert set(texts) == {"17+25", "3+9"}
    assert all(len(t) == 1 for t in texts.values())


def test_the_best_of_samples_are_the_likeliest_of_each_group(tmp_path):
    args = ["--prompts=pfjax/toy/eval.jsonl", "--max_new_tokens=24", "--seed=3"]
    args.append(f"--out={tmp_path / 'out.jsonl'}")

    def draw(*more):
        done = _run(*args, *more)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        rows = {(r["prompt_id"], r["sample"]): r for r in map(json.loads, lines)}
        return rows, done.stderr

    drawn, _ = draw("--samples=8")
    best = ["--method=best_of", "--samples=2", "--candidates=4"]
    for more, density in [
        ([], lambda r: r["log_prob"]),
        (["--alpha=4", "--log_z=-3"], lambda r: 4 * r["log_prob"] + 3 * r["tokens"]),
    ]:
        kept, said = draw(*best, *more)
        assert len(kept) == 128
        for (prompt, sample), row in kept.items():
            group = [drawn[prompt, 4 * sample + i] for i in range(4)]
            assert row | {"sample": 0} == max(group, key=density) | {"sample": 0}
        count = [sum(r["tokens"] for r in rows.values()) for rows in (kept, drawn)]
        assert f"kept 128 responses with {count[0]} tokens of 512" in said
        assert f"of 512 responses with {count[1]} tokens" in said
    # No samples of p^alpha, but responses to learn from.
    prompts = [row["prompt_tokens"] for row in kept.values()]
    assert len(samples.load_responses(str(tmp_path / "out.jsonl"), prompts, 24)) == 64
    with pytest.raises(ValueError, match="alpha is None, expected 4.0"):
        samples.load_target(str(tmp_path / "out.jsonl"), Target(4.0))


def test_mistakes_are_one_line(tmp_path):
    raising = shutil.copytree(ROOT / "pfjax/assets/toy", tmp_path / "raising")
    (raising / "chat_template.jinja").write_text("{{ raise_exception('no one') }}")
    mine = tmp_path / "prompts.jsonl"
    mine.write_text('{"prompt": "1+1"}\n')
    (old := tmp_path / "old.jsonl").write_text("of before\n")
    for args, message in [
        ((), "give either --prompt or --prompts"),
        (("--prompt=1+1", "--top_p=2"), "top_p must be in (0, 1], got 2.0"),
        (("--prompt=1", "--method=best_of", "--alpha=4"), "leave both out"),
        (("--prompt=1", "--method=best_of", "--log_z=-1"), "or give both"),
        (("--prompt=1", "--method=best_of", "--temperature=0"), "one and the same"),
        (("--prompt=1", "--method=best_of", "--stop=;"), "takes no --stop"),
        (
            ("--prompt=1+1", "--max_new_tokens=9999", f"--out={old}"),
            "exceed the model's 512 positions",
        ),
        (
            (f"--prompt={'1+' * 600}",),
            "tokens leaves no room for a response: the model",
        ),
        (
            ("--prompt=1", f"--model={raising}"),
            "--prompt: no prompt can be made of it: no",
        ),
        (("--prompt=1", "--stop="), "--stop is empty"),
        (("--prompt=1", f"--out={tmp_path}"), "is a folder: name a file in it"),
        ((f"--prompts={mine}", f"--out={mine}"), "is the file of --prompts"),
        (("--prompts=none.jsonl",), "prompt file none.jsonl does not exist"),
        (
            ("--prompts=pfjax/toy/eval.jsonl", "--prompt_field=question"),
            "prompt_field=question: no such column, there are ['",
        ),
        (
            ("--prompts=pfjax/toy/eval.jsonl", "--answer_field=sum"),
            "answer_field=sum: no such column, there are ['",
        ),
        (("--prompt=1", "--method=mh"), "needs a positive --alpha"),
        (("--prompt=1", "--method=mh", "--alpha=2", "--top_k=3"), "takes no --top_k"),
        (("--prompt=1", "--alpha=2"), "--alpha needs --method"),
        (
            ("--prompt=1", "--method=mh", "--alpha=2", "--eta_cutoff=0.003"),
            "--eta_cutoff=0.003 has no effect at --alpha=2",
        ),
        (("--prompt=1", "--eta_cutoff=3"), "--eta_cutoff=3: "),
        (
            ("--prompt=1", "--samples=4", "--method=smc", "--alpha=2", "--particles=2"),
            "must not be fewer",
        ),
        (("--prompt=1", "--reward=length"), "--beta=0 go together"),
        (("--prompt=1", "--reward=length", "--beta=1"), "--reward needs --method=smc"),
    ]:
        done = _run(*args)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("error: ") and message in last
        assert "Traceback" not in done.stderr
    assert mine.read_text() == '{"prompt": "1+1"}\n'
    assert old.read_text() == "of before\n"


@pytest.mark.slow
def test_samples_of_a_target_with_a_reward_are_those_that_a_run_takes(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brief(completion_ids, answer, **kwargs):\n"
        "    return [-len(y) if a else 0 for y, a in zip(completion_ids, answer)]\n"
    )
    rows = [{"prompt": "17+25", "sum": "42"}, {"prompt": "3+9", "sum": "12"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reward, out = f"{tmp_path / 'mine.py'}:brief", tmp_path / "out.jsonl"
    args = ["--method=smc", "--alpha=1.5", f"--prompts={tmp_path / 'in.jsonl'}"]
    args += ["--samples=8", "--max_new_tokens=24", "--ramp=4", f"--out={out}"]
    args += ["--answer_field=sum"]
    mean = {}
    for beta in (0, 1):
        more = [f"--reward={reward}", "--beta=1"] if beta else []
        done = _run(*args, *more)
        assert done.returncode == 0, done.stderr
        drawn = [json.loads(line) for line in out.read_text().splitlines()]
        mean[beta] = sum(r["tokens"] for r in drawn) / 16
    assert "e^(-log_z |y|) e^(beta r) over all" in done.stderr
    assert mean[1] < 0.7 * mean[0], mean
    target = Target(1.5, 1.0, is_length_aware=True)
    found = samples.load_target(str(out), target, reward)
    assert [p.gold for p in found.problems] == ["42", "12"]
    assert [p.columns for p in found.problems] == rows
    assert len(found.responses) == 16
    for row in drawn:
        assert f"{row['ancestors']} of 64 particles" in done.stderr
        assert 1 <= row["min_ess"] <= row["final_ess"] <= 64
    with pytest.raises(ValueError, match="beta is 1.0, expected 2.0"):
        samples.load_target(str(out), Target(1.5, 2.0), reward)
    with pytest.raises(ValueError, match="beta is 1.0, expected 0.0"):
        samples.load_target(str(out), Target(1.5))


def test_a_run_is_told_of_degenerate_samples(tmp_path, caplog):
    row = {
        "prompt_tokens": [5],
        "completion_tokens": [6, 1],
        "alpha": 2.0,
        "log_z": 0.0,
    }
    path, target = tmp_path / "target.jsonl", Target(2.0)
    for ancestors, is_told in ((4, True), (5, False), (None, False)):  # None: by mh
        more = {"ancestors": ancestors} if ancestors else {}
        rows = [row | more | {"prompt_id": i} for i in (0, 1) for _ in range(9)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        caplog.clear()
        assert len(samples.load_target(str(path), target).responses) == 18
        assert ("samples of 2 of 2 prompts are degenerate" in caplog.text) == is_told


@pytest.mark.parametrize("lines", [1, 1_000_000])  # still buffered, or not
def test_a_reader_that_leaves_early_ends_an_entry_point_without_a_word(lines):
    code = f"""
from pfjax import cli

with cli.mistakes_in_one_line():
    for _ in range({lines}):
        print("x" * 20)
"""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONUNBUFFERED": ""},
            stdout=out, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_the_power_distribution_beside_low_temperature(tmp_path):
    """Whole sequences sharpened turn to short guesses; with log Z' they do not."""
    args = ("--prompts=pfjax/toy/eval.jsonl", "--samples=4", "--max_new_tokens=40")
    length = {}
    for name, *more in [
        ("low_temperature", "--method=low_temperature"),
        ("mh", "--method=mh", "--blocks=4"),
        ("smc", "--method=smc", "--ramp=10"),
        ("aware", "--method=smc", "--ramp=10", "--log_z=-1.1"),
    ]:
        out = tmp_path / name
        done = _run(*args, "--alpha=4", f"--out={out}", *more)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert len({(r["prompt_id"], r["sample"]) for r in rows}) == len(rows) == 256
        length[name] = sum(r["tokens"] for r in rows) / 256
    assert length["low_temperature"] > 18 and length["aware"] > 18
    assert length["smc"] < 14, length
    # A chain takes hundreds of proposals to change the way a response begins.
    assert length["smc"] < length["mh"] < length["low_temperature"]


@pytest.mark.slow
def test_two_processes_draw_what_one_does_and_the_first_writes(tmp_path):
    """By every method, on a mesh of two devices."""
    code = "short = lambda completions, **_: [-len(x) / 9 for x in completions]"
    (tmp_path / "short.py").write_text(code)
    args = ["--prompts=pfjax/toy/eval.jsonl", "--max_new_tokens=16", "--samples=2"]
    power = ["--alpha=2", "--log_z=-1"]
    methods = {
        "tokens": ["--stop=;"],
        "best_of": ["--method=best_of", "--candidates=2"],
        "mh": ["--method=mh", *power, "--blocks=2", "--steps=2"],
        "smc": [
            *["--method=smc", *power, "--particles=4"],
            *[f"--reward={tmp_path}/short.py:short", "--beta=1"],
        ],
    }

    def start(out, more, devices, **env):
        env = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **env}
        env = os.environ | env
        more = [*args, *more, f"--out={tmp_path / out}"]
        return fork_server.Process("pfjax.sample", *more, env=env)

    for name, more in methods.items():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            at = f"localhost:{free.getsockname()[1]}"
        env = {"PFJAX_COORDINATOR": at, "PFJAX_NUM_PROCESSES": "2"}
        both = [
            start(
                f"two-{name}", [*more, "--multihost"], 1, PFJAX_PROCESS_ID=str(i), **env
            )
            for i in range(2)
        ]
        said = [p.communicate(timeout=900)[1] for p in (*both, start(name, more, 2))]
        assert [p.returncode for p in both] == [0, 0], said
        assert "responses to 64 prompts" in said[0] and "responses" not in said[1]
        text = (tmp_path / name).read_text()
        assert (tmp_path / f"two-{name}").read_text() == text and text.count(
            "\n"
        ) == 128
