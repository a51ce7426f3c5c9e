"""What a step looked like, in numbers; and where they are written.

The numbers come from host arrays with one entry a trajectory, so that each can be
tested on a batch made by hand. Means are over responses unless said otherwise.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from pfjax.batch import Rollout
from pfjax.infra import distributed, hardware, storage
from pfjax.infra.dataset_io import read_jsonl, write_jsonl
from pfjax.model import flops
from pfjax.model.transformer import ModelConfig


class StepRecord(NamedTuple):
    """One training step, arrays `[S]` in the order prompt by prompt."""

    prompt_index: np.ndarray
    length: np.ndarray
    finished: np.ndarray
    psi: np.ndarray
    log_pf: np.ndarray
    log_p_base: np.ndarray
    log_z: np.ndarray
    weight: np.ndarray
    loss: np.ndarray
    residual: np.ndarray
    entropy: np.ndarray  # summed over tokens
    kept: np.ndarray  # tokens in log_pf and log_p_base: all, or those in the band


def balance_metrics(r: StepRecord, weight_clamps: tuple[float, float]) -> dict:
    """How far the policy is from the target, and log Z' from its prompts."""
    m, m0 = _per_token(r)
    by_prompt = [r.residual[r.prompt_index == q] for q in np.unique(r.prompt_index)]
    at_clamp = np.isclose(r.weight, weight_clamps[0]) | np.isclose(
        r.weight, weight_clamps[1]
    )
    return {
        "tb/loss": r.loss.mean(),
        "tb/residual_mean": r.residual.mean(),
        "tb/residual_std": r.residual.std(),
        "tb/residual_p95_abs": np.quantile(np.abs(r.residual), 0.95),
        "tb/residual_std_within_prompt": np.sqrt(np.mean([x.var() for x in by_prompt])),
        "tb/logz_mean": r.log_z.mean(),
        "tb/logz_std": r.log_z.std(),
        "tb/logz_gap": np.mean([abs(x.mean()) for x in by_prompt]),
        "policy/logp_per_token": m.mean(),
        "base/logp_per_token": m0.mean(),
        "kl/policy_base_per_token": (m - m0).mean(),
        "is/w_mean": r.weight.mean(),
        "is/w_at_clamp_frac": at_clamp.mean(),
        "is/keep_frac": r.kept.sum() / r.length.sum(),
        "entropy": r.entropy.sum() / r.length.sum(),
    }


def match_metrics(r: StepRecord, alpha: float) -> dict:
    r"""How well the policy matches the length-aware target
    :math:`p_0^\alpha e^{(\alpha\psi - \lambda)|y|}`, whatever the objective, with
    :math:`\lambda` the mean over each prompt's samples, so free of the head's error.

    - `tb/corr_logp_target`, `tb/rank_corr`, `tb/slope`: of log pi a token on that of
      the target, within prompts (Pearson, Spearman, least squares); 1 at the optimum.
    - `tb/elbo`: mean log target - log pi of a sequence; at most the log of the target's
      sum, which it reaches at the optimum; blind to modes that are never drawn.
    - `tb/ess`: effective sample size, as a share, of the prompt's samples with weights
      e^{-residual}; 1 at the optimum.
    - `tb/inversion_rate`: share of a prompt's pairs of different responses that policy
      and base rank the other way round by log-prob; 0 for p_0^alpha, which keeps ranks.
    """
    m, m0 = _per_token(r)
    target = alpha * (m0 + r.psi)
    residual = m - target
    residual = residual - mean_by_prompt(residual, r.prompt_index)
    groups = [r.prompt_index == q for q in np.unique(r.prompt_index)]
    weights = [np.exp(residual[g].min() - residual[g]) for g in groups]
    corr, slope = _regression(m, target, r.prompt_index)
    inverted = [_inverted(r.log_pf[g], r.log_p_base[g]) for g in groups]
    pairs = sum(n for _, n in inverted)
    return {
        "tb/corr_logp_target": corr,
        "tb/slope": slope,
        "tb/rank_corr": _regression(
            _ranks(m, groups), _ranks(target, groups), r.prompt_index
        )[0],
        "tb/elbo": -(r.length * residual).mean(),
        "tb/ess": np.mean([w.sum() ** 2 / (len(w) * (w**2).sum()) for w in weights]),
        "tb/inversion_rate": sum(n for n, _ in inverted) / max(pairs, 1),
    }


def mean_by_prompt(x: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    """For each trajectory, the mean over those of its prompt."""
    _, group = np.unique(prompt_index, return_inverse=True)
    return (np.bincount(group, x) / np.bincount(group))[group]


def _per_token(r: StepRecord) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.maximum(r.kept, 1)
    return r.log_pf / tokens, r.log_p_base / tokens


def _regression(
    y: np.ndarray, x: np.ndarray, prompt_index: np.ndarray
) -> tuple[float, float]:
    """Correlation, and slope of y on x, within prompts; 0 where x or y is constant."""
    y = y - mean_by_prompt(y, prompt_index)
    x = x - mean_by_prompt(x, prompt_index)
    xy, xx, yy = x @ y, x @ x, y @ y
    tiny = np.finfo(np.float32).tiny
    return float(xy / max(np.sqrt(xx * yy), tiny)), float(xy / max(xx, tiny))


def _ranks(x: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Ranks within groups; those that tie share their mean rank."""
    out = np.zeros(len(x))
    for g in groups:
        _, inverse, counts = np.unique(x[g], return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        out[g] = (ends - (counts + 1) / 2)[inverse]
    return out


def _inverted(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Pairs that a and b order differently, and pairs that both order."""
    i, j = np.triu_indices(len(a), 1)
    products = (a[i] - a[j]) * (b[i] - b[j])
    return int((products < 0).sum()), int((products != 0).sum())


def completion_metrics(r: StepRecord, has_box: np.ndarray) -> dict:
    """Lengths and form of the responses."""
    ended = r.length[r.finished]
    return {
        "completions/mean_length": r.length.mean(),
        "completions/max_length": r.length.max(),
        "completions/mean_terminated_length": ended.mean() if len(ended) else 0.0,
        "completions/clipped_ratio": 1.0 - r.finished.mean(),
        "completions/boxed_frac": has_box.mean(),
        "num_tokens": r.length.sum(),
    }


def repetition_metrics(responses: list[np.ndarray], n: int = 4) -> dict:
    """Share of token n-grams that repeat, and of responses that end in a loop."""
    fractions = [_repeated_ngrams(y, n) for y in responses]
    return {
        "repetition/ngram_frac": np.mean(fractions),
        "repetition/loop_frac": np.mean([_ends_in_loop(y) for y in responses]),
    }


def _repeated_ngrams(y: np.ndarray, n: int) -> float:
    if len(y) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(y, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def _ends_in_loop(y: np.ndarray, repeats: int = 4, longest: int = 64) -> bool:
    """Whether the tail is one period of at most `longest` tokens, 4 times over."""
    for period in range(1, min(longest, len(y) // repeats) + 1):
        tail = y[-period * repeats :].reshape(repeats, period)
        if (tail == tail[0]).all():
            return True
    return False


def rollout_metrics(rollout: Rollout, scored: list[np.ndarray]) -> dict:
    """Distance between the sampler's token log-probs and the scorer's, in nats; and
    the share of the sampler's work that drew nothing."""
    drawn = rollout.log_probs.reshape(-1, rollout.log_probs.shape[-1])
    gaps = np.concatenate(
        [np.abs(x - y[: len(x)]) for x, y in zip(scored, drawn, strict=True)]
    )
    return {
        "rollout/logp_gap_mean": gaps.mean(),
        "rollout/logp_gap_max": gaps.max(),
        "rollout/waste": 1.0 - rollout.lengths.sum() / rollout.slot_steps,
    }


def perf_metrics(
    config: ModelConfig,
    times: dict[str, float],
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
) -> dict[str, float]:
    """Response tokens a second of the whole step; and, where the peak of the devices is
    known, the share of it that the base pass and the update reach (see `cost`)."""
    out = {"perf/tokens_per_s": lengths.sum() / times["time/step"]}
    work = flops.update_flops(config, prompt_lengths + lengths, prompt_lengths)
    mfu = hardware.mfu(work, times["time/base_pass"] + times["time/update"])
    return out if mfu is None else out | {"perf/mfu": mfu}


class Writer:
    """Writes metrics to `metrics.jsonl`, TensorBoard, and perhaps W&B: of several
    processes the first does, the others only keep the history."""

    def __init__(self, workdir: epath.Path, last_step: int, wandb_project: str = ""):
        """Opens the files, dropping lines of steps past `last_step` (a resume)."""
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self.history = [r for r in read_jsonl(self._path) if r["step"] <= last_step]
        self._board = self._wandb = None
        if not distributed.is_first():
            return
        from tensorboardX import SummaryWriter

        self._write_history()
        self._events = pathlib.Path(workdir)
        if storage.is_remote(workdir):  # its events can only be written to a disk
            self._events = pathlib.Path(tempfile.mkdtemp(prefix="pfjax-"))
        self._board = SummaryWriter(str(self._events), purge_step=last_step + 1)
        if wandb_project:
            import wandb  # the extra `wandb`

            self._wandb = wandb.init(
                project=wandb_project,
                dir=workdir,
                id=workdir.name,
                resume="allow",
                config=json.loads((workdir / "config.json").read_text())["config"],
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the row of a step, or replaces it by a fuller one."""
        values = {k: float(v) for k, v in values.items()}
        row = {"step": step} | values | {"step": step}
        self.history = [r for r in self.history if r["step"] != step] + [row]
        if self._board is None:
            return
        self._write_history()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def _write_history(self) -> None:
        # Whole, as files in buckets cannot be appended to: 1 MB after 1,000 steps.
        write_jsonl(self._path, self.history)

    def close(self) -> None:
        if self._board is None:
            return
        self._board.close()
        if storage.is_remote(self._workdir):
            storage.upload(self._events, self._workdir)
        if self._wandb is not None:
            self._wandb.finish()


def named(row: dict[str, Any], name: str) -> float | None:
    """A metric by its name, or by what stands before the "@" in it; None without it."""
    return next((v for k, v in row.items() if name in (k, k.partition("@")[0])), None)


_SHOWN = {
    "tb/loss": "loss",
    "tb/residual_mean": "residual",
    "completions/mean_length": "length",
    "entropy": "entropy",
    "time/step": "s/step",
}


class Progress:
    """A progress bar when a person watches, plain lines when nobody does."""

    def __init__(self, start: int, total: int, every: int):
        self._every, self._total, self._bar = every, total, None
        self._is_quiet = not distributed.is_first()
        if sys.stderr.isatty() and not self._is_quiet:
            import rich.progress as rp

            self._bar = rp.Progress(
                rp.TextColumn("step {task.completed}/{task.total}"),
                rp.BarColumn(),
                rp.TextColumn("{task.description}"),
                rp.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def update(self, step: int, values: dict[str, Any]) -> None:
        text = "  ".join(f"{s} {values[k]:.3g}" for k, s in _SHOWN.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._is_quiet and (step % self._every == 0 or step == self._total):
            print(f"step {step}/{self._total}  {text}", flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text)
        elif not self._is_quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Clock:
    """Seconds of the parts of a step, which bear the same names in a profiler's trace."""

    def __init__(self):
        self._begin = time.perf_counter()
        self._times: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        with jax.profiler.TraceAnnotation(name):
            yield
        self._times[f"time/{name}"] = time.perf_counter() - begin

    def done(self) -> dict[str, float]:
        return self._times | {"time/step": time.perf_counter() - self._begin}


class Profiler:
    """Traces steps from `first` up to but not including `end` (TensorBoard, Perfetto)."""

    def __init__(self, folder: epath.Path, first: int, end: int):
        self._folder, self._steps, self._is_on = folder, range(first, end), False
        self._local = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        if number in self._steps and not self._is_on:
            local = self._local.enter_context(storage.local_folder(self._folder))
            jax.profiler.start_trace(local)
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        if self._is_on:
            jax.profiler.stop_trace()
            self._local.close()
            self._is_on = False


def model_card(config: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """README of an exported model: what it is, how it was made, what was measured."""
    evaluated = [row for row in history if any(k.startswith("eval/") for k in row)]
    steps = history[-1]["step"] if history else 0
    batch = (
        f"{config['prompts_per_step']} prompts x {config['samples_per_prompt']} samples"
    )
    lines = [
        "---",
        f"base_model: {config['model']}",
        "library_name: transformers",
        "tags: [powerflow, pfjax]",
        "---",
        "",
        f"# {config['model']} toward its power distribution, alpha {config['alpha']:g}",
        "",
        "Fine-tuned without labels with [PowerFlow](https://arxiv.org/abs/2603.18363)",
        "by pfjax.",
        "",
        f"- base model: {config['model']}",
        f"- objective: {config['objective']}, alpha {config['alpha']:g}",
        f"- data: {config['data']['train']}",
        f"- steps: {steps} of {batch}, seed {config['seed']}",
    ]
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        lines += [
            f"- evaluated on: {config['data']['eval']}",
            "",
            f"| metric | step {first['step']} | step {last['step']} |",
            "|---|---|---|",
        ]
        lines += [
            f"| {k.removeprefix('eval/')} | {first[k]:.3f} | {last[k]:.3f} |"
            for k in first
            if k.startswith("eval/")
        ]
    return "\n".join(lines) + "\n"


def before_and_after(history: list[dict[str, Any]], workdir: epath.Path) -> str:
    """The table a run ends with: the first and the last evaluation."""
    import rich.console
    import rich.table

    evaluated = [row for row in history if any(k.startswith("eval/") for k in row)]
    console = rich.console.Console(width=min(100, rich.console.Console().width))
    with console.capture() as captured:
        if evaluated:
            first, last = evaluated[0], evaluated[-1]
            table = rich.table.Table(title="What changed on the held-out prompts")
            for name in ("", f"step {first['step']}", f"step {last['step']}"):
                table.add_column(name, justify="right" if name else "left")
            for key in first:
                if key.startswith("eval/") and not key.endswith("_se"):
                    table.add_row(key, f"{first[key]:.3f}", f"{last[key]:.3f}")
            console.print(table)
        console.print(f"run:   {workdir}", soft_wrap=True)
        console.print(f"model: {workdir / 'hf'}", soft_wrap=True)
    return captured.get()
