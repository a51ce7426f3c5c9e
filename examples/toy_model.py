r"""The toy task: sums of two-digit numbers, and how a base model of it is made.

    python -m examples.toy_model --out=pfjax/assets/toy

A prompt asks for the sum of two numbers whose units carry, such as ``47+35``. The
base model answers in one of two ways, always ending in a box:

- with probability 0.7 it reasons, ``7+5=12,4+3+1=8;\boxed{82}``: for each digit the
  sum with its carry, then one of two separators at random. Each sum has an incorrect
  last digit with probability 0.2, and an error is carried on.
- else it guesses, ``\boxed{82}``, and drops the carry in 60 % of cases.

A reasoned trace is correct with probability 0.64 and a guess with 0.4, but the
likeliest whole response of most prompts is an incorrect guess, being short. Sharpening
whole sequences therefore collapses onto guesses, and sharpening per token does not:
the effect of the PowerFlow paper, with answers that are known.

The command trains a transformer of 0.14 M parameters on such responses and writes it
as a Hugging Face folder with a tokenizer and chat template, beside prompts for
training and a held-out set for evaluation, neither of which it saw.
"""

import pathlib

import numpy as np
from absl import app, flags

from examples import base_model
from examples.worlds import grammar, sums
from examples.worlds.sums import Problem, all_problems

WORDS = (base_model.BOX_OPEN, "}", *"0123456789+=", *sums.SEPARATORS)
P_GUESS = 0.3
NUM_TRAIN = 1024


def sample_response(problem: Problem, rng: np.random.Generator) -> str:
    """One response of the ideal base model."""
    return grammar.sample(sums.grammar(problem, P_GUESS), rng).text


def split_problems(seed: int) -> base_model.Split:
    return base_model.split(all_problems(), NUM_TRAIN, seed)


def write(out: pathlib.Path, steps: int, batch_size: int, seed: int) -> None:
    """Trains the base model and writes its folder."""
    problems = split_problems(seed)
    task = base_model.Task(problems.fitted, sample_response, WORDS, vocab_size=32)
    policy, tok = base_model.fit(task, steps, batch_size, seed)
    base_model.write(out, policy, tok, problems.train, problems.held_out)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    write(pathlib.Path(_OUT.value), _STEPS.value, _BATCH.value, _SEED.value)
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "folder to write", required=True)
    _STEPS = flags.DEFINE_integer("steps", 3000, "updates")
    _BATCH = flags.DEFINE_integer("batch", 256, "responses an update")
    _SEED = flags.DEFINE_integer("seed", 0, "of problems, responses and parameters")
    app.run(main)
