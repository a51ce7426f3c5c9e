r"""The paper's comparison on the embedded world: python -m pfjax.study --out=runs/study

Trains every objective and a sweep of alpha on a number of seeds, a run a core, each as
`configs/study.py` says; flattens what was sharpened (alpha 2, then 0.5); draws from the
base by the methods that need no training; and writes a report and a table of last values.
Runs that are there already are kept, so the same command goes on.

--search tries eight settings for each objective on prompts held out of training, with a seed
of its own, and prints the best: where configs/study.py has its settings from.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import app, flags

_OUT = flags.DEFINE_string("out", "runs/study", "folder of the runs and the report")
_SEARCH = flags.DEFINE_bool("search", False, "search settings instead")
_OBJECTIVES = flags.DEFINE_list("objectives", [], "which; default: all")
_ALPHAS = flags.DEFINE_list(
    "alphas", ["0.25", "0.5", "1", "2", "8"], "beside 4, for PowerFlow"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of a kind", lower_bound=1)
_STEPS = flags.DEFINE_integer("num_steps", None, "of a run; default: the config's")

_ROOT = pathlib.Path(__file__).parent.parent
_TRAIN = _ROOT / "pfjax/assets/toy/train_answered.jsonl"
_EVAL = "pfjax/toy/eval.jsonl"
_SEARCH_SEED = 100
_VALIDATION = 128  # prompts of the training set that a search does not train on

# Every objective is tried at these six, then at two more from where it was best: of a
# setting that it alone has, or of a finer learning rate.
_RATES, _CLIPS = (1e-4, 3e-4, 1e-3), (0.05, 1.0)
_BALANCE = ({"log_z": "group"}, {"optim.log_z_learning_rate": 3e-2})
_REWARD = ({"reward_kl": 0.01}, {"reward_kl": 0.1})
_SECOND: dict[str, tuple[dict[str, Any], ...]] = {
    "powerflow": _BALANCE,
    "tb_traj": _BALANCE,
    "tb_token": _BALANCE,
    "flowrl": ({"flowrl_beta": 1.0}, {"flowrl_beta": 4.0}),
    "grpo": _REWARD,
    "ttrl": _REWARD,
    "empo": _REWARD,
    "intuitor": _REWARD,
}

# What PowerFlow's log Z' settles at for alpha 4: the length-aware target, for the methods
# that draw from it, and for the bounds on its sum (which hold for any).
_LOG_Z = "-0.36"
_METHODS = {
    "temperature 0.25": ("--method=low_temperature",),
    "SMC, whole sequences": ("--method=smc", "--ramp=10"),
    "SMC, length-aware": ("--method=smc", "--ramp=10", f"--log_z={_LOG_Z}"),
    "MH, length-aware": ("--method=mh", "--blocks=4", f"--log_z={_LOG_Z}"),
}
# Few enough to be drawn in one frame.
_FIGURE = ("powerflow", "tb_traj", "tb_token", "ttrl", "empo", "intuitor")


class Job(NamedTuple):
    """One run, in `<out>/<group>/<seed>`."""

    group: str
    seed: int
    label: str
    objective: str
    values: dict[str, Any]  # of the config, beside those of configs/study.py
    after: str = ""  # group whose policy of the same seed is the base

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        return out / self.group / str(self.seed)

    @property
    def has_target(self) -> bool:
        """Whether samples of what it trains toward are at hand."""
        return self.group == "powerflow"


class _Cores:
    """Hands out the cores of this machine, one a run."""

    def __init__(self):
        usable = getattr(os, "sched_getaffinity", None)  # Linux
        numbers = sorted(usable(0)) if usable else range(os.cpu_count() or 1)
        self.count = len(numbers)
        self._can_pin = bool(usable)
        self._free: queue.Queue[int] = queue.Queue()
        for number in numbers:
            self._free.put(number)

    @contextlib.contextmanager
    def one(self) -> Iterator[dict[str, Any]]:
        """Arguments of `subprocess.run` that keep a process on a free core."""
        core = self._free.get()
        pin = (lambda: os.sched_setaffinity(0, {core})) if self._can_pin else None
        try:
            yield {
                "preexec_fn": pin,
                "cwd": _ROOT,
                "env": {**os.environ, "JAX_PLATFORMS": "cpu"},
            }
        finally:
            self._free.put(core)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    out = pathlib.Path(_OUT.value).absolute()
    out.mkdir(parents=True, exist_ok=True)
    try:
        search(out) if _SEARCH.value else study(out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def study(out: pathlib.Path) -> None:
    jobs = list(_jobs())
    cores = _Cores()
    begin = time.monotonic()
    target = ("--method=smc", "--ramp=10", "--alpha=4", f"--log_z={_LOG_Z}")
    _draw(cores, out / "target.jsonl", _SEARCH_SEED, *target)
    numbers = itertools.count(1)
    finished: dict[str, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(cores.count) as pool:

        def run(job: Job, needed: concurrent.futures.Future | None) -> None:
            if needed:
                needed.result()
            values = {**job.values, "seed": job.seed}
            if job.has_target:
                values["data.target"] = str(out / "target.jsonl")
            if job.after:
                values["model"] = str(out / job.after / str(job.seed) / "hf")
            folder = job.folder(out)
            is_new = _train(cores, folder, job.objective, values)
            (folder / "label.txt").write_text(job.label + "\n")
            done = next(numbers)
            if is_new:
                minutes = (time.monotonic() - begin) / 60
                print(f"{minutes:5.1f} min  {done}/{len(jobs)}  {job.group}/{job.seed}")

        # What others wait for stands first, so that no thread waits for one not begun.
        for job in sorted(jobs, key=lambda j: bool(j.after)):
            needed = finished.get(f"{job.after}/{job.seed}")
            finished[f"{job.group}/{job.seed}"] = pool.submit(run, job, needed)
        drawn: dict[str, list[pathlib.Path]] = {}
        for name, options in _METHODS.items():
            for seed in range(_SEEDS.value):
                path = out / f"drawn/{name.replace(' ', '_')}_{seed}.jsonl"
                path.parent.mkdir(exist_ok=True)
                drawn.setdefault(name, []).append(path)
                finished[path.name] = pool.submit(
                    _draw, cores, path, seed, "--alpha=4", *options
                )
        try:
            for future in concurrent.futures.as_completed(finished.values()):
                future.result()
        except BaseException:  # also Ctrl-C: what has not begun is left
            pool.shutdown(cancel_futures=True)
            raise
    table = out / "table.md"
    table.write_text(_tables(out, jobs, drawn))
    typed = pathlib.Path(_OUT.value)  # which the pages show
    figure = [typed / name for name in _FIGURE if (out / name).exists()]
    for name, runs in (("report", [typed]), ("figure", figure)):
        command = [sys.executable, "-m", "pfjax.report", *runs, f"--out={typed / name}"]
        if runs:
            subprocess.run(command, check=True)
    print(f"\n{table.read_text()}\ntable:  {table}\nreport: {out}/report/index.html")


def _tables(
    out: pathlib.Path, jobs: list[Job], drawn: dict[str, list[pathlib.Path]]
) -> str:
    from pfjax.evaluation import comparison

    text = [
        comparison.table_of_runs(
            [(j.label, j.folder(out)) for j in jobs if not j.after]
        )
    ]
    back = [j for j in jobs if j.after]
    if back:
        text.append(comparison.table_of_runs([(j.label, j.folder(out)) for j in back]))
        folders = {
            label: [out / group / str(j.seed) / "hf" for j in back]
            for label, group in (
                ("alpha 2", back[0].after),
                (back[0].label, back[0].group),
            )
        }
        text.append(comparison.table_of_distances(folders, "pfjax/toy", _EVAL))
    bounds = [
        f"{row['eval/elbo']:.3f} <= log of the target's sum <= {row['eval/eubo']:.3f}"
        for j in jobs
        if j.has_target
        for row in comparison.evaluations(j.folder(out))[-1:]
    ]
    if bounds:
        text.append("Bounds of PowerFlow, alpha 4: " + "; ".join(bounds) + "\n")
    text.append("Drawn from the base at alpha 4, without training:\n")
    text.append(comparison.table_of_draws(drawn, _EVAL))
    return "\n".join(text)


def _jobs() -> Iterator[Job]:
    from pfjax import objectives

    names = _OBJECTIVES.value or list(objectives.OBJECTIVES)
    steps = {} if _STEPS.value is None else {"num_steps": _STEPS.value}
    for seed in range(_SEEDS.value):
        for name in names:
            label = "powerflow, alpha 4" if name == "powerflow" else name
            yield Job(name, seed, label, name, steps)
        for alpha in _ALPHAS.value:
            values = {"alpha": float(alpha), **steps}
            label = f"powerflow, alpha {alpha}"
            yield Job(f"alpha-{alpha}", seed, label, "powerflow", values)
        if "2" in _ALPHAS.value:
            values = {"alpha": 0.5, **steps}
            label = "alpha 2, then 0.5"
            yield Job("back", seed, label, "powerflow", values, after="alpha-2")


def _train(
    cores: _Cores, folder: pathlib.Path, objective: str, values: dict[str, Any]
) -> bool:
    """Trains unless it was done before; returns whether it was not.

    Raises:
      ValueError: if training failed, with what it said last.
    """
    if (folder / "hf").exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pfjax.train", f"--config=configs/study.py:{objective}",
        f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in values.items()),
    ]  # fmt: skip
    log = folder / "log.txt"
    with cores.one() as where, log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False, **where)
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-5:])
        raise ValueError(f"{folder} failed ({log}):\n{last}")
    return True


def search(out: pathlib.Path) -> None:
    from pfjax import objectives
    from pfjax.evaluation import comparison

    rows = _TRAIN.read_text().splitlines(keepends=True)
    for name, part in (("train", rows[:-_VALIDATION]), ("valid", rows[-_VALIDATION:])):
        (out / f"{name}.jsonl").write_text("".join(part))
    shared = {
        "data.train": out / "train.jsonl",
        "data.eval": out / "valid.jsonl",
        "seed": _SEARCH_SEED,
        "eval_every": 50,
        "eval_samples": 8,
    }
    if _STEPS.value is not None:
        shared["num_steps"] = _STEPS.value
    cores = _Cores()

    def trial(name: str, values: dict[str, Any]) -> dict[str, Any]:
        folder = out / name / "_".join(f"{k}={v}" for k, v in values.items())
        _train(cores, folder, name, {**shared, **values})
        last = comparison.evaluations(folder)[-1]
        return {
            "values": values,
            "accuracy": last["eval/avg"],
            "length": last["eval/length_mean"],
        }

    def tries(name: str) -> tuple[str, list[dict[str, Any]]]:
        grid = [
            {"optim.learning_rate": rate, "optim.clip_norm": clip}
            for rate, clip in itertools.product(_RATES, _CLIPS)
        ]
        found = [trial(name, values) for values in grid]
        best = max(found, key=lambda t: t["accuracy"])["values"]
        rate = best["optim.learning_rate"]
        finer = ({"optim.learning_rate": rate * x} for x in (3**-0.5, 3**0.5))
        found += [
            trial(name, {**best, **more}) for more in _SECOND.get(name, tuple(finer))
        ]
        best = max(found, key=lambda t: t["accuracy"])
        print(f"{name:10} {best['accuracy']:.4f}  {best['values']}", flush=True)
        return name, found

    names = _OBJECTIVES.value or list(objectives.OBJECTIVES)
    with concurrent.futures.ThreadPoolExecutor(cores.count) as pool:
        found = dict(pool.map(tries, names))
    (out / "search.json").write_text(json.dumps(found, indent=1) + "\n")


def _draw(cores: _Cores, path: pathlib.Path, seed: int, *options: str) -> None:
    """Draws from the base by `pfjax.sample`, unless it was done before."""
    if path.exists():
        return
    part = path.with_suffix(".part")
    command = [
        sys.executable, "-m", "pfjax.sample", f"--prompts={_EVAL}",
        "--samples=16", "--max_new_tokens=32", f"--seed={seed}", f"--out={part}",
        *options,
    ]  # fmt: skip
    with cores.one() as where:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, **where
        )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr}")
    part.replace(path)


if __name__ == "__main__":
    app.run(main)
