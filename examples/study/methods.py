"""What the study compares, and what theory says that each ends at.

A method is trained with the settings that `configs/study.py` has under its name. Where its
optimum is known, the distribution that it should end at is written down before training, on
the list of all responses, from what the fitted base says of them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

import pfjax
from examples.exact import Listed
from examples.study.unlisted import Unlisted
from examples.worlds import exact as of_worlds
from examples.worlds.world import World
from pfjax.targets import Target

CANDIDATES = 16  # of best-of-N
# Under which tokens are rare. With it nearly all of a target below alpha 1 can be listed;
# without, as good as nothing (docs/limits.md, Flattening).
ETA_CUTOFF = 0.003


class Base(NamedTuple):
    """A fitted base model of a world, and what it says of all responses to some prompts."""

    world: World
    policy: pfjax.Policy
    rows: list[Listed]
    # Draws what it says beside the lists, for a power.
    draw: Callable[[float], list[Unlisted]] | None = None
    unlisted: list[Unlisted] | None = None  # where a target is to count it


def alpha_of(world: str) -> float:
    """Power that a world is about: it is to be sharpened, or flattened."""
    return 0.5 if world.startswith("stories") else 4.0


# Log density of every response to each prompt, `[n]` arrays. Where what is not listed is to
# count, powers are `[n + m]`: then come its samples, divided by how many of each there are.
Prediction = Callable[[Base, float], list[np.ndarray]]


def power(base: Base, alpha: float, is_length_aware: bool = True) -> list[np.ndarray]:
    """p^alpha, length-aware or of whole sequences; of the lists alone by default. Rare tokens
    keep the power 1."""
    target = Target(alpha, is_length_aware=is_length_aware)
    out = []
    for r, more in zip(base.rows, base.unlisted or base.rows, strict=True):
        log_p0, length, rare = r.log_p0, r.length, r.log_p_rare
        log_q = np.zeros_like(log_p0)
        if base.unlisted is not None:
            log_p0, log_q, length, rare = (
                np.append(*x)
                for x in (
                    (log_p0, more.log_p0),
                    (log_q, more.log_q),
                    (length, more.length),
                    (rare, more.log_p_rare),
                )
            )
        tilt = {"log_q": log_q, "log_p_rare": rare}
        out.append(of_worlds.target_on(log_p0, length, target, **tilt)[1])
    return out


_whole = functools.partial(power, is_length_aware=False)


def tempered(base: Base, alpha: float) -> list[np.ndarray]:
    """Each token at temperature 1 / alpha."""
    problems, texts = [r.problem for r in base.rows], [r.texts for r in base.rows]
    tok = base.policy.tokenizer
    return of_worlds.score(base.policy, tok, problems, texts, 1 / alpha)


def best_of(base: Base, alpha: float, num: int = CANDIDATES) -> list[np.ndarray]:
    """The likeliest of a number of responses: one of this rank or a lower one is drawn each
    time, but not always a lower one."""
    return [_best_of(r.log_p0, num) for r in base.rows]


def _best_of(log_p: np.ndarray, num: int) -> np.ndarray:
    order = np.argsort(log_p)
    p = special.softmax(log_p[order])
    up_to = np.minimum(np.cumsum(p), 1.0)
    out = np.empty_like(log_p)
    out[order] = up_to**num - (up_to - p).clip(0) ** num
    return np.log(out.clip(np.finfo(float).tiny))


def unchanged(base: Base, alpha: float) -> list[np.ndarray]:
    """The base itself."""
    return [r.log_p0 for r in base.rows]


# Hot samples are mostly of what the base hardly ever says: there is more to learn.
_OF_HOT = {"optim.learning_rate": 3e-3}


class Method(NamedTuple):
    title: str  # in the tables
    prediction: Prediction | None = None  # None where it is not known
    target: bool | None = None  # whether its target is length-aware; None without one
    # Arguments of `pfjax sample`, for the responses that it learns from.
    samples: Callable[[float], tuple[str, ...]] | None = None
    settings: Callable[[float], dict[str, float]] = lambda alpha: {}
    reads_answers: bool = False
    can_flatten: bool = True
    sharpens_first: bool = False  # with alpha 2; then returns
    own_alpha: float = 0.0  # instead of the world's

    def alpha(self, world: str) -> float:
        return self.own_alpha or alpha_of(world)

    @property
    def is_power(self) -> bool:
        """Whether it should end at a power of whole responses."""
        return self.prediction in (power, _whole)

    def is_apt(self, world: str) -> bool:
        """Whether it can do what a world is about."""
        return self.can_flatten or alpha_of(world) > 1


TRAINED = {
    "powerflow": Method(
        "PowerFlow",
        power,
        True,
        # When flattening, more updates raise what the base hardly ever says.
        settings=lambda alpha: (
            {} if alpha > 1 else {"updates_per_rollout": 1, "residual_clip": 0.0}
        ),
    ),
    "own_samples": Method("PowerFlow, own samples alone", power, True),
    "tb_traj": Method("trajectory balance, whole sequences", _whole, False),
    "rl_token": Method("policy gradient per token", power, True),
    "rl_traj": Method("policy gradient, whole sequences", _whole, False),
    "flatten_back": Method(
        "PowerFlow, alpha 2, then 1/2",
        unchanged,
        sharpens_first=True,
        can_flatten=False,
    ),
    "self_distillation": Method(
        "sampled at 1/alpha, likelihood (SSD)",
        tempered,
        settings=lambda alpha: (
            {"behavior.base_temperature": 1 / alpha} | (_OF_HOT if alpha < 1 else {})
        ),
    ),
    "power_distillation": Method(
        "SMC on p^alpha, likelihood",
        _whole,
        samples=lambda alpha: (
            "--method=smc",
            f"--alpha={alpha}",
            "--ramp=10",
            *([f"--eta_cutoff={ETA_CUTOFF}"] if alpha < 1 else []),
        ),
    ),
    "best_of_distillation": Method(
        f"best of {CANDIDATES}, likelihood",
        best_of,
        samples=lambda alpha: (
            "--method=best_of",
            f"--candidates={CANDIDATES}",
            "--slots=1024",
        ),
        can_flatten=False,
    ),
    "grpo": Method("GRPO, with answers", reads_answers=True, can_flatten=False),
    "ttrl": Method("majority (TTRL)", can_flatten=False),
    "empo": Method("clusters (EMPO)", can_flatten=False),
    "intuitor": Method("self-certainty (Intuitor)", can_flatten=False),
    "entropy_sequence": Method(
        "log-prob of the response (EM-RL-sequence)", can_flatten=False
    ),
    "entropy_token": Method("entropy of tokens (EM-RL-token)", can_flatten=False),
    "random": Method("a coin as reward", unchanged, can_flatten=False),
    **{
        f"alpha_{alpha:g}": Method(
            f"PowerFlow, alpha {alpha:g}",
            power,
            True,
            can_flatten=False,
            own_alpha=alpha,
        )
        for alpha in (0.5, 2.0, 8.0)
    },
}
# Of the base, without training: exact.
UNTRAINED = {
    "base": Method("base", unchanged),
    "temperature": Method("temperature 1/alpha", tempered),
    "best_of": Method(
        f"the likeliest of {CANDIDATES} samples", best_of, can_flatten=False
    ),
    "whole": Method("p^alpha, whole sequences", _whole),
    "target": Method("p^alpha, length-aware: PowerFlow's target", power),
}
MAIN = ("powerflow", "tb_traj", "self_distillation", "grpo", "empo")
