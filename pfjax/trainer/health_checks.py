"""What goes wrong during a run, noticed early."""

import contextlib
import faulthandler
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax


class Unhealthy(Exception):
    """The run was ended since its metrics say that it goes wrong."""


def symptoms(
    history: Sequence[dict[str, Any]],
    length_floor: float,
    truncated_ceiling: float,
    rollout_kl: float,
    patience: int,
    has_target: bool,
) -> list[str]:
    """What the last steps suffer from, in sentences.

    Args:
      history: rows of `metrics.jsonl`.
      length_floor: fraction of the mean length of the first `patience` steps.
      truncated_ceiling: fraction of responses that are cut at the limit.
      rollout_kl: divergence of the sampler from the scorer, in nats per token; one step is
        enough. Rounding stays far below: 0.004 for Qwen2.5-1.5B in bfloat16.
      patience: steps in a row.
      has_target: whether the residual is what is trained on.
    """
    rows, out = [r for r in history if "completions/mean_length" in r], []
    kl = rows[-1].get("rollout/kl", 0.0) if rows else 0.0
    if kl > rollout_kl:
        out.append(
            f"the sampler diverges from the scorer by {kl:.2g} nats per token at step "
            f"{rows[-1]['step']} (rollout/kl), more than rounding does: one of them does "
            "not compute the model. Try --config.attention=chunked and "
            "--config.dtype=float32"
        )
    if out or len(rows) < patience:
        return out
    length = [r["completions/mean_length"] for r in rows]
    last, lag = rows[-1]["step"], has_target and _lag(rows, patience)
    start, longest = sum(length[:patience]) / patience, max(length[-patience:])
    least_cut = min(r["completions/clipped_ratio"] for r in rows[-patience:])
    if len(rows) >= 2 * patience and longest < length_floor * start:
        cause = lag or (
            "an objective that sums over tokens, or too large a step: look at "
            "tb/residual_mean and kl/policy_base_per_token"
        )
        out.append(
            f"lengths have collapsed: for {patience} steps, up to step {last}, responses "
            f"had at most {longest:.1f} tokens, {start:.1f} at the start "
            f"(completions/mean_length). Likely {cause}"
        )
    if least_cut >= truncated_ceiling:
        cause = lag or (
            "max_new_tokens is too small, the tokenizer names no stop token, or responses "
            "repeat (repetition/loop_frac)"
        )
        out.append(
            f"responses do not end: for {patience} steps, up to step {last}, at least "
            f"{least_cut:.0%} were cut at max_new_tokens (completions/clipped_ratio). Likely "
            f"{cause}"
        )
    return out + (_divergence(rows, patience) if has_target else [])


_MEAN, _SPREAD = "tb/residual_mean", "tb/residual_std_within_prompt"
# 63 runs on small models, good ones and bad ones, had at most 1; two whose responses no
# longer ended had 28 and 53.
_LAG = 2


def _lag(rows: list[dict[str, Any]], patience: int) -> str:
    """Whether responses share a residual that is larger than what tells them apart."""
    rows = [r for r in rows if _MEAN in r and _SPREAD in r]
    if len(rows) < 2 * patience:
        return ""
    mean, spread, at_start = (
        sum(r[k] for r in some) / patience
        for k, some in (
            (_MEAN, rows[-patience:]),
            (_SPREAD, rows[-patience:]),
            (_SPREAD, rows[:patience]),
        )
    )
    if abs(mean) <= max(_LAG * spread, at_start):
        return ""
    longer = "longer" if mean > 0 else "shorter"
    return (
        f"log Z' lags behind: over {patience} steps the mean residual was {mean:.2g} nats "
        f"({_MEAN}), and its spread within prompts {spread:.2g} ({_SPREAD}). What all "
        f"responses share rewards {longer} ones, where the loss is per token, and beyond "
        "residual_clip it hides what tells them apart. A smaller optim.learning_rate, or else "
        "a larger optim.log_z_learning_rate or log_z=group, may prevent that"
    )


_KL = "kl/policy_base_per_token"
# Runs that end near their target stay below 0.7 times the start; one that was lost had 65
# times, 5 to 10 nats per token from the base. At alpha 1 a run starts at no spread at all.
_TIMES, _NATS = 4, 1


def _divergence(rows: list[dict[str, Any]], patience: int) -> list[str]:
    """Whether the residual has grown far beyond that of the start and stays there."""
    rows = [r for r in rows if _SPREAD in r and _KL in r]
    if len(rows) < 2 * patience:
        return []
    start = sum(r[_SPREAD] for r in rows[:patience]) / patience
    least, nats = (min(r[k] for r in rows[-patience:]) for k in (_SPREAD, _KL))
    if least <= _TIMES * start or nats <= _NATS:
        return []
    said = (
        f"training diverges: for {patience} steps, up to step {rows[-1]['step']}, the "
        f"residual's spread was at least {least:.2g}, {start:.2g} at the start ({_SPREAD}), "
        f"and the policy at least {nats:.2g} nats per token from the base ({_KL}). Likely single "
        "responses far from the target decide the updates, or these are too large: set "
        "residual_clip, or a smaller one, or a smaller optim.log_z_learning_rate or "
        "optim.learning_rate, or fewer updates_per_rollout"
    )
    return [said]


def suspicions(
    history: Sequence[dict[str, Any]], patience: int, alpha: float | None = None
) -> list[str]:
    """What deserves a look in the last `patience` rows, but may be meant; as `symptoms`.

    Args:
      alpha: power of the target; None where there is no target.
    """
    out = _constant_reward(history, patience)
    rows = [r for r in history if all(k in r for k in _WATCHED)]
    if len(rows) < 2 * patience:
        return out
    ends = rows[:patience], rows[-patience:]
    # With one response per prompt there are no groups.
    known = [k for k in _OF_GROUPS if all(k in r for some in ends for r in some)]
    mean = lambda k, some: sum(r[k] for r in some) / patience
    first, last = ({k: mean(k, x) for k in (*_WATCHED, *known)} for x in ends)
    repeats = "completions/repeats_across_prompts"
    if last[repeats] > max(0.5, first[repeats] + 0.3):
        out.append(
            f"{last[repeats]:.0%} of the responses are given to other prompts of the step "
            f"too, {first[repeats]:.0%} at the start ({repeats}): the policy is about to say "
            "one thing to all. A smaller optim.learning_rate, or more samples of the base "
            "(behavior.base), mend that, unless the target itself repeats: compare "
            "pfjax sample --method=mh"
        )
    length, cut = "completions/mean_length", "completions/clipped_ratio"
    if alpha is not None and (lag := _lag(rows, patience)):
        out.append(lag)
    elif last[cut] > first[cut] + 0.2:
        out.append(
            f"{last[cut]:.0%} of the responses are cut at max_new_tokens, {first[cut]:.0%} at "
            f"the start ({cut}), and mean length went from {first[length]:.1f} to "
            f"{last[length]:.1f}: what is cut has not paid for its end, and the target asks "
            "for more of it. Raise max_new_tokens, or look at repetition/loop_frac"
        )
    if alpha is not None and alpha != 1 and len(known) == len(_OF_GROUPS):
        out += _far_exponent(first, last, alpha)
    return out


_WATCHED = (
    "completions/mean_length",
    "completions/clipped_ratio",
    "completions/repeats_across_prompts",
)
_OF_GROUPS = (_SPREAD, "tb/exponent")


def _far_exponent(
    first: dict[str, float], last: dict[str, float], alpha: float
) -> list[str]:
    is_small = last[_SPREAD] < 0.25 * first[_SPREAD]
    way = (last["tb/exponent"] - 1) / (alpha - 1)
    if not is_small or 0.7 <= way <= 1.3:
        return []
    return [
        (
            f"the residual has become small ({_SPREAD}), yet the policy is the base to the power "
            f"of {last['tb/exponent']:.2f} rather than {alpha:g} (tb/exponent): what it seldom "
            "says is not where the target wants it. More samples of the base (behavior.base) "
            "teach it that"
        )
    ]


def _constant_reward(history: Sequence[dict[str, Any]], patience: int) -> list[str]:
    rows = [r for r in history if "reward/mean" in r][-patience:]
    # An older run has no min and max, one response per prompt no std.
    names = ("mean", "std", "min", "max")
    seen = {tuple(r.get(f"reward/{k}") for k in names) for r in rows}
    if len(rows) < patience or len(seen) > 1:
        return []
    ((_, std, low, high),) = seen
    if std or (std is None and low != high):
        return []
    mean = rows[-1]["reward/mean"]
    said = (
        f"every response of the last {patience} steps had the same reward, {mean:g} "
        "(reward/mean, reward/min, reward/max): nothing is learned. Likely the answers are not of the "
        "form that responses give them in; compare `gold` and `answer` in completions/"
    )
    return [said]


def reward_scale(
    row: dict[str, Any], beta: float | None, is_per_token: bool
) -> list[str]:
    """What the rewards of a step are like, and a warning where they weigh next to nothing
    in the target or all but everything.

    Args:
      row: metrics of the step.
      beta, is_per_token: of the reward in the target; None where it has none.
    """
    if "reward/mean" not in row:
        return []
    low, high = row["reward/min"], row["reward/max"]
    std = row.get("reward/std")
    within = "" if std is None else f", std within a prompt {std:.3g}"
    said = (
        f"reward: mean {row['reward/mean']:.3g}{within}, from {low:.3g} to {high:.3g}"
    )
    length = row.get("completions/mean_length")
    if beta is None or (is_per_token and length is None):
        return [said]
    nats = beta * (high - low) * (length if is_per_token else 1)
    per_token = f" per token, at {length:.3g} tokens" if is_per_token else ""
    out = [f"{said} (beta {beta:g}{per_token}: odds change by up to e^{nats:.3g})"]
    if nats < 0.01:
        out.append(
            f"warning: the reward moves the target by {nats:.2g} nats, next to nothing: is "
            "it the same for most responses, or --config.beta too small?"
        )
    elif nats > 50:
        out.append(
            f"warning: the reward moves the target by {nats:.3g} nats per response, which "
            "decides alone and makes large losses; 20 are enough even for a verifier: "
            "lower --config.beta or the weights of the reward"
        )
    return out


@contextlib.contextmanager
def watch(step: int, limit_seconds: float) -> Iterator[None]:
    """Says on standard error, with the stacks of this process, if a step is stuck."""
    ours = threading.get_ident()

    def report() -> None:
        stack = "".join(traceback.format_stack(sys._current_frames()[ours]))
        print(
            f"process {jax.process_index()}: step {step} has taken more than "
            f"{limit_seconds:g} s (health_checks.step_seconds); it stands at:\n{stack}",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(limit_seconds, report)
    timer.daemon = True
    timer.start()
    # In C: it needs no lock of the interpreter, which what hangs may hold. It shows the
    # 100 youngest threads, of which this one need not be. To the descriptor: in a
    # notebook sys.stderr is no file.
    faulthandler.dump_traceback_later(limit_seconds + 0.1, repeat=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
