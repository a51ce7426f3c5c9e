"""The command line as a person meets it: help, names by recipe, and mistakes."""

import json
import os
import runpy
import subprocess
import sys

import jax
import pytest

from pfjax import __main__ as command
from pfjax import cli
from pfjax.trainer import recipes, settings
from tests.conftest import ROOT, run_command

TRAIN, SMOKE, RUN = "pfjax.train", "--config=smoke", "--workdir={tmp}/run"
_MISTAKES = [
    # Which config, which folder.
    (TRAIN, [RUN], "give --config=RECIPE, a .py file or one of"),
    (TRAIN, [SMOKE], "give --workdir: folder of the run"),
    (TRAIN, ["--config=smoek", RUN], "no such recipe and no such file; did you mean smoke?"),
    (TRAIN, ["--config=configs/smok.py", RUN], "did you mean smoke?"),
    (TRAIN, ["--config=configs", RUN], "no such recipe and no such file; recipes: "),
    (TRAIN, ["--config"], "--config needs a value"),
    (TRAIN, ["--config={tmp}/empty.py", RUN], "needs a function get_config()"),
    (TRAIN, ["--config={tmp}/wrong.py", RUN], "wrong.py:4: "),
    (TRAIN, ["--config={tmp}/broken.py", RUN], "broken.py: SyntaxError"),
    (TRAIN, [SMOKE, "--workdir={tmp}/empty.py"], "empty.py is a file, not a folder"),
    # Names.
    (TRAIN, [SMOKE, RUN, "--alpha=4"], "no flag --alpha; did you mean --config.alpha?"),
    (TRAIN, [SMOKE, RUN, "--lr=1"], "did you mean --config.optim.learning_rate?"),
    (TRAIN, [SMOKE, RUN, "--workdri=x"], "no flag --workdri; did you mean --workdir?"),
    (TRAIN, [SMOKE, RUN, "--config.alhpa=4"], "did you mean --config.alpha?"),
    (TRAIN, [SMOKE, RUN, "--config.optim.lr=1"], "mean --config.optim.learning_rate?"),
    (TRAIN, [SMOKE, RUN, "--config.learning_rate=1"], "--config.optim.learning_rate?"),
    (TRAIN, [SMOKE, RUN, "--config.num_generations=1"], "--config.samples_per_prompt?"),
    (TRAIN, [SMOKE, RUN, "--config.loss_type=dapo"], "mean --config.loss_aggregation?"),
    (TRAIN, [SMOKE, RUN, "--config.scale_rewards=none"], "mean --config.advantage?"),
    (TRAIN, [SMOKE, RUN, "--config.optim=1"], "--config.optim is a group; its settings"),
    (TRAIN, [SMOKE, RUN, "--config.top_k=4"], "For evaluation set --config.eval_sampling"),
    (TRAIN, [SMOKE, RUN, "alpha=4"], "unexpected arguments: alpha=4"),
    # Types.
    (TRAIN, [SMOKE, RUN, "--config.alpha=four"], "--config.alpha=four: must be a number"),
    (TRAIN, [SMOKE, RUN, "--config.num_steps=1.5"], "must be a whole number"),
    (TRAIN, [SMOKE, RUN, "--config.offload_ref=maybe"], "must be true or false"),
    (TRAIN, [SMOKE, RUN, "--config.alpha"], "--config.alpha needs a value"),
    # Values.
    (TRAIN, [SMOKE, RUN, "--config.alpha=-1"], "--config.alpha=-1.0: must be positive"),
    (TRAIN, [SMOKE, RUN, "--config.alpha=nan"], "alpha=nan: must be a finite number"),
    (TRAIN, [SMOKE, RUN, "--config.num_steps=0"], "must be positive"),
    (TRAIN, [SMOKE, RUN, "--config.seed=4294967296"], "at least 0, at most 4294967295"),
    (TRAIN, [SMOKE, RUN, "--config.reward=nan*length"], "'nan' is no weight"),
    (TRAIN, [SMOKE, "--workdir="], "--workdir is empty; give --workdir: folder of the run"),
    (TRAIN, [SMOKE, RUN, "--config.lora.rank=100000"], "lora.rank=100000: the largest matrix"),
    (TRAIN, [SMOKE, RUN, "--config.optim.learning_rate=-1e-6"], "must be at least 0"),
    (TRAIN, [SMOKE, RUN, "--config.optim.learning_rate=10"], "at most 1"),
    (TRAIN, [SMOKE, RUN, "--config.optim.warmup_steps=-1"], "must be at least 0"),
    (TRAIN, [SMOKE, RUN, "--config.format_penalty=0.5"], "must be at most 0"),
    (TRAIN, [SMOKE, RUN, "--config.eval_sampling.top_p=2"], "top_p must be in (0, 1]"),
    (TRAIN, [SMOKE, RUN, "--config.eval_sampling.temperature=-1"], "must be at least 0"),
    (TRAIN, [SMOKE, RUN, "--config.temperature=0"], "greedy decoding is for evaluation"),
    (TRAIN, [SMOKE, RUN, "--config.profile_steps=3"], "as in (10, 13)"),
    (TRAIN, [SMOKE, RUN, "--config.objective=powerflo"], "did you mean 'powerflow'?"),
    (TRAIN, [SMOKE, RUN, "--config.samples_per_prompt=1", "--config.log_z=group"],
     "samples_per_prompt must be at least 2"),
    (TRAIN, [SMOKE, RUN, "--config.updates_per_rollout=64"], "exceeds prompts_per_step"),
    (TRAIN, [SMOKE, RUN, "--config.clip_low=2"], "exceeds --config.clip_high"),
    (TRAIN, [SMOKE, RUN, "--config.pack_length=16"], "pack_length=16 is too short"),
    (TRAIN, [SMOKE, RUN, "--config.max_new_tokens=4096", "--config.pack_length=8192"],
     "exceeds the model's 512 positions"),
    (TRAIN, [SMOKE, RUN, "--config.mesh.data=3"], "does not cover the 1 devices"),
    (TRAIN, [SMOKE, RUN, "--config.lora.rank=4", "--config.offload_ref=true"],
     "has to stay on the devices"),
    # Models and data.
    (TRAIN, [SMOKE, RUN, "--config.model={tmp}/none"], "none does not exist"),
    (TRAIN, [SMOKE, RUN, "--config.model={tmp}"], "has no config.json"),
    (TRAIN, [SMOKE, RUN, "--config.data.train={tmp}/none.jsonl"], "does not exist"),
    (TRAIN, [SMOKE, RUN, "--config.data.chat_template_kwargs=x"], "chat_template_kwargs"),
    (
        TRAIN,
        [SMOKE, RUN, "--config.objective=grpo", "--config.behavior.base=0"],
        "prompts of pfjax/toy/train.jsonl",
    ),
    (TRAIN, [SMOKE, RUN, "--config.objective=grpo"], "itself (behavior.base=0.0)"),
    # The other commands.
    ("pfjax.sample", [], "give either --prompt or --prompts"),
    ("pfjax.sample", ["--prompt=1", "--prompts=x"], "give either --prompt or --prompts"),
    ("pfjax.sample", ["--promt=1"], "no flag --promt; did you mean --prompt?"),
    ("pfjax.sample", ["--prompt=1", "--samples=a"], "--samples=a: must be a whole number"),
    ("pfjax.sample", ["--prompt=1", "--temperature=-1"], "--temperature=-1: "),
    ("pfjax.sample", ["--prompt=1", "--model=none/here/x"], "does not exist"),
    ("pfjax.sample", ["--prompt=1", "--temperature=nan"], "must be a finite number"),
    ("pfjax.sample", ["--prompt=1", "--method=smc", "--alpha=inf"], "a finite number"),
    ("pfjax.sample", ["--prompt=1", "--seed=4294967296"], "--seed=4294967296: "),
    ("pfjax.sample", ["--prompt=1", "--stop="], "--stop is empty"),
    ("pfjax.sample", ["--prompt=1", "--particles=9"], "=tokens takes no --particles"),
    (
        "pfjax.sample",
        ["--prompt=1", "--method=low_temperature", "--alpha=2", "--log_z=-1"],
        "--method=low_temperature takes no --log_z",
    ),
    ("pfjax.evaluate", ["--benchmark=math500"], "give --out: folder of scores"),
    ("pfjax.evaluate", ["--out={tmp}/o"], "give --benchmark: sets, comma-separated"),
    ("pfjax.evaluate", ["--benchmark=maht500", "--out={tmp}/o"], "maht500"),
    ("pfjax.evaluate", ["--benchmark=", "--out={tmp}/o"], "--benchmark is empty; give"),
    (
        "pfjax.evaluate",
        ["--benchmark=pfjax/toy/eval.jsonl", "--out={tmp}/o", "--stop="],
        "--stop is empty",
    ),
    ("pfjax.plan", [SMOKE], "give --topology=NAME or --all"),
    ("pfjax.plan", [SMOKE, "--topology=v9:4"], "v9"),
    ("pfjax.report.__main__", [], "give at least one run"),
    ("pfjax.report.__main__", ["{tmp}/none"], "none"),
    ("pfjax.report.__main__", ["{tmp}", "--watch", "--port=99999"], "--port=99999: "),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "args", "message"),
    _MISTAKES,
    ids=[f"{m.split('.')[1]}{' '.join(a)}" for m, a, _ in _MISTAKES],
)
def test_a_mistake_is_answered_in_one_line(module, args, message, tmp_path):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "wrong.py").write_text(
        "from pfjax.trainer import settings\n\ndef get_config():\n"
        "    return recipes.recipe('smoke').no_such_setting\n"
    )
    done = run_command(module, *(a.format(tmp=tmp_path) for a in args))
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1 and said, (done.stdout, done.stderr)
    assert said[-1].startswith("error: ") and message in said[-1], done.stderr
    assert len(said) == 1 and "raised at" not in said[-1], done.stderr


def test_help_lists_every_setting_with_its_default():
    done = run_command("pfjax.train", "--help")
    assert done.returncode == 0 and not done.stderr
    for name, setting in settings.SETTINGS.items():
        default = setting.default
        shown = name if default in ("", ()) or default is False else f"{name}={default}"
        assert f"\n  {shown}" in done.stdout, name
        assert setting.about.split()[0] in done.stdout
    assert all(name in done.stdout for name in recipes.recipe_paths())
    assert "--workdir" in done.stdout and "--multihost" in done.stdout


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_command_has_help_that_begins_with_what_it_does(name):
    module = command.COMMANDS[name][0]
    done = run_command(module, "--help")
    first = done.stdout.splitlines()[0]
    assert done.returncode == 0 and first.strip() and "flags:" in done.stdout
    assert f"pfjax {name}" in done.stdout


def _pfjax(*args):
    return subprocess.run(
        [sys.executable, "-m", "pfjax", *args],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["train"]])
def test_help_and_mistakes_of_flags_load_nothing_heavy(args):
    code = (
        "import sys; from pfjax import __main__\n"
        "try: __main__.main()\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'transformers', 'jaxtyping'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *args], check=True, cwd=ROOT)


def test_output_is_utf_8_in_any_locale_and_may_be_closed():
    code = (
        "import sys; from pfjax import cli; from pfjax.report import __main__ as m\n"
        "def main(rest): print('± é')\n"
        "main.__module__ = m.__name__; cli.run(main)"
    )
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT, env=env)
    assert done.stdout.decode() == "± é\n", done.stderr
    closing = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(closing, capture_output=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_command_without_arguments_lists_the_commands():
    for args in ((), ("--help",), ("-h",)):
        done = _pfjax(*args)
        assert done.returncode == 0 and not done.stderr
        assert all(f"\n  pfjax {name} " in done.stdout for name in command.COMMANDS)
    done = _pfjax("trian")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no command 'trian'; did you mean train?")


def test_a_command_passes_its_flags_on():
    args = ("--config.alpha", "2", "--config", "smoke", "--topology=h100:1", "--json")
    done = _pfjax("plan", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "pfjax/toy"


def test_recipes_are_found_by_name_and_by_path():
    by_name = recipes.recipe("smoke")
    assert by_name == recipes.recipe(str(ROOT / "configs/smoke.py"))
    assert recipes.recipe("study:grpo").objective == "grpo"
    with pytest.raises(ValueError, match="did you mean reasoning"):
        recipes.recipe("reasonin")


@pytest.mark.parametrize("how", ["assert False", "raise RuntimeError('no cuda')"])
def test_devices_that_are_not_there_are_named(monkeypatch, tmp_path, how):
    """JAX asserts where it has no plugin for CUDA, and raises for other platforms."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    (tmp_path / "xla_bridge.py").write_text(how, encoding="utf-8")
    said = "^error: JAX finds no device of JAX_PLATFORMS=cuda"
    with pytest.raises(SystemExit, match=said), cli.mistakes_in_one_line():
        runpy.run_path(tmp_path / "xla_bridge.py")
    with pytest.raises(AssertionError), cli.mistakes_in_one_line():
        raise AssertionError("of another place")


def test_a_device_without_memory_says_what_to_lower():
    """What XLA says of it, a page at times, is cut to its first line."""
    text = (
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nAllocator"
    )
    with pytest.raises(SystemExit) as end, cli.mistakes_in_one_line():
        raise jax.errors.JaxRuntimeError(text)
    said, first = end.value.code.splitlines()
    assert said.startswith("error: ") and "--config.microbatch_size=1" in said
    assert first == text.splitlines()[0]
    # What else the compiler says is no mistake of the person's.
    with pytest.raises(jax.errors.JaxRuntimeError), cli.mistakes_in_one_line():
        raise jax.errors.JaxRuntimeError("INTERNAL: no algorithm was found")
