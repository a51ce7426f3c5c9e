"""Worlds whose exact answers are known.

    python -m examples.worlds sums --exact                # of the generator
    python -m examples.worlds sums --out=runs/sums        # fits a base model
    python -m examples.worlds sums --exact --out=runs/sums    # also of that base model

Values are of the held-out prompts. A base of 1,500 steps takes minutes on two cores.
"""

import pathlib
import sys

from absl import app, flags

import pfjax
from examples.worlds import WORLDS, exact
from pfjax.model import tokenizer

_OUT = flags.DEFINE_string("out", None, "folder of the base model and of prompts")
_EXACT = flags.DEFINE_bool("exact", False, "print exact values, and train nothing")
_STEPS = flags.DEFINE_integer("steps", None, "of fitting; default: the world's")
_SEED = flags.DEFINE_integer("seed", 0, "of problems, responses and parameters")


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in WORLDS:
        sys.exit(f"error: name one world of {', '.join(WORLDS)}; got {argv[1:]}")
    world, out = WORLDS[argv[1]], _OUT.value
    if not out and not _EXACT.value:
        sys.exit(
            "error: say where to write with --out=DIR, or --exact for values alone"
        )
    if not _EXACT.value:
        world.make(out, _STEPS.value, _SEED.value)
        print(f"wrote {out}")
        return
    _, held_out = world.problems(_SEED.value)
    print(
        f"{world.name}, the generator:\n{exact.table(exact.of_generator(world, held_out))}"
    )
    if out and pathlib.Path(out).exists():
        policy, tok = pfjax.load(out), tokenizer.load(out)
        rows, distance = exact.of_model(world, held_out, policy, tok)
        print(f"\n{out}:\n{exact.table(rows)}")
        print(f"\nKL(generator, model) {distance.kl:.4f} nats per response")
        print(f"said beside the generator's responses: {distance.leak:.4f}")


if __name__ == "__main__":
    app.run(main)
