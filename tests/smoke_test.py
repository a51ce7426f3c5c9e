"""The promise of the README: its commands as copied, and the smoke run that they start."""

import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest

from pfjax.infra import dataset_io
from tests import fork_server
from tests.conftest import ROOT, run_command
from tests.readme_test import blocks_to_run, make_checkout, run_block

_CACHE = {"JAX_COMPILATION_CACHE_DIR": os.environ["PFJAX_TEST_CACHE"]}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A checkout in which the commands of the README were run, as copied, and what they
    printed."""
    folder = tmp_path_factory.mktemp("smoke") / "my pfjax"
    make_checkout(folder)
    first = blocks_to_run(folder / "README.md")[0]
    assert first.language == "bash"
    return folder, run_block(first, folder, **_CACHE)


@pytest.fixture
def smoke(copied, monkeypatch):
    """Its run, as seen from there, and what was printed."""
    folder, printed = copied
    monkeypatch.chdir(folder)
    return pathlib.Path("runs/smoke"), printed


@pytest.mark.slow
def test_what_the_readme_marks_to_be_run_shows(copied):
    folder, printed = copied
    assert "eval/avg@8" in printed and '"completion":' in printed
    assert (folder / "report/index.html").is_file()


@pytest.mark.slow
def test_python_that_the_readme_marks_to_be_run_works_as_copied(copied):
    folder, _ = copied
    _, *blocks = blocks_to_run(folder / "README.md")
    assert [b.language for b in blocks] == ["python", "python"]
    printed = [run_block(b, folder, **_CACHE) for b in blocks]
    assert float(printed[0]) > 0
    assert (folder / "out/model.safetensors").is_file()


def test_every_argument_of_a_short_run_has_its_declared_type(tmp_path):
    """`pfjax train` checks the types of all modules, the other tests those of arrays."""
    command = [sys.executable, "-m", "pfjax.train", "--config=smoke"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.num_steps=1"]
    command += ["--config.match_prompts=4", "--config.prompts_per_step=4"]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    how = {"env": os.environ | _CACHE | quick, "cwd": ROOT, "capture_output": True}
    done = subprocess.run(command, check=False, text=True, **how)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/match.json").exists()


@pytest.mark.slow
def test_smoke_run_sharpens_without_shortening(smoke):
    folder, output = smoke
    rows = [
        r for r in dataset_io.read_jsonl(folder / "metrics.jsonl") if "eval/avg@8" in r
    ]
    first, last = rows[0], rows[-1]
    assert first["step"] == 0 and first["eval/avg@8"] < 0.70
    assert last["eval/avg@8"] >= 0.93
    assert last["eval/length_mean"] >= first["eval/length_mean"]
    assert max(r.get("rollout/logp_gap_max", 0) for r in rows) < 1e-4
    # It is the power of the base that was asked for, and not only right.
    found = json.loads((folder / "match.json").read_text())
    assert found["total_variation"] < 0.03 and 3.4 < found["exponent"] < 4.4
    assert "4 is asked for" in output and "warning" not in output
    # What a person reads at the end.
    before, after = (f"{row['eval/avg@8']:.3f}" for row in (first, last))
    assert re.search(rf"eval/avg@8 +│ +{before} │ +{after}", output)
    assert re.search(r"^training all [\d,]{7} parameters$", output, re.MULTILINE)
    assert f"model: {folder / 'hf'}" in output


@pytest.mark.slow
def test_the_commands_that_a_run_ends_with_work(smoke):
    folder, output = smoke
    lines = output.partition("next:\n")[2].splitlines()
    commands = [line.partition(" -m pfjax ")[2] for line in lines if line[:2] == "  "]
    said = {
        "report": folder / "report/index.html",
        "sample": '"completion"',
        "evaluate": "avg@8",
        "export": folder / "hf-step-",
    }
    assert [x.split()[0] for x in commands] == list(said)
    for name, *args in map(shlex.split, commands):
        where = {"report": "pfjax.report.__main__"}.get(name, f"pfjax.{name}")
        done = run_command(where, *args, cwd=pathlib.Path.cwd())
        assert done.returncode == 0, (args, done.stderr)
        assert str(said[name]) in done.stdout
    # The run's last evaluation again.
    scores = json.loads((folder / "scores/eval.json").read_text())["scores"]
    row = dataset_io.read_jsonl(folder / "metrics.jsonl")[-1]
    assert scores["avg@8"] == pytest.approx(row["eval/avg@8"])


@pytest.mark.slow
def test_run_folder_holds_what_is_promised(smoke):
    folder, _ = smoke
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["alpha"] == 4.0 and saved["versions"]["jax"]
    assert list(folder.glob("events.out.tfevents*"))
    row = dataset_io.read_jsonl(folder / "completions/step_000000.jsonl")[0]
    assert {"prompt", "completion", "answer", "gold", "correct"} <= set(row)
    assert (folder / "checkpoints").is_dir()


@pytest.mark.slow
def test_the_code_on_the_model_card_runs(smoke, tmp_path, capsys):
    card = (smoke[0] / "hf/README.md").read_text()
    code = re.search(r"## How to use.*?```python\n(.*?)```", card, re.DOTALL)[1]
    (tmp_path / "code.py").write_text(code.replace("...", "47+35"))
    runpy.run_path(str(tmp_path / "code.py"))
    assert "=" in capsys.readouterr().out  # the toy writes out its sums


@pytest.mark.slow
def test_transformers_reads_the_exported_model(smoke):
    import torch
    import transformers

    from pfjax.model import hf, scoring, tokenizer

    folder = str(smoke[0] / "hf")
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    policy = hf.load(folder)
    ids = tokenizer.encode_prompt(tok, "47+35")
    ids = ids + tok.encode(r"7+5=12,4+3+1=8;\boxed{82}") + [tok.eos_token_id]
    with torch.no_grad():
        want = torch.log_softmax(reference(torch.tensor([ids])).logits, -1)[0]
    got = scoring.score(policy, [ids], [1])[0]
    want_at = want[np.arange(len(ids) - 1), ids[1:]].numpy()
    np.testing.assert_allclose(got, want_at, atol=1e-4)
    logits = _all_logits(policy, np.array([ids]))
    np.testing.assert_allclose(
        logits, reference(torch.tensor([ids])).logits[0].detach().numpy(), atol=1e-4
    )


def _all_logits(policy, ids):
    from pfjax.model import log_probs, transformer

    hidden, _ = transformer.forward_packed(
        policy.config,
        policy.params,
        ids,
        np.arange(ids.shape[1])[None],
        np.ones_like(ids),
    )
    return log_probs.logits(hidden, transformer.head_weight(policy.params))[0]


@pytest.mark.slow
def test_second_start_finds_its_programs_compiled(tmp_path):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    counts = []
    for name in ("first", "second"):
        args = ("--config=configs/smoke.py", "--config.num_steps=1")
        workdir = f"--workdir={tmp_path / name}"
        process = fork_server.Process("pfjax.train", *args, workdir, env=env)
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        found = re.search(r"compiled (\d+) programs, found (\d+)", output)
        counts.append([int(x) for x in found.groups()])
    assert (tmp_path / "cache/pfjax/compiled").is_dir()
    (first, _), (again, found) = counts
    assert first > 20 and again == 0 and found >= first, counts


@pytest.mark.slow
@pytest.mark.long_running
def test_trajectory_level_matching_collapses(tmp_path):
    """The ablation of the paper: the same run on whole sequences turns to guesses.

    Each group gives its own log Z. The head's is behind for 150 steps, and until it has come
    from its start to the target's, long responses gain.
    """
    done = run_command(
        "pfjax.train",
        "--config=configs/smoke.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.objective=tb_traj",
        "--config.log_z=group",
        "--config.num_steps=80",
    )
    assert done.returncode == 0, done.stderr
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    first, last = rows[0], rows[-1]
    assert last["eval/avg@8"] < first["eval/avg@8"]
    assert last["eval/length_mean"] < 0.75 * first["eval/length_mean"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/smoke.py", "--config.alhpa=2"], "alpha"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/smoke.py", "--config.alpha=0"], "alpha=0.0: must be"),
        (["--config=configs/smoke.py", "--config.top_p=0.9"], "--config.eval_sampling"),
        (["--config=configs/smoke.py", "--config.temperature=0"], "the whole distrib"),
    ],
)
def test_mistakes_on_the_command_line_end_in_their_cause(tmp_path, args, message):
    done = run_command("pfjax.train", *args, f"--workdir={tmp_path / 'run'}")
    assert done.returncode != 0
    last_lines = "\n".join(done.stderr.strip().splitlines()[-3:])
    assert message in last_lines, done.stderr
    assert not (tmp_path / "run").exists()
