r"""How far a policy is from its target, exactly, where all responses can be listed.

    python -m examples.exact runs/smoke --alpha=4
    python -m examples.exact runs/mine --world=sums --base=runs/sums --alpha=2

The folder is a run's or a model's in Hugging Face format, trained from the world's base;
the toy's is `pfjax/toy`. Policy and base score every response that the generator may give to
a prompt, 402 on the toy, and the sums that `pfjax.evaluation.match` estimates from samples
are taken over this list. What a model says beside it is one cell more, which the target
lacks: right for alpha of 1 and more, as the base says little there (its mass listed is
printed), and no response of it is likely.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import pfjax
from examples import toy_model, worlds
from examples.worlds import exact, sums
from examples.worlds.grammar import Response
from examples.worlds.world import World
from pfjax.evaluation import match
from pfjax.objectives import OBJECTIVES, ObjectiveConfig
from pfjax.targets import Target

_TOY = World(
    "toy",
    sums.all_problems,
    functools.partial(sums.grammar, p_guess=toy_model.P_GUESS),
    alphas=(4.0,),
    temperatures=(0.25,),
    num_train=toy_model.NUM_TRAIN,
)
WORLDS = {_TOY.name: _TOY} | {
    w.name: w for w in worlds.WORLDS.values() if w.is_listable
}


class Match(NamedTuple):
    """A policy and its target, on the responses to one prompt, or means over prompts."""

    base_mass: float  # that is listed
    policy_mass: float
    log_z: float  # at which the target sums to 1, in nats per token (or per response)
    total_variation: float
    kl_policy_target: float  # nats per response, of the policy given that it is listed
    kl_target_policy: float
    exponent: (
        float  # slope of log pi, less the target's tilt, on log p_0 by the base's mass
    )
    exponent_target: float  # the same by the target's mass
    inversion_rate: (
        float  # of the policy's pairs, that policy and target order differently
    )
    base_accuracy: float  # nothing that is not listed counts as correct
    policy_accuracy: float
    target_accuracy: float


def list_responses(problem: sums.Problem) -> list[Response]:
    """All responses of the toy task to a problem, with the generator's probabilities."""
    return _TOY.responses(problem)


def measure(
    log_p0: np.ndarray,
    log_pi: np.ndarray,
    length: np.ndarray,
    target: Target,
    is_correct: np.ndarray,
    reward: np.ndarray | float = 0.0,
    log_p_rare: np.ndarray | None = None,
) -> Match:
    """Compares a policy with its target on all responses to one prompt.

    Args:
      log_p0, log_pi: `[n]` log-probs of base and policy, in nats per response.
      length: `[n]` tokens, the stop token included.
      target: what the policy was trained toward; psi is 0 for all responses of a world.
      is_correct: `[n]`.
      reward, log_p_rare: `[n]`, see `Target.log_reward`.
    """
    tilt = {"reward": reward, "log_p_rare": log_p_rare}
    log_z, log_p = exact.target_on(log_p0, length, target, **tilt)
    base, policy, wanted = np.exp(log_p0), np.exp(log_pi), np.exp(log_p)
    mass, gap = policy.sum(), log_pi - log_p
    # What the slope is of: alpha log p_0 where policy and target agree.
    power = gap + target.alpha * log_p0
    slope = lambda weight: match.slope(power[None], log_p0[None], weight[None])[0]
    return Match(
        base_mass=base.sum(),
        policy_mass=mass,
        log_z=log_z,
        total_variation=0.5 * (np.abs(policy - wanted).sum() + max(1 - mass, 0.0)),
        kl_policy_target=policy @ gap / mass - np.log(mass),
        kl_target_policy=-(wanted @ gap),
        exponent=slope(base),
        exponent_target=slope(wanted),
        inversion_rate=inversion_rate(log_pi, log_p),
        base_accuracy=base @ is_correct,
        policy_accuracy=policy @ is_correct,
        target_accuracy=wanted @ is_correct,
    )


def inversion_rate(log_pi: np.ndarray, log_p: np.ndarray) -> float:
    """Of two samples of the policy that it and the target rank, the fraction that they
    rank the other way round: what `tb/inversion_rate` estimates."""
    order = lambda x: np.sign(x[:, None] - x)
    both = order(log_pi) * order(log_p)
    pairs = np.exp(log_pi[:, None] + log_pi)
    ranked = pairs[both != 0].sum()
    return pairs[both < 0].sum() / ranked if ranked else 0.0


class Listed(NamedTuple):
    """All responses to a problem, and what the base says of them; arrays `[n]`."""

    problem: Any
    texts: list[str]
    length: np.ndarray
    is_correct: np.ndarray
    log_p0: np.ndarray
    log_p_rare: np.ndarray | None = None  # of rare tokens, if some are to be


def listed(
    world: World,
    base: pfjax.Policy,
    problems: Sequence[Any],
    eta_cutoff: float = 0.0,
) -> list[Listed]:
    """Lists the responses to problems of a world and has the base score them; and their rare
    tokens, with a cutoff."""
    found = [world.responses(p) for p in problems]
    texts = [[r.text for r in responses] for responses in found]
    asked = (base, base.tokenizer, problems, texts)
    rare = exact.score_rare(*asked, eta_cutoff) if eta_cutoff else [None] * len(texts)
    return [
        Listed(
            problem,
            mine,
            np.array([r.length for r in responses]),
            np.array([r.is_correct for r in responses]),
            log_p0,
            log_p_rare,
        )
        for problem, mine, responses, log_p0, log_p_rare in zip(
            problems, texts, found, exact.score(*asked), rare, strict=True
        )
    ]


def measure_all(
    policy: pfjax.Policy, base: pfjax.Policy, rows: Sequence[Listed], target: Target
) -> list[Match]:
    """Compares a policy with its target on each problem; the base lends its tokenizer.

    A reward in the target is a verifier: 0 for a correct response, -1 for any other.
    """
    asked = [r.problem for r in rows], [r.texts for r in rows]
    scores = exact.score(policy, base.tokenizer, *asked)
    return [
        measure(
            *(r.log_p0, log_pi, r.length, target, r.is_correct),
            *(verifier(r.is_correct), r.log_p_rare),
        )
        for r, log_pi in zip(rows, scores, strict=True)
    ]


def verifier(is_correct: np.ndarray) -> np.ndarray:
    return is_correct - 1.0


def mean(rows: Sequence[Match]) -> Match:
    return Match(*np.mean(rows, axis=0).tolist())


_COLUMNS = (
    "base mass", "policy mass", "log Z", "TV", "KL(pi,p)", "KL(p,pi)", "exponent",
    "by target", "inverted", "base acc", "policy acc", "target acc",
)  # fmt: skip


def table(prompts: Sequence[str], rows: Sequence[Match]) -> str:
    """In Markdown: a row per prompt, and the means."""
    lines = [f"| prompt | {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * len(_COLUMNS)]
    for name, row in zip([*prompts, "mean"], [*rows, mean(rows)], strict=True):
        cells = (f"{x:{max(len(c), 6)}.4f}" for c, x in zip(_COLUMNS, row, strict=True))
        lines.append(f"| {name:6} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _model_in(folder: str) -> str:
    """The trained model of a run's folder; another name as it is."""
    path = pathlib.Path(folder)
    return str(path / "hf") if (path / "metrics.jsonl").is_file() else folder


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit(f"error: name one folder of a run or a model; got {argv[1:]}")
    world = WORLDS[_WORLD.value]
    problems = world.problems()[1][: _PROMPTS.value]
    target = ObjectiveConfig(
        _OBJECTIVE.value, _ALPHA.value, beta=_BETA.value, reward="accuracy"
    ).target
    try:
        policy, base = (pfjax.load(x) for x in (_model_in(argv[1]), _BASE.value))
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = listed(world, base, problems, _ETA_CUTOFF.value)
    rows = measure_all(policy, base, found, target)
    if _JSON.value:
        print(json.dumps(mean(rows)._asdict()))
    else:
        print(table([p.prompt for p in problems], rows))


if __name__ == "__main__":
    _ALPHA = flags.DEFINE_float("alpha", 4.0, "power of the base", lower_bound=0)
    _BETA = flags.DEFINE_float("beta", 0.0, "nats that an incorrect response costs")
    about = "under which tokens are rare, as in training"
    _ETA_CUTOFF = flags.DEFINE_float("eta_cutoff", 0.0, about, lower_bound=0)
    _OBJECTIVE = flags.DEFINE_enum(
        "objective", "powerflow", list(OBJECTIVES), "whose target it is"
    )
    _PROMPTS = flags.DEFINE_integer("prompts", 12, "held-out ones", lower_bound=1)
    _WORLD = flags.DEFINE_enum("world", "toy", list(WORLDS), "where responses are from")
    _BASE = flags.DEFINE_string(
        "base", "pfjax/toy", "model that the target is a power of"
    )
    _JSON = flags.DEFINE_bool("json", False, "print the means alone, as JSON")
    app.run(main)
