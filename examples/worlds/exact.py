"""Exact values of a world: of its generator, and of a base model fitted to it.

What a target says of a model is a sum over responses. Where they can be listed it is that
sum, over all that the generator may say; what else the model says is `leak`. Where they
are too many, it is estimated from exact samples of the same target of the generator,
weighted by what the model says of them: the two are close, so the weights are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, special

import pfjax
from examples.worlds import grammar as grammars
from examples.worlds.grammar import Grammar, Response
from examples.worlds.world import World
from pfjax.model import scoring, tokenizer
from pfjax.targets import Target

NUM_SAMPLES = 16  # of which different correct ones are counted
_DRAWN = 64  # responses per prompt where they cannot be listed


class Method(NamedTuple):
    """A way to sharpen or flatten: a temperature, or a power of responses."""

    name: str
    temperature: float = 1.0
    alpha: float = 1.0
    is_length_aware: bool = False

    def of(self, grammar: Grammar) -> tuple[float, Grammar]:
        """log Z', and what the method makes of a grammar."""
        if self.temperature != 1:
            return 0.0, grammars.tempered(grammar, self.temperature)
        if self.is_length_aware:
            return grammars.length_aware(grammar, self.alpha)
        return 0.0, grammars.tilted(grammar, self.alpha)[1]


class Row(NamedTuple):
    """Means over problems."""

    method: str
    accuracy: float
    distinct: float  # different correct responses of 16; NaN where none are listed
    length: float
    length_std: float  # within a problem
    log_z: float  # in nats per token; 0 but for length-aware targets


class Distance(NamedTuple):
    """Of a model from the generator, means over problems."""

    kl: float  # KL(generator || model), in nats per response
    leak: float  # what the model says that the generator does not; NaN if not listed


def methods(world: World) -> list[Method]:
    found = [Method("base")]
    found += [Method(f"temperature {t:g}", temperature=t) for t in world.temperatures]
    for alpha in world.alphas:
        found.append(Method(f"p^{alpha:g}, whole sequences", alpha=alpha))
        name = f"p^{alpha:g}, length-aware"
        found.append(Method(name, alpha=alpha, is_length_aware=True))
    return found


def of_generator(world: World, problems: Sequence[Any]) -> list[Row]:
    """The ideal base: by dynamic programming."""
    rows = []
    for method in methods(world):
        made = [method.of(world.grammar(p)) for p in problems]
        distinct = [
            grammars.distinct_correct(g, NUM_SAMPLES) if world.is_listable else math.nan
            for _, g in made
        ]
        values = [(*grammars.summary(g), z) for z, g in made]
        rows.append(_row(method, values, distinct))
    return rows


def of_model(
    world: World, problems: Sequence[Any], policy: pfjax.Policy, tok: Any, seed: int = 0
) -> tuple[list[Row], Distance]:
    """A base model that was fitted to a world."""
    rng = np.random.default_rng(seed)
    support, scores, rows = {}, {}, []
    for method in methods(world):
        # Lists are the same for all methods, and scored once per temperature.
        key = method.temperature if world.is_listable else method
        if key not in support:
            support[key] = [_support(world, method, p, rng) for p in problems]
            texts = [[r.text for r in s.responses] for s in support[key]]
            scores[key] = score(policy, tok, problems, texts, method.temperature)
        pairs = list(zip(support[key], scores[key], strict=True))
        values, distinct = zip(*(_value(method, *x) for x in pairs), strict=True)
        rows.append(_row(method, values, distinct))
        if method.name == "base":
            distance = Distance(*np.mean([_distance(*x) for x in pairs], axis=0))
    return rows, distance


class _Support(NamedTuple):
    """Responses to a problem that a sum runs over."""

    responses: list[Response]
    log_q: np.ndarray  # expected number of times that each is here; 0 for lists
    is_list: bool


def _support(
    world: World, method: Method, problem: Any, rng: np.random.Generator
) -> _Support:
    if world.is_listable:
        listed = world.responses(problem)
        return _Support(listed, np.zeros(len(listed)), True)
    grammar = method.of(world.grammar(problem))[1]
    drawn = [grammars.sample(grammar, rng) for _ in range(_DRAWN)]
    log_q = np.log([r.probability for r in drawn]) + math.log(_DRAWN)
    return _Support(drawn, log_q, False)


def score(
    policy: pfjax.Policy,
    tok: Any,
    problems: Sequence[Any],
    texts: Sequence[Sequence[str]],
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """log p of each text of each problem, each token sampled at a temperature."""
    how = functools.partial(pfjax.score, temperature=temperature)
    return _sums(how, policy, tok, problems, texts)


def score_rare(
    policy: pfjax.Policy,
    tok: Any,
    problems: Sequence[Any],
    texts: Sequence[Sequence[str]],
    eta_cutoff: float,
) -> list[np.ndarray]:
    """The part of `score` that is of rare tokens."""
    how = functools.partial(scoring.rare_log_probs, eta_cutoff=eta_cutoff)
    return _sums(how, policy, tok, problems, texts)


def _sums(
    of_tokens: Callable[..., list[np.ndarray]],
    policy: pfjax.Policy,
    tok: Any,
    problems: Sequence[Any],
    texts: Sequence[Sequence[str]],
) -> list[np.ndarray]:
    prompts = [tokenizer.encode_prompt(tok, p.prompt) for p in problems]
    sequences, starts = [], []
    for prompt, mine in zip(prompts, texts, strict=True):
        for text in mine:
            sequences.append(prompt + tok.encode(text) + [tok.eos_token_id])
            starts.append(len(prompt))
    sums = np.array([x.sum(dtype=float) for x in of_tokens(policy, sequences, starts)])
    return np.split(sums, np.cumsum([len(mine) for mine in texts])[:-1])


def target_on(
    log_p0: np.ndarray,
    length: np.ndarray,
    target: Target,
    reward: np.ndarray | float = 0.0,
    log_q: np.ndarray | float = 0.0,
    log_p_rare: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """log Z at which a target sums to 1 over a list, and its log density there, `[n]`.

    Args:
      log_p0: `[n]`, of the base; in nats per response.
      length: `[n]` tokens, the stop token included.
      target: its psi is 0 for all responses.
      reward, log_p_rare: `[n]`, see `Target.log_reward`.
      log_q: of samples in the place of a list, the expected number of each; the density is
        then divided by it.
    """
    scale = length if target.is_length_aware else np.ones_like(length)
    tilt = {"reward": reward, "log_p_rare": log_p_rare}
    log_r = target.log_density(log_p0, length, 0.0, **tilt) - log_q
    excess = lambda log_z: special.logsumexp(log_r - log_z * scale)
    # One term is 1 at the one end, all are at most 1/n at the other; the margin is for
    # lists of one.
    low, high = (log_r / scale).max(), ((log_r + np.log(len(log_r))) / scale).max()
    log_z = optimize.brentq(excess, low - 1e-6, high + 1e-6, xtol=1e-12)
    return log_z, log_r - log_z * scale


def _value(
    method: Method, support: _Support, log_p: np.ndarray
) -> tuple[tuple[float, ...], float]:
    """Accuracy, length, its deviation and log Z'; and distinct correct responses."""
    length = np.array([r.length for r in support.responses])
    is_correct = np.array([r.is_correct for r in support.responses])
    if method.alpha == 1:
        log_z, w = 0.0, np.exp(log_p - support.log_q)
        # What a model says beside the list is incorrect.
        normalised = w / w.sum()
        w = w if support.is_list else normalised
    else:  # the list's alone
        target = Target(method.alpha, is_length_aware=method.is_length_aware)
        log_z, log_w = target_on(log_p, length, target, log_q=support.log_q)
        w = normalised = np.exp(log_w)
    mean = normalised @ length
    std = math.sqrt(normalised @ (length - mean) ** 2)
    distinct = np.sum(1 - (1 - w[is_correct]) ** NUM_SAMPLES)
    return (
        (w @ is_correct, mean, std, log_z if method.is_length_aware else 0.0),
        distinct if support.is_list else math.nan,
    )


def _distance(support: _Support, log_p: np.ndarray) -> tuple[float, float]:
    log_true = np.log([r.probability for r in support.responses])
    if support.is_list:
        return np.exp(log_true) @ (log_true - log_p), 1 - np.exp(log_p).sum()
    return np.mean(log_true - log_p), math.nan


def _row(method: Method, values: Sequence, distinct: Sequence[float]) -> Row:
    accuracy, length, length_std, log_z = np.mean(values, axis=0)
    return Row(method.name, accuracy, np.mean(distinct), length, length_std, log_z)


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = [
        "| method | accuracy | distinct correct of 16 | length | its deviation | log Z' |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        distinct = "" if math.isnan(r.distinct) else f"{r.distinct:.2f}"
        log_z = f"{r.log_z:.3f}" if r.log_z else ""
        lines.append(
            f"| {r.method} | {r.accuracy:.3f} | {distinct} | {r.length:.1f} "
            f"| {r.length_std:.1f} | {log_z} |"
        )
    return "\n".join(lines)
