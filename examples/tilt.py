r"""What a little reward adds: accuracy over alpha and beta, exact and trained, on the toy.

    python -m examples.tilt                     # exact, in seconds
    python -m examples.tilt --out=runs/tilt     # trains the points too, a minute or two each

The target is p_0^alpha e^{beta r - lambda |y|} with a verifier r, 0 for a correct response
and -1 for any other: with beta = 0 no label is read, else an incorrect response costs beta
nats. The same command goes on where it was stopped.
"""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import app, flags

import pfjax
from examples import exact
from examples.exact import Listed, Match
from examples.worlds import exact as of_worlds
from pfjax.targets import Target

ALPHAS, BETAS = (1.0, 2.0, 4.0), (0.0, 1.0, 3.0, 8.0)
# Of the exact surface, which is cheap.
MORE_ALPHAS, MORE_BETAS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0), (0, 0.5, 1, 2, 3, 5, 8)


def verifier(completions: Sequence[str], answer: Sequence[str], **_) -> list[float]:
    """0 with the answer in the box, else -1."""
    pairs = zip(completions, answer, strict=True)
    return [float(f"\\boxed{{{gold}}}" in text) - 1 for text, gold in pairs]


def target_accuracy(rows: Sequence[Listed], alpha: float, beta: float) -> float:
    """Mean accuracy of the target."""
    found = []
    for r in rows:
        reward = exact.verifier(r.is_correct)
        _, log_p = of_worlds.target_on(r.log_p0, r.length, Target(alpha, beta), reward)
        found.append(np.exp(log_p) @ r.is_correct)
    return float(np.mean(found))


def surface(
    rows: Sequence[Listed], alphas: Sequence[float], betas: Sequence[float]
) -> str:
    """Accuracy of targets, in Markdown."""
    return _table(alphas, betas, lambda *point: f"{target_accuracy(rows, *point):.3f}")


def _table(alphas, betas, cell) -> str:
    lines = [
        f"| alpha | {' | '.join(f'beta {b:g}' for b in betas)} |",
        "|---|" + "---:|" * len(betas),
    ]
    for a in alphas:
        lines.append(f"| {a:g} | {' | '.join(cell(a, b) for b in betas)} |")
    return "\n".join(lines)


def train(folder: pathlib.Path, alpha: float, beta: float, steps: int) -> pfjax.Policy:
    """The smoke run toward one target; the verifier is asked where beta is above 0."""
    values = {
        "alpha": alpha,
        "beta": beta,
        "num_steps": steps,
        "data.train": "pfjax/toy/train_answered.jsonl",
        "data.eval": "",
        "optim.log_z_learning_rate": 1e-2,
        "updates_per_rollout": 1,
        "residual_clip": 0.0,
    }
    config = pfjax.recipe("smoke", **values)
    return pfjax.fine_tune(config, folder, reward=verifier if beta else None)


def points(
    out: pathlib.Path, rows: Sequence[Listed], base: pfjax.Policy, steps: int
) -> dict[tuple[float, float], Match]:
    """Trains and measures the points that `out` lacks; returns all."""
    found = {}
    for alpha, beta in itertools.product(ALPHAS, BETAS):
        folder = out / f"{alpha:g}_{beta:g}"
        file = folder / "exact.json"
        if not file.exists():
            policy = train(folder, alpha, beta, steps)
            of_prompts = exact.measure_all(policy, base, rows, Target(alpha, beta))
            file.write_text(
                json.dumps(exact.mean(of_prompts)._asdict()) + "\n", "utf-8"
            )
        found[alpha, beta] = Match(**json.loads(file.read_text("utf-8")))
    return found


def trained(found: Mapping[tuple[float, float], Match]) -> str:
    """Accuracy of target and policy, and their total variation, in Markdown."""

    def cell(alpha: float, beta: float) -> str:
        m = found[alpha, beta]
        return (
            f"{m.target_accuracy:.3f} {m.policy_accuracy:.3f} ({m.total_variation:.3f})"
        )

    return _table(ALPHAS, BETAS, cell)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    base, world = pfjax.load("pfjax/toy"), exact.WORLDS["toy"]
    rows = exact.listed(world, base, world.problems()[1][: _PROMPTS.value])
    if _OUT.value:
        found = points(pathlib.Path(_OUT.value), rows, base, _STEPS.value)
        print(f"target, trained (total variation):\n{trained(found)}\n")
    print(f"target:\n{surface(rows, MORE_ALPHAS, MORE_BETAS)}")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "folder of runs; none: exact values alone")
    _STEPS = flags.DEFINE_integer("steps", 200, "of each run", lower_bound=1)
    _PROMPTS = flags.DEFINE_integer("prompts", 64, "held-out ones", lower_bound=1)
    app.run(main)
