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
) -> list[str]:
    """What the last steps suffer from, in sentences.

    Args:
      history: rows of `metrics.jsonl`.
      length_floor: fraction of the mean length of the first `patience` steps.
      truncated_ceiling: fraction of responses that are cut at the limit.
      rollout_kl: divergence of the sampler from the scorer, in nats per token; one step is
        enough. Rounding stays far below: 0.004 for Qwen2.5-1.5B in bfloat16.
      patience: steps in a row.
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
    last = rows[-1]["step"]
    start, longest = sum(length[:patience]) / patience, max(length[-patience:])
    least_cut = min(r["completions/clipped_ratio"] for r in rows[-patience:])
    if len(rows) >= 2 * patience and longest < length_floor * start:
        out.append(
            f"lengths have collapsed: for {patience} steps, up to step {last}, responses "
            f"had at most {longest:.1f} tokens, {start:.1f} at the start "
            "(completions/mean_length). Likely an objective that sums over tokens, or "
            "too large a step: look at tb/residual_mean and kl/policy_base_per_token"
        )
    if least_cut >= truncated_ceiling:
        out.append(
            f"responses do not end: for {patience} steps, up to step {last}, at least "
            f"{least_cut:.0%} were cut at max_new_tokens "
            "(completions/clipped_ratio). Likely max_new_tokens is too small, the "
            "tokenizer names no stop token, or responses repeat (repetition/loop_frac)"
        )
    return out


def suspicions(history: Sequence[dict[str, Any]], patience: int) -> list[str]:
    """What deserves a look in the last `patience` rows, but may be meant; as `symptoms`."""
    rows = [r for r in history if "reward/mean" in r][-patience:]
    seen = {(r["reward/mean"], r["reward/std"]) for r in rows}
    if len(rows) < patience or len(seen) > 1 or rows[-1]["reward/std"]:
        return []
    mean = rows[-1]["reward/mean"]
    said = (
        f"every response of the last {patience} steps had the same reward, {mean:g} "
        "(reward/mean, reward/std): nothing is learned. Likely the answers are not of the "
        "form that responses give them in; compare `gold` and `answer` in completions/"
    )
    return [said]


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
