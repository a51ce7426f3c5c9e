r"""A target of your own: whole sequences sharpened, and a bonus for those that reason.

    python -m examples.own_target

Sharpening whole sequences favours the toy model's guesses, which are short. Here a bonus in
nats for a length that only reasoning has more than makes up for it. A target is one method,
`log_reward`; an objective that has it is trained from Python, as here, or by its file,
`--config.objective=examples/own_target.py:REASONED`, and the samplers and the metrics of the
match (`tb/...`) read it too. Takes about a minute on a laptop.
"""

import tempfile

import numpy as np

import pfjax
from pfjax import objectives
from pfjax.sampler import smc
from pfjax.targets import Target

PROMPTS = [f"{a}+{b}" for a in (17, 28, 39, 46) for b in (25, 36, 47, 58)]
NEW_TOKENS = 24


class Reasoned(Target):
    """p_0(y)^alpha e^{bonus [|y| > 10]}, of whole sequences."""

    BONUS = 2.0

    def log_reward(self, log_p_base, length, **tilt):
        return self.alpha * log_p_base + self.BONUS * (length > 10)


def make_target(config: objectives.ObjectiveConfig) -> Target:
    return Reasoned(config.alpha, has_format=False, is_length_aware=False)


REASONED = objectives.Objective(objectives.balance, make_target, log_z="group")


def fraction_long(lengths) -> float:
    return float(np.mean(lengths > 10))


def main() -> None:
    base = pfjax.load("pfjax/toy")
    drawn = pfjax.rollout(base, PROMPTS, 32, NEW_TOKENS)
    print(f"base: {fraction_long(drawn.lengths):.2f} of the responses reason")
    # Draws the target without training, at many times the cost.
    target = Reasoned(2.0, has_format=False, is_length_aware=False)
    exact, _ = smc.sequential_monte_carlo(
        base, drawn.prompts, target, 32, NEW_TOKENS, particles=64, ramp=8
    )
    print(f"target, by sequential Monte Carlo: {fraction_long(exact.lengths):.2f}")
    config = pfjax.recipe(
        "smoke",
        alpha=2.0,
        num_steps=40,
        **{"data.eval": ""},
    )

    def show(step, metrics):
        if step % 8 == 0:
            match = metrics["tb/corr_logp_target"]
            print(f"step {step:2}  loss {metrics['tb/loss']:.3f}  match {match:.3f}")

    with tempfile.TemporaryDirectory() as workdir:
        policy = pfjax.fine_tune(config, workdir, show, objective=REASONED)
    drawn = pfjax.rollout(policy, PROMPTS, 32, NEW_TOKENS)
    print(f"trained: {fraction_long(drawn.lengths):.2f} of the responses reason")


if __name__ == "__main__":
    main()
