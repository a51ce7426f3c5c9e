"""Commands of the study: which there are, and carrying them out, a core per command."""

import concurrent.futures
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
EVAL = "pfjax/toy/eval.jsonl"

# What PowerFlow's log Z' settles at for alpha 4: the length-aware target, for the methods
# that sample from it, and for the bounds on its sum (which hold for any).
_LOG_Z = "-0.36"
METHODS = {
    "temperature 0.25": ("--method=low_temperature",),
    "SMC, whole sequences": ("--method=smc", "--ramp=10"),
    "SMC, length-aware": ("--method=smc", "--ramp=10", f"--log_z={_LOG_Z}"),
    "MH, length-aware": ("--method=mh", "--blocks=4", f"--log_z={_LOG_Z}"),
}
_TARGET, _TARGET_SEED = "target", 100


class Job(NamedTuple):
    """One command. It is done when `result` is there."""

    name: str  # "grpo/0"
    command: tuple[str, ...]  # after `python -m`
    result: pathlib.Path
    label: str = ""  # of a run, in the tables and the report
    needs: str = ""  # name of an earlier job

    @property
    def folder(self) -> pathlib.Path:
        """The run's."""
        return self.result.parent


def training(
    folder: pathlib.Path,
    objective: str,
    values: dict[str, Any],
    name: str = "",
    label: str = "",
    needs: str = "",
) -> Job:
    command = (
        "pfjax.train",
        f"--config=configs/study.py:{objective}",
        f"--workdir={folder}",
        *(f"--config.{k}={v}" for k, v in values.items()),
    )
    return Job(name or str(folder), command, folder / "hf", label, needs)


def sampling(name: str, path: pathlib.Path, seed: int, options: Sequence[str]) -> Job:
    """Samples the base at alpha 4."""
    command = (
        "pfjax.sample", f"--prompts={EVAL}", "--samples=16", "--max_new_tokens=32",
        "--alpha=4", f"--seed={seed}", f"--out={_part(path)}", *options,
    )  # fmt: skip
    return Job(name, command, path)


def _part(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".part")


def plan(
    out: pathlib.Path,
    objectives: Sequence[str],
    alphas: Sequence[str],
    seeds: int,
    shared: dict[str, Any],
) -> tuple[list[Job], dict[str, list[Job]]]:
    """Returns training runs, and sampling jobs by method. What others need comes first."""
    trained: list[Job] = []

    def add(
        group: str, seed: int, label: str, objective: str, values, needs=""
    ) -> None:
        values = {**values, **shared, "seed": seed}
        folder = out / group / str(seed)
        name = f"{group}/{seed}"
        trained.append(training(folder, objective, values, name, label, needs))

    target = {"data.target": str(out / f"{_TARGET}.jsonl")}
    for seed in range(seeds):
        for name in objectives:
            if name == "powerflow":  # samples of what it trains toward are at hand
                add(name, seed, f"{name}, alpha 4", name, target, needs=_TARGET)
            else:
                add(name, seed, name, name, {})
        for alpha in alphas:
            label = f"powerflow, alpha {alpha}"
            add(f"alpha-{alpha}", seed, label, "powerflow", {"alpha": float(alpha)})
        if "2" in alphas:
            values = {"alpha": 0.5, "model": str(out / f"alpha-2/{seed}/hf")}
            needs = f"alpha-2/{seed}"
            add("back", seed, "alpha 2, then 0.5", "powerflow", values, needs)
    sampled: dict[str, list[Job]] = {}
    for method, options in METHODS.items():
        stem = method.replace(",", "").replace(" ", "_")
        sampled[method] = [
            sampling(f"{method}/{i}", out / f"samples/{stem}_{i}.jsonl", i, options)
            for i in range(seeds)
        ]
    if "powerflow" in objectives:
        options = METHODS["SMC, length-aware"]
        path = out / f"{_TARGET}.jsonl"
        trained.insert(0, sampling(_TARGET, path, _TARGET_SEED, options))
    return trained, sampled


def run(job: Job) -> None:
    """Runs a command in a process of its own, whose output is kept beside the result.

    Raises:
      ValueError: if it failed, with what it said last.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    log = job.result.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", *job.command],
            stdout=file, stderr=file, check=False, cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise ValueError(f"{job.name} failed ({log}):\n{last}")
    if _part(job.result).exists():  # a file of samples, now whole
        _part(job.result).replace(job.result)


def pool() -> concurrent.futures.ThreadPoolExecutor:
    """A thread per core of this machine, whose child processes stay on that core."""
    can_pin = hasattr(os, "sched_setaffinity")  # Linux
    cores = sorted(os.sched_getaffinity(0)) if can_pin else range(os.cpu_count() or 1)
    free: queue.Queue[int] = queue.Queue()
    for core in cores:
        free.put(core)

    def pin() -> None:
        if can_pin:
            os.sched_setaffinity(0, {free.get()})  # of this thread alone

    return concurrent.futures.ThreadPoolExecutor(len(cores), initializer=pin)


def carry_out(jobs: Sequence[Job], run: Callable[[Job], None] = run) -> None:
    """Runs what is not done yet, each job after the one it needs; the first failure ends
    it."""
    todo = [job for job in jobs if not job.result.exists()]
    begin, finished = time.monotonic(), 0
    begun: dict[str, concurrent.futures.Future] = {}

    def one(job: Job) -> None:
        nonlocal finished
        # It was submitted before this one, so no thread waits for one not begun.
        if job.needs in begun:
            begun[job.needs].result()
        run(job)
        finished += 1
        minutes = (time.monotonic() - begin) / 60
        print(f"{minutes:5.1f} min  {finished}/{len(todo)}  {job.name}", flush=True)

    with pool() as threads:
        for job in sorted(todo, key=lambda j: bool(j.needs)):
            begun[job.name] = threads.submit(one, job)
        try:
            for future in concurrent.futures.as_completed(begun.values()):
                future.result()
        except BaseException:  # also Ctrl-C: what has not begun is left
            threads.shutdown(cancel_futures=True)
            raise
