"""The reward of a target that is drawn from, or whose sum is bounded: r(y) of each response
on its own, computed once."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pfjax.infra import distributed
from pfjax.model import tokenizer
from pfjax.targets import Array
from pfjax.tasks import reward_functions, rewards
from pfjax.tasks.grading import Grader
from pfjax.tasks.problems import Problem

# Of the other samples, of the policy, or of nothing.
_NOT_OF_ONE = ("majority", "cluster", *rewards.NOT_OF_RESPONSE)


def check(text: str) -> None:
    """Raises ValueError for terms that there are not, or that depend on more than the
    response."""
    rewards.check(text)
    for term in reward_functions.parse(text):
        if term.name in _NOT_OF_ONE:
            raise ValueError(
                f"reward={text}: {term.name} is none of a response alone, so no target "
                "that has it can be drawn"
            )


class ResponseReward:
    """r(y) of token ids.

    Called by the samplers of `pfjax.sampler` it is traced by jit, and computes on the host.

    Args:
      reward, grader: started, see `Reward.values`.
      tok: makes text of tokens.
      problems: of the prompts.
    """

    def __init__(
        self,
        reward: rewards.Reward,
        grader: Grader,
        tok: Any,
        problems: Sequence[Problem],
    ):
        self._reward, self._grader = reward, grader
        self._tok, self._problems = tok, problems
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}
        self._lock = threading.Lock()  # devices call it at once
        self.error: ValueError | None = None  # jax would bury it

    def __call__(
        self, tokens: Int[Array, "s r"], length: Int[Array, "s"], prompt: Array
    ) -> Float[Array, "s"]:
        out = jax.ShapeDtypeStruct(length.shape, jnp.float32)
        return jax.pure_callback(self._on_host, out, tokens, length, prompt)

    def _on_host(self, tokens: Any, length: Any, prompt: Any) -> np.ndarray:
        tokens, length, prompt = map(np.asarray, (tokens, length, prompt))
        # Prompts past the last stand for it, see `chains.draw`.
        prompt = np.minimum(prompt, len(self._problems) - 1).tolist()
        responses = [y[:n].tolist() for y, n in zip(tokens, length, strict=True)]
        with self._lock:
            if self.error is None:
                try:
                    return self.values(prompt, responses)
                except ValueError as error:
                    self.error = error
        return np.zeros(len(length), np.float32)

    def values(
        self, prompts: Sequence[int], responses: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """The reward of each response, float32 `[S]`; 0 of an empty one.

        Args:
          prompts: the number of each one's prompt.
          responses: token ids.
        """
        keys = [(q, tuple(y)) for q, y in zip(prompts, responses, strict=True)]
        new = [k for k in dict.fromkeys(keys) if k[1] and k not in self._known]
        for q in dict.fromkeys(q for q, _ in new):
            of_prompt = [y for p, y in new if p == q]
            texts = [tokenizer.decode(self._tok, list(y)) for y in of_prompt]
            ids = [np.array(y) for y in of_prompt]
            found = self._reward.values([self._problems[q]], texts, ids, self._grader)
            named = zip(of_prompt, found, strict=True)
            self._known |= {(q, y): float(r) for y, r in named}
        return np.array([self._known.get(k, 0.0) for k in keys], np.float32)

    def shared_values(
        self, prompts: Sequence[int], responses: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """`values`, which the first process computes for all."""
        out = np.zeros(len(prompts), np.float32)
        if distributed.is_first():
            out = self.values(prompts, responses)
        return distributed.from_first(out)


@contextlib.contextmanager
def started(
    text: str, tok: Any, problems: Sequence[Problem]
) -> Iterator[ResponseReward | None]:
    """The reward of these terms, with the processes that it needs; None for no terms.

    Raises:
      ValueError: if a function cannot be loaded; at the end, what its calls raised.
    """
    if not text:
        yield None
        return
    if rewards.needs_answers(text) and any(p.gold is None for p in problems):
        raise ValueError(f"reward={text}: not all prompts have answers")
    with rewards.Reward(text) as reward, Grader() as grader:
        reward.start()
        out = ResponseReward(reward, grader, tok, problems)
        yield out
        (has_failed,) = distributed.any_of((out.error is not None,))
        if has_failed:
            raise out.error or ValueError(
                f"reward={text}: failed on another process, see what it said"
            )
