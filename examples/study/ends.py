"""Where a run ended, and where theory says that it should: both by listing all responses."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

import pfjax
from examples import exact
from examples.study import methods, unlisted
from examples.study.methods import Base, Method
from examples.study.unlisted import Unlisted
from examples.worlds import exact as of_worlds
from pfjax.infra import dataset_io
from pfjax.targets import Target

NUM_SAMPLES = 16  # of which different ones are counted
# Before the names of values: on training prompts; of a target that counts what is not listed.
TRAIN, ALL = "train/", "all/"


def measure(policy: pfjax.Policy, base: Base, method: Method) -> dict[str, float]:
    """What a policy says to the base's prompts, by listing all responses."""
    asked = [r.problem for r in base.rows], [r.texts for r in base.rows]
    log_pi = of_worlds.score(policy, base.policy.tokenizer, *asked)
    out, alpha = _values(base, log_pi), method.alpha(base.world.name)
    if method.prediction:
        wanted = method.prediction(base, alpha)
        found = [_distances(*x) for x in zip(log_pi, wanted, strict=True)]
        names = ("total_variation", "kl_policy_target", "kl_target_policy")
        out |= dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))
    if method.target is not None:
        target = Target(alpha, is_length_aware=method.target)
        rows = zip(base.rows, log_pi, strict=True)
        found = [
            exact.measure(r.log_p0, x, r.length, target, r.is_correct) for r, x in rows
        ]
        out["exponent"] = exact.mean(found).exponent
    return out


def predict(base: Base, method: Method) -> dict[str, float] | None:
    """The same of what a method should end at; None if that is not known. Of powers it is of
    the lists alone, and under `all/...`, with their standard errors, of all responses."""
    if method.prediction is None:
        return None
    alpha = method.alpha(base.world.name)
    out = _values(base, method.prediction(base, alpha))
    if method.is_power and base.draw:
        drawn = base.draw(alpha)

        def of_all(rest: list[Unlisted]) -> dict[str, float]:
            log_p = method.prediction(base._replace(unlisted=rest), alpha)
            return _values(base, log_p, rest)

        # A jackknife: each group of samples is left out in turn.
        groups = range(unlisted.GROUPS)
        parts = [of_all([x.without(group) for x in drawn]) for group in groups]
        for key, value in of_all(drawn).items():
            spread = float(np.std([part[key] for part in parts]))
            error = spread * math.sqrt(len(groups) - 1)
            out |= {f"{ALL}{key}": value, f"{ALL}{key}_se": error}
    return out


def _values(
    base: Base,
    log_p: Sequence[np.ndarray],
    rest: Sequence[Unlisted] | None = None,
) -> dict[str, float]:
    """Means over prompts of a distribution over responses.

    Args:
      base: of a world, with the lists.
      log_p: see `methods.Prediction`.
      rest: samples of what is not listed; without them that is incorrect, and lengths are
        of what is listed.
    """
    is_answer = methods.alpha_of(base.world.name) > 1
    rows = []
    for i, (r, p) in enumerate(zip(base.rows, map(np.exp, log_p), strict=True)):
        p, beside = np.split(p, [len(r.log_p0)])
        row = {
            "accuracy": p @ r.is_correct,
            "distinct": np.sum(1 - (1 - p) ** NUM_SAMPLES),
            "distinct_correct": np.sum(1 - (1 - p[r.is_correct]) ** NUM_SAMPLES),
            "length": p @ r.length,
            "listed": p.sum(),
        }
        if len(beside):
            row["accuracy"] += is_answer * (beside @ rest[i].is_correct)
            row["length"] += beside @ rest[i].length
        row["length"] /= p.sum() + beside.sum()
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def with_samples(
    found: dict[str, float], rows: Sequence[dict[str, Any]], base: Base
) -> dict[str, float]:
    """Accuracy and length of all responses: of those that are not listed, estimated from
    such ones among samples. A story that is not listed is not valid."""
    texts = {row.problem.prompt: {*row.texts} for row in base.rows}
    rest = [
        row
        for row in rows
        if not (row["terminated"] and row["completion"] in texts[row["prompt"]])
    ]
    listed = found["listed"]
    if not rest:  # what there is of it is too little to matter
        return {}
    mean = lambda key: (1 - listed) * float(np.mean([row[key] for row in rest]))
    is_answer = methods.alpha_of(base.world.name) > 1
    return {
        "accuracy": found["accuracy"] + is_answer * mean("correct"),
        "length": found["length"] * listed + mean("tokens"),
    }


def _distances(log_p: np.ndarray, log_q: np.ndarray) -> tuple[float, float, float]:
    """Total variation, where what is not listed is one cell more, and both KL divergences
    given that a response is listed, in nats."""
    p, q = np.exp(log_p), np.exp(log_q)
    p_all, q_all = p.sum(), q.sum()
    gap = log_p - log_q - np.log(p_all / q_all)
    total_variation = 0.5 * (np.abs(p - q).sum() + abs(p_all - q_all))
    return total_variation, p @ gap / p_all, -(q @ gap) / q_all


def on_the_way(folder: pathlib.Path, base: Base) -> dict[str, float]:
    """Tokens of all responses, and whether an evaluation was below the base: by more than
    two standard errors."""
    rows = dataset_io.read_jsonl(folder / "metrics.jsonl")
    tokens = sum(row.get("num_tokens", 0) for row in rows)
    accuracy = _values(base, [r.log_p0 for r in base.rows])["accuracy"]
    fell = False
    for row in rows:
        name = next((k for k in row if k.startswith("eval/avg@")), "")
        name = name.removesuffix("_se")
        if name and row["step"]:
            fell |= row[name] + 2 * row[f"{name}_se"] < accuracy
    return {"tokens": tokens, "fell_below_base": float(fell)}
