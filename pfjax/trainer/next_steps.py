"""What a run ends with: commands that look at it, ready to be copied."""

import dataclasses
import os
import pathlib
import shlex
import shutil
import sys

from etils import epath
from ml_collections import FrozenConfigDict

from pfjax.infra import dataset_io
from pfjax.model import dial
from pfjax.sampler.options import TokenFilters
from pfjax.tasks import benchmarks
from pfjax.trainer import checkpoint, run_config

_SOME_PROMPT = "What is 17 + 25?"


def next_steps(config: FrozenConfigDict, folder: epath.Path) -> str:
    """What can be done with a run that has ended, for the shell it was started in."""
    lines = [shlex.join(["report", str(folder), f"--out={folder / 'report'}"])]
    best = ["--best"] if checkpoint.best_step(folder / "checkpoints") else []
    shared = [f"--model={folder / 'hf'}", f"--max_new_tokens={config.max_new_tokens}"]
    shared += _given(config, "data.chat_template_kwargs", "data.clock")
    prompt = [f"--prompt={_shortest_prompt(folder)}", *_given(config, "data.suffix")]
    lines += [shlex.join(["sample", *shared, *prompt])]
    if config.data.eval:
        out = f"--out={folder / 'scores'}"
        lines += [shlex.join(["evaluate", *shared, *_evaluation(config), out])]
    if config.alpha_range:
        model = f"--model={folder / 'dial'}"
        at = f"--alpha={config.alpha:g}"
        lines += [shlex.join(["sample", model, at, *shared[1:], *prompt])]
        if config.data.eval:
            alphas = ",".join(f"{x:g}" for x in _alphas(config))
            more = [f"--alpha={alphas}", *_evaluation(config), out]
            lines += [shlex.join(["evaluate", model, *shared[1:], *more])]
        best = [at, *best]
    lines += [shlex.join(["export", str(folder), *best])]
    shown = "\n".join(f"  {program()} {line}" for line in lines)
    return (
        f"next:\n{shown}\n"
        "(export --push=YOU/NAME sends the model to the Hugging Face hub)"
    )


def _alphas(config: FrozenConfigDict) -> list[float]:
    """Some of the range: its ends and the powers of two between."""
    low, high = dial.parse(config.alpha_range)
    return [low, *(2.0**n for n in range(-9, 10) if low < 2.0**n < high), high]


def program() -> str:
    """How the shell calls pfjax in this environment."""
    python, here = pathlib.Path(sys.executable), pathlib.Path.cwd()
    # Not resolved, as Pythons of environments are links to one.
    if shutil.which("pfjax") == str(python.with_name("pfjax")):
        return "pfjax"
    if shutil.which(python.name) == str(python):
        python = python.name
    elif python.is_relative_to(here):
        python = os.path.join(".", python.relative_to(here))
    return f"{shlex.quote(str(python))} -m pfjax"


def _evaluation(config: FrozenConfigDict) -> list[str]:
    """Flags of `pfjax evaluate` that do what the run's evaluations did."""
    sets = [name.strip() for name in config.data.eval.split(",")]
    out = [f"--benchmark={','.join(sets)}", f"--samples={config.eval_samples}"]
    if config.data.suffix or set(sets) & benchmarks.BENCHMARKS.keys():
        out += [f"--style={{question}}{config.data.suffix}"]
    out += _given(config, "data.prompt_field", "data.answer_field")
    filters = (x.name for x in dataclasses.fields(TokenFilters))
    names = (f"eval_sampling.{x}" for x in ("temperature", *filters))
    out += _given(config, "seed", *names)
    return out + [f"--stop={text}" for text in config.eval_sampling.stop_strings]


def _given(config: FrozenConfigDict, *names: str) -> list[str]:
    """Settings that differ from their defaults, as flags of the same names."""
    changed = run_config.changed(config)
    return [f"--{k.rpartition('.')[2]}={changed[k]}" for k in names if k in changed]


def _shortest_prompt(folder: epath.Path) -> str:
    """Of those that were evaluated."""
    files = sorted((folder / "completions").glob("step_*.jsonl"))
    rows = dataset_io.read_jsonl(files[-1]) if files else []
    return min((row["prompt"] for row in rows), key=len, default=_SOME_PROMPT)
