"""A world: problems, a grammar of responses to each, and a base model fitted to it."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from examples import base_model
from examples.worlds import grammar as grammars
from examples.worlds.grammar import Grammar, Response

# One vocabulary, for all worlds.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (base_model.BOX_OPEN, "}", *"0123456789", *"+-=,;:!<>", *LETTERS)
VOCAB_SIZE = 64


@dataclasses.dataclass(frozen=True)
class World:
    """A task whose exact answers are known.

    Problems have a `prompt` and an `answer`: what a correct response has in its box.
    """

    name: str
    all_problems: Callable[[], list[Any]]
    grammar: Callable[[Any], Grammar]  # the base's distribution over responses
    alphas: Sequence[float]  # for the table of exact values
    temperatures: Sequence[float]
    is_listable: bool = True  # whether a prompt's responses are few enough to list
    num_train: int = 1024
    max_tokens: int = 32  # of a prompt and its response
    steps: int = 1500  # of fitting the base model
    batch_size: int = 128

    def split(self, seed: int = 0) -> base_model.Split:
        """Problems for fitting the base model, for training, and held out: disjoint."""
        return base_model.split(self.all_problems(), self.num_train, seed)

    def problems(self, seed: int = 0) -> tuple[list[Any], list[Any]]:
        """Returns problems for training and held-out ones."""
        return self.split(seed)[1:]

    def responses(self, problem: Any) -> list[Response] | None:
        """All responses to a problem; None where they are too many."""
        return grammars.responses(self.grammar(problem)) if self.is_listable else None

    def sample(self, problem: Any, rng: np.random.Generator) -> str:
        """Draws the text of a response from the grammar."""
        return grammars.sample(self.grammar(problem), rng).text

    def make(
        self, out: str | pathlib.Path, steps: int | None = None, seed: int = 0
    ) -> None:
        """Fits the base model; writes a Hugging Face folder, and prompts beside it."""
        split = self.split(seed)
        of_problem = {p: self.grammar(p) for p in split.fitted}
        task = base_model.Task(
            split.fitted,
            lambda problem, rng: grammars.sample(of_problem[problem], rng).text,
            WORDS,
            VOCAB_SIZE,
            self.max_tokens,
            pack_length=max(64, self.max_tokens),
        )
        steps = self.steps if steps is None else steps
        policy, tok = base_model.fit(task, steps, self.batch_size, seed)
        base_model.write(pathlib.Path(out), policy, tok, split.train, split.held_out)
