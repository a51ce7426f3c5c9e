"""Metrics of one step.

They come from host arrays with one entry per trajectory, so that each can be tested on a
batch made by hand. Means are over responses unless said otherwise. What cannot be known,
such as the spread of one response, is None, and no metric.
"""

import collections
from typing import Any

import jax
import numpy as np

from pfjax import packing, targets
from pfjax.batch import Minibatch, Rollout, RolloutBatch, TrajectoryStats
from pfjax.infra import hardware
from pfjax.model import flops
from pfjax.objectives import ObjectiveConfig, at_alpha, tilt
from pfjax.targets import Target
from pfjax.tasks import grading
from pfjax.trainer import profiling
from pfjax.trainer.actor import Drawn
from pfjax.trainer.train_fns import TrainFns


def step_metrics(
    fns: TrainFns,
    minibatches: list[Minibatch],
    stats: list[TrajectoryStats],
    log_p: list[jax.Array],
    data: RolloutBatch,
    clock: profiling.Clock,
    step: int,
) -> dict[str, float]:
    """All metrics of one step but those that the updates return.

    Args:
      fns, data, clock: of the run, of the step, and what timed it; it stops here.
      minibatches, stats, log_p: one per update; `[M, B, N]` as it saw them, and `[M, B, T]`
        from before it.
      step: of training.
    """
    objective = fns.objective
    r = _in_order(minibatches, stats, objective.log_z_source != "none")
    # Of the policy that sampled: later updates of a step have moved it, and dropout
    # thins it.
    first = minibatches[0].log_p if fns.has_dropout else log_p[0]
    drawn = [first, *(m.log_p for m in minibatches[1:])]
    pairs = zip(drawn, (m.placement for m in minibatches), strict=True)
    scored = [y for pair in pairs for y in packing.unpack_responses(*pair)]
    prompts = np.concatenate([m.placement.prompt_length for m in minibatches])
    lengths = np.concatenate([m.placement.length for m in minibatches])
    rows = sum(int(m.num_microbatches) for m in minibatches) * fns.shape.microbatch_size
    out = {
        **balance_metrics(r, (objective.clip_low, objective.clip_high)),
        **exponent_metrics(r, objective, data.rollout.is_base),
        **rollout_metrics(data.rollout, scored, step - 1),
        "num_tokens": lengths.sum(),
        "pack/fill": (prompts + lengths).sum() / (rows * fns.shape.pack_length),
    }
    if data.rollout.is_own.any():
        out |= own_metrics(r, objective, data)
    if objective.reward_source:
        reward = np.concatenate([m.reward for m in minibatches])
        groups = reward.reshape(len(data.prompts), -1)
        out["reward/mean"] = reward.mean()
        if groups.shape[1] > 1:
            out["reward/std"] = groups.std(axis=1).mean()
        out |= {"reward/min": reward.min(), "reward/max": reward.max()}
    out |= clock.done()
    out["perf/tokens_per_s"] = lengths.sum() / out["time/step"]
    work = flops.update_flops(fns.model, prompts + lengths, prompts)
    mfu = hardware.mfu(work, out["time/base_pass"] + out["time/update"])
    if mfu is not None:  # the peak of the devices is known
        out["perf/mfu"] = mfu
    return {k: float(v) for k, v in out.items() if v is not None}


def staleness_metrics(drawn: Drawn, step: int) -> dict[str, float]:
    """Ages of the tokens that a step trains on, in steps, and the time of who drew them."""
    rollout = drawn.rollout
    if rollout.weights_step is None:
        return {}
    is_drawn = np.arange(rollout.tokens.shape[-1]) < rollout.lengths[..., None]
    is_drawn &= rollout.is_own.reshape(rollout.lengths.shape)[..., None]
    age = (step - 1 - rollout.weights_step)[is_drawn]
    return {
        "rollout/staleness_mean": float(age.mean()),
        "rollout/staleness_max": float(age.max()),
        "time/actor": drawn.seconds,
        "time/actor_idle": drawn.idle_seconds,
    }


def own_metrics(
    r: TrajectoryStats, objective: ObjectiveConfig, data: RolloutBatch
) -> dict:
    """Metrics of the responses that the policy itself has drawn, of which there are some."""
    own = data.rollout.is_own
    r = jax.tree.map(lambda x: x[own], r)
    texts = np.array(data.texts, object)[own]
    has_box = np.array([grading.last_boxed(text) is not None for text in texts])
    responses = [y for y, is_mine in zip(data.responses, own, strict=True) if is_mine]
    repeats = repeats_across_prompts(texts.reshape(len(data.prompts), -1))
    out = {
        **policy_metrics(r),
        **match_metrics(r, at_alpha(objective, r).target),
        **completion_metrics(r, data.rollout.finished.reshape(-1)[own], has_box),
        "completions/repeats_across_prompts": repeats,
        **repetition_metrics(responses),
    }
    if r.log_p_rare is not None:
        out["completions/rare_frac"] = (r.log_p_rare < 0).mean()
    # These are means over samples of the policy.
    if objective.temperature != 1 or data.rollout.weights_step is not None:
        del out["tb/elbo"], out["tb/ess"]
    return out


def _in_order(
    minibatches: list[Minibatch], stats: list[TrajectoryStats], has_log_z: bool
) -> TrajectoryStats:
    """Statistics of all updates, `[S]`; without a log Z, that of each prompt's samples."""
    where = [m.placement for m in minibatches]
    join = lambda *x: np.concatenate(list(map(packing.from_segments, x, where)))
    r = jax.tree.map(join, *stats)
    if not has_log_z:
        means = mean_by_prompt(r.residual, r.prompt_index)
        r = r._replace(log_z=-means, residual=r.residual - means)
    return r


def balance_metrics(r: TrajectoryStats, clip_range: tuple[float, float]) -> dict:
    """Statistics of the residual, and the gap of log Z to each prompt's own estimate."""
    by_prompt = [r.residual[r.prompt_index == q] for q in np.unique(r.prompt_index)]
    num_prompts, several = len(by_prompt), [x for x in by_prompt if len(x) > 1]
    at_clamp = np.isclose(r.weight, clip_range[0]) | np.isclose(r.weight, clip_range[1])
    return {
        "tb/loss": r.loss.mean(),
        "tb/residual_mean": r.residual.mean(),
        "tb/residual_std": r.residual.std() if len(r.residual) > 1 else None,
        "tb/residual_p95_abs": np.quantile(np.abs(r.residual), 0.95),
        "tb/residual_std_within_prompt": np.sqrt(np.mean([x.var() for x in several]))
        if several
        else None,
        "tb/logz_mean": r.log_z.mean(),
        "tb/logz_std": r.log_z.std() if num_prompts > 1 else None,
        "tb/logz_gap": np.mean([abs(x.mean()) for x in by_prompt]),
        "is/w_mean": r.weight.mean(),
        "is/w_at_clamp_frac": at_clamp.mean(),
        "is/keep_frac": r.num_loss_tokens.sum() / r.length.sum(),
    }


def policy_metrics(r: TrajectoryStats) -> dict:
    """Log-probs and entropy of the policy's own samples."""
    n = targets.tokens(r.num_loss_tokens)
    m, m0 = r.log_pf / n, r.log_p_base / n
    return {
        "policy/logp_per_token": m.mean(),
        "base/logp_per_token": m0.mean(),
        "kl/policy_base_per_token": (m - m0).mean(),
        "entropy": r.entropy.sum() / r.length.sum(),
    }


def exponent_metrics(
    r: TrajectoryStats, objective: ObjectiveConfig, is_base: np.ndarray
) -> dict:
    """The power of the base that the policy has, see `exponent`: of all responses of the
    step, and of those that the base has drawn."""
    out = {}
    of = lambda r: exponent(r, at_alpha(objective, r).target)
    out["tb/exponent"], out["tb/exponent_se"] = of(r)
    if is_base.any():
        theirs = of(jax.tree.map(lambda x: x[is_base], r))
        out["tb/exponent_base"], out["tb/exponent_base_se"] = theirs
    return out


def exponent(r: TrajectoryStats, target: Target) -> tuple[float | None, float | None]:
    """Slope of log pi, less the tilt of the target, on log p_0 within prompts: alpha at the
    optimum; and its standard error. Neither is known where no prompt has responses that
    differ in log p_0, and no error of one prompt. The base has 1 where the target is of
    whole sequences.

    Where each prompt has its own alpha it is the slope on alpha log p_0: 1 at the optimum.
    """
    n = r.num_loss_tokens
    wanted = target.log_density(r.log_p_base, n, r.log_z, **tilt(r))
    y = r.log_pf - wanted + target.alpha * r.log_p_base
    x = r.log_p_base * (1 if r.alpha is None else r.alpha)
    x = x - mean_by_prompt(x, r.prompt_index)
    y = y - mean_by_prompt(y, r.prompt_index)
    xx = x @ x
    if not xx:
        return None, None
    slope = x @ y / xx
    by_prompt = np.bincount(r.prompt_index, x * (y - slope * x))
    error = np.sqrt((by_prompt**2).sum()) / xx
    return slope, error if len(np.unique(r.prompt_index)) > 1 else None


def match_metrics(r: TrajectoryStats, target: Target) -> dict:
    r"""How well the policy matches its target, with log Z the mean over each prompt's
    samples, so free of the head's error.

    - `tb/corr_logp_target`, `tb/rank_corr`, `tb/slope`: of log pi on the target's log
      density, within prompts (Pearson, Spearman, least squares), both per token for a
      length-aware target; 1 at the optimum.
    - `tb/elbo`: mean log density - log pi of a sequence; blind to modes that are never
      sampled. Of whole sequences it bounds log Z from below. For a length-aware target it
      is taken at the group estimate of log Z': 0 at the optimum, of either sign before.
    - `tb/ess`: effective sample size, as a fraction, of the prompt's samples with weights
      e^{-residual}, per token for a length-aware target; 1 at the optimum.
    - `tb/inversion_rate`: fraction of a prompt's pairs of different responses that policy
      and target rank the other way round by log-prob; 0 at the optimum.

    Where each prompt has one sample only the bound is known.
    """
    n = r.num_loss_tokens
    log_reward = target.log_reward(r.log_p_base, n, **tilt(r))
    residual = target.residual(r.log_pf, r.log_p_base, n, 0.0, **tilt(r))
    log_z = -mean_by_prompt(residual, r.prompt_index)
    within = residual + log_z
    gap, scale = residual, 1
    density = target.log_density(r.log_p_base, n, log_z, **tilt(r))
    if target.is_length_aware:
        gap, scale = r.length * within, targets.tokens(n)
    policy, wanted = r.log_pf / scale, log_reward / scale
    groups = [r.prompt_index == q for q in np.unique(r.prompt_index)]
    groups = [g for g in groups if g.sum() > 1]
    bound = {"tb/elbo": -gap.mean()}
    if not groups:
        return bound | {"tb/ess": None}
    weights = [np.exp(within[g].min() - within[g]) for g in groups]
    corr, slope = _regression(policy, wanted, r.prompt_index)
    inverted = [_inverted(r.log_pf[g], density[g]) for g in groups]
    pairs = sum(n for _, n in inverted)
    ranks = (_ranks(policy, groups), _ranks(wanted, groups))
    return bound | {
        "tb/corr_logp_target": corr,
        "tb/slope": slope,
        "tb/rank_corr": _regression(*ranks, r.prompt_index)[0],
        "tb/ess": np.mean([w.sum() ** 2 / (len(w) * (w**2).sum()) for w in weights]),
        "tb/inversion_rate": sum(n for n, _ in inverted) / max(pairs, 1),
    }


def mean_by_prompt(x: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    """For each trajectory, the mean over those of its prompt."""
    _, group = np.unique(prompt_index, return_inverse=True)
    return (np.bincount(group, x) / np.bincount(group))[group]


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


def completion_metrics(
    r: TrajectoryStats, finished: np.ndarray, has_box: np.ndarray
) -> dict:
    """Lengths and form of the responses."""
    ended = r.length[finished]
    return {
        "completions/mean_length": r.length.mean(),
        "completions/max_length": r.length.max(),
        "completions/mean_terminated_length": ended.mean() if len(ended) else 0.0,
        "completions/clipped_ratio": 1.0 - finished.mean(),
        "completions/boxed_frac": has_box.mean(),
    }


def repeats_across_prompts(texts: Any) -> float:
    """The fraction of responses, texts `[P][G]`, that another prompt has got too.

    >>> repeats_across_prompts([["yes", "no"], ["yes", "4"]])
    0.5
    """
    prompts_of = collections.Counter(y for of_prompt in texts for y in set(of_prompt))
    return float(np.mean([[prompts_of[y] > 1 for y in of] for of in texts]))


def repetition_metrics(responses: list[np.ndarray]) -> dict:
    """Fractions of token 4-grams that repeat, and of responses that end in a loop."""
    return {
        "repetition/ngram_frac": np.mean([_repeated_ngrams(y) for y in responses]),
        "repetition/loop_frac": np.mean([_ends_in_loop(y) for y in responses]),
    }


def _repeated_ngrams(y: np.ndarray, n: int = 4) -> float:
    if len(y) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(y, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def _ends_in_loop(y: np.ndarray, repeats: int = 4, longest: int = 64) -> bool:
    """Whether the tail is one period of at most `longest` tokens, 4 times over."""
    periods = range(1, min(longest, len(y) // repeats) + 1)
    tails = (y[-n * repeats :].reshape(repeats, n) for n in periods)
    return any((tail == tail[0]).all() for tail in tails)


def rollout_metrics(
    rollout: Rollout, scored: list[np.ndarray], before: int = 0
) -> dict:
    """Differences of the sampler's token log-probs from the scorer's, in nats, where the
    policy after `before` steps has sampled; and the fraction of the sampler's work that produced
    nothing.

    The mean difference estimates the KL divergence of one from the other per token. It is
    of second order in rounding, where the mean distance is of first.
    """
    sampled = rollout.log_probs.reshape(-1, rollout.log_probs.shape[-1])
    is_own = rollout.is_own
    if rollout.weights_step is not None:  # all of a response is by the present weights
        is_own &= (rollout.weights_step == before).all(axis=-1).ravel()
    drawn = zip(scored, sampled, is_own, strict=True)
    gaps = [y[: len(x)] - x for x, y, is_own in drawn if is_own]
    out = {}
    if gaps:
        gaps = np.concatenate(gaps)
        out["rollout/kl"] = gaps.mean()
        out["rollout/logp_gap_mean"] = np.abs(gaps).mean()
        out["rollout/logp_gap_max"] = np.abs(gaps).max()
    if rollout.slot_steps:
        lengths = rollout.lengths.reshape(-1)[rollout.is_own | rollout.is_base]
        number = lengths.sum() if rollout.num_drawn is None else rollout.num_drawn
        out["rollout/waste"] = 1.0 - number / rollout.slot_steps
    return out
