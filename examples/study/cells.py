"""The study's runs: a base model, a method and a seed each, by processes of one core.

What is there already is kept, so that the same command goes on where it was stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pfjax
from examples import exact, worlds
from examples.study import ends, unlisted
from examples.study.ends import TRAIN
from examples.study.methods import ETA_CUTOFF, TRAINED, Base
from pfjax.infra import dataset_io

NUM_EVALUATED = 8  # samples per prompt, as at the evaluations of a run
NUM_TRAINED_ON = 64  # training prompts that are measured as the held-out ones are


class Cell(NamedTuple):
    """One run of the study."""

    world: str
    base: int
    method: str
    seed: int

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        return out / self.world / str(self.base) / self.method / str(self.seed)

    def result(self, out: pathlib.Path) -> pathlib.Path:
        """What is there once it has ended."""
        return self.folder(out) / "result.json"


class Prompts(NamedTuple):
    """Where prompts of training and evaluation are."""

    folder: pathlib.Path
    num_validation: int = 0  # of the world's training prompts, which are evaluated here


def folder_of_base(out: pathlib.Path, world: str, base: int) -> pathlib.Path:
    return out / world / str(base) / "base"


def prepare(
    out: pathlib.Path,
    names: Sequence[str],
    bases: Sequence[int],
    asked: Sequence[str],
    steps: int | None,
) -> None:
    """Fits the bases, and has them draw what methods learn from."""
    pairs = list(itertools.product(names, bases))
    fitted = [
        (f"{w} {b}", make_base, (out, w, b, steps))
        for w, b in pairs
        if not folder_of_base(out, w, b).exists()
    ]
    drawn = [
        (f"{w} {b} {m}", make_samples, (out, w, b, m))
        for (w, b), m in itertools.product(pairs, asked)
        if TRAINED[m].samples
        and TRAINED[m].is_apt(w)
        and not _samples_of(out, w, b, m).exists()
    ]
    carry_out(fitted)
    carry_out(drawn)


def make_base(out: pathlib.Path, world: str, base: int, steps: int | None) -> None:
    """Fits a base model of a world; its number decides weights, prompts, and which are
    held out."""
    folder = folder_of_base(out, world, base)
    part = folder.with_name("base.part")
    with _log(folder.with_suffix(".log")):
        worlds.WORLDS[world].make(part, steps, base)
    part.replace(folder)


@functools.cache
def load_base(
    out: pathlib.Path,
    world: str,
    base: int,
    num_validation: int = 0,
    is_train: bool = False,
) -> Base:
    """A base, and the responses to its held-out prompts, or to the last of the training
    prompts; or to the first of these, which all runs train on."""
    policy = pfjax.load(folder_of_base(out, world, base))
    of_world = worlds.WORLDS[world]
    train, held_out = of_world.problems(base)
    asked = train[-num_validation:] if num_validation else held_out
    asked = train[:NUM_TRAINED_ON] if is_train else asked
    rows = exact.listed(of_world, policy, asked, ETA_CUTOFF)
    how = (policy, rows, of_world.max_tokens, ETA_CUTOFF)
    draw = functools.partial(unlisted.draw, *how)
    return Base(of_world, policy, rows, functools.cache(draw))


def make_samples(out: pathlib.Path, world: str, base: int, method: str) -> None:
    """Has the base draw the responses to training prompts that a method learns from."""
    path = _samples_of(out, world, base, method)
    part, folder = path.with_suffix(".part"), folder_of_base(out, world, base)
    drawn = TRAINED[method].samples(TRAINED[method].alpha(world))
    command = (
        "-m", "pfjax.sample", f"--model={folder}", f"--prompts={folder}/train.jsonl",
        "--samples=8", "--max_new_tokens=32", f"--out={part}",
        *drawn,
    )  # fmt: skip
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, *command], stdout=log, stderr=log, check=False
        )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed, see {log.name}")
    part.replace(path)


def _samples_of(out: pathlib.Path, world: str, base: int, method: str) -> pathlib.Path:
    return folder_of_base(out, world, base).with_name(f"{method}.jsonl")


def run(
    out: pathlib.Path, cell: Cell, more: dict[str, Any], prompts: Prompts | None = None
) -> None:
    """Trains and measures a cell, and writes `result.json` into its folder.

    Args:
      out: folder of the study.
      cell: which.
      more: values of the config beside the method's own.
      prompts: of a trial; by default the world's.
    """
    prompts = prompts or Prompts(folder_of_base(out, cell.world, cell.base))
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(out, cell.world, cell.base, prompts.num_validation)
    method = TRAINED[cell.method]
    alpha = method.alpha(cell.world)
    train = "train_answered" if method.reads_answers else "train"
    values = {
        "model": str(folder_of_base(out, cell.world, cell.base)),
        "data.train": str(prompts.folder / f"{train}.jsonl"),
        "data.eval": str(prompts.folder / "eval.jsonl"),
        "alpha": alpha,
        "seed": cell.seed,
        "max_new_tokens": base.world.max_tokens,
        **method.settings(alpha),
        **more,
    }
    if method.target is not None and alpha < 1:
        values |= {"eta_cutoff": ETA_CUTOFF}
    if method.samples:
        samples = _samples_of(out, cell.world, cell.base, cell.method)
        values |= {"behavior.file": str(samples)}
    with _log(folder / "log.txt"):
        if method.sharpens_first:
            first = folder / "sharpened"
            pfjax.fine_tune(_config(cell, values | {"alpha": 2.0}), first)
            values |= {"alpha": 0.5, "model": str(first / "hf")}
            # What it starts from hardly says what is to be raised: with a cutoff as for
            # the first base it would count as rare, and more of its samples do not help.
            values |= {"eta_cutoff": 1e-4, "behavior.base": 0.25}
            values |= {"updates_per_rollout": 1}
        policy = pfjax.fine_tune(_config(cell, values), folder)
    (folder / "label.txt").write_text(method.title + "\n", "utf-8")
    found = ends.measure(policy, base, method) | ends.on_the_way(folder, base)
    last = max((folder / "completions").glob("step_*.jsonl"))
    found |= ends.with_samples(found, dataset_io.read_jsonl(last), base)
    found |= _on_training(policy, out, cell)
    cell.result(out).write_text(json.dumps(cell._asdict() | found) + "\n", "utf-8")


def _config(cell: Cell, values: dict[str, Any]):
    return pfjax.recipe(f"study:{cell.method}", **values)


def add_training(out: pathlib.Path, asked: Sequence[Cell]) -> None:
    """Measures on training prompts where a run that has ended lacks it, if its policy is
    still there."""
    calls = []
    for cell in asked:
        found = json.loads(cell.result(out).read_text("utf-8"))
        is_known = TRAINED[cell.method].prediction is not None
        is_lacking = not any(key.startswith(TRAIN) for key in found)
        if is_known and is_lacking and (cell.folder(out) / "hf").exists():
            name = f"{' '.join(map(str, cell))}, training prompts"
            calls.append((name, _add_training, (out, cell)))
    carry_out(calls)


def _add_training(out: pathlib.Path, cell: Cell) -> None:
    path = cell.result(out)
    found = json.loads(path.read_text("utf-8"))
    with _log(cell.folder(out) / "log.txt"):
        found |= _on_training(pfjax.load(cell.folder(out) / "hf"), out, cell)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n", "utf-8")
    part.replace(path)


def _on_training(
    policy: pfjax.Policy, out: pathlib.Path, cell: Cell
) -> dict[str, float]:
    """What a policy says on prompts that it was trained on, where it is known what it
    should."""
    method = TRAINED[cell.method]
    if method.prediction is None:
        return {}
    base = load_base(out, cell.world, cell.base, is_train=True)
    config = dataclasses.replace(
        policy.config, load_tokenizer=base.policy.config.load_tokenizer
    )
    problems = [r.problem for r in base.rows]
    args = (problems, NUM_EVALUATED, base.world.max_tokens)
    _, rows = unlisted.graded_samples(policy._replace(config=config), *args)
    found = ends.measure(policy, base, method)
    found |= ends.with_samples(found, rows, base)
    return {f"{TRAIN}{key}": value for key, value in found.items()}


@contextlib.contextmanager
def _log(path: pathlib.Path) -> Iterator[None]:
    """Has a file take what this process prints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def train(
    out: pathlib.Path,
    asked: Sequence[tuple[Cell, dict[str, Any]]],
    prompts: Prompts | None = None,
) -> None:
    """Runs the cells that have not ended, each with values of its own."""
    left = [(cell, more) for cell, more in asked if not cell.result(out).exists()]
    carry_out(
        [
            (" ".join(map(str, cell)), run, (out, cell, more, prompts))
            for cell, more in left
        ]
    )


def carry_out(calls: Sequence[tuple[str, Callable[..., None], tuple]]) -> None:
    """Makes calls in processes, one per core; the first failure ends it.

    Args:
      calls: a name each, a function of this module, and its arguments.
    """
    begin, names = time.monotonic(), {}
    if not calls:
        return
    with _pool() as processes:
        for name, function, args in calls:
            names[processes.submit(function, *args)] = name
        try:
            done = concurrent.futures.as_completed(names)
            for number, future in enumerate(done, 1):
                future.result()
                minutes = (time.monotonic() - begin) / 60
                print(
                    f"{minutes:5.1f} min  {number}/{len(names)}  {names[future]}",
                    flush=True,
                )
        except BaseException:  # also Ctrl-C: what has not begun is left
            processes.shutdown(wait=False, cancel_futures=True)
            raise


def _pool() -> concurrent.futures.ProcessPoolExecutor:
    """A process per core of this machine, which stays on its core."""
    can_pin = hasattr(os, "sched_setaffinity")  # Linux
    cores = sorted(os.sched_getaffinity(0)) if can_pin else range(os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")  # JAX has threads
    free = context.Queue()
    for core in cores:
        free.put(core)
    return concurrent.futures.ProcessPoolExecutor(
        len(cores), context, initializer=_begin, initargs=(free, can_pin)
    )


def _begin(free: Any, can_pin: bool) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if can_pin:
        os.sched_setaffinity(0, {free.get()})


def _end_with_parent() -> None:
    """A study that is killed leaves no run behind."""
    multiprocessing.parent_process().join()
    os._exit(1)
