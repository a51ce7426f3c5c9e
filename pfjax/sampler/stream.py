"""Rollouts without an end: responses are taken as they are done, others go on.

A slot that has ended a response takes the next one whatever step it belongs to, so that
none waits for the longest of a step. New weights are taken up in the middle of a response,
whose keys and values so far stay as they are: each recorded log-prob is the one that its
token was drawn with.

References:
  Piche et al., arXiv 2509.19128 (weights updated in flight).
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from pfjax.batch import Rollout
from pfjax.infra import sharding
from pfjax.model import dial
from pfjax.model.transformer import Params
from pfjax.sampler import options
from pfjax.sampler.buffers import SamplerState, Settings
from pfjax.sampler.scheduler import Scheduler
from pfjax.targets import Array

# In the place of a step in the random numbers: a prompt's number is never used twice.
_STEP = np.iinfo(np.int32).max


class Stream(Scheduler):
    """Responses to prompts that may be added at any time, under weights that may change.

    Args:
      settings: what the programs are compiled for.
      seed, max_new_tokens, temperature, samples: see `engine.rollout`.
      room: prompts that are held at once, at most.
    """

    def __init__(
        self,
        settings: Settings,
        seed: int,
        max_new_tokens: int,
        room: int,
        temperature: float,
        samples: range,
    ):
        how = (max_new_tokens, options.NO_STOP, None, samples, room)
        super().__init__(settings, None, [], None, *how)
        key, self._seed = jax.random.fold_in(jax.random.key(seed), _STEP), seed
        self._numbers = key, np.float32(temperature)
        self.weights_step = np.zeros((*self.cut.shape, max_new_tokens), np.int32)
        self._slot_steps, self._num_known = np.int64(0), 0
        self._is_closed = False

    def set_weights(self, weights: Params, step: int) -> None:
        """From now on tokens are drawn by these, see `unstack.weights`, of so many steps."""
        self.state = SamplerState(weights, *self._numbers)
        is_to_come = np.arange(self.max_new_tokens) >= self.known[..., None]
        self.weights_step[is_to_come] = step

    def add(self, prompts: list[list[int]], ids: list[int], is_last: bool) -> None:
        """Prompts to answer, and their numbers in the random numbers, after those before."""
        self.prompts += prompts
        self.ids = np.append(self.ids, ids).astype(np.int32)
        alpha = dial.draw(self.settings.config.alpha_range, self._seed, ids)
        if alpha is not None:
            self.alpha = np.append(self.alpha, alpha)
        self._is_closed = is_last

    def draw_until(self, is_enough: Callable[[], bool]) -> None:
        """Goes on until what the host has seen is enough, and sees all that was drawn."""
        unseen = self._draw_until(is_enough)
        if unseen is not None:
            self._look(*unseen)

    @property
    def held(self) -> list[int]:
        """The prompts, by their places in the order of `add`, that are not taken yet."""
        return [*self.entry, *range(self.num_dealt, len(self.prompts))]

    def complete(self) -> list[int]:
        """Those of them of which all samples have ended."""
        return [q for q in self.entry if self._of(self.length, q).all()]

    def oldest(self, prompt: int) -> int:
        """Steps before the weights that drew the first token of a prompt's samples."""
        if prompt not in self.entry:
            return int(self.weights_step.max())
        return int(self._of(self.weights_step, prompt)[:, 0].min())

    def take(self, prompts: list[int]) -> Rollout:
        """The samples of prompts that are complete, whose room is free then. The weights are
        let go."""
        _, of_slots, _, results = self.on_device
        slot_steps = sharding.fetch(of_slots.slot_steps).sum(dtype=np.int64)
        num_known = int(self.known.sum())
        rollout = self._as_rollout(
            self._ended(results), prompts, int(slot_steps - self._slot_steps) % 2**32
        )
        rollout = rollout._replace(
            weights_step=np.stack([self._of(self.weights_step, q) for q in prompts]),
            num_drawn=num_known - self._num_known,
        )
        self._slot_steps = slot_steps
        self._forget(prompts)
        self.state = None  # the weights take the memory that updates need
        self._num_known = int(self.known.sum())
        return rollout

    def _forget(self, prompts: Iterable[int]) -> None:
        is_free = np.zeros(self.cut.shape, bool)
        for q in prompts:
            self._of(is_free, q)[:] = True
            part, entry = self.entry.pop(q)
            self.vacant[part].append(entry)
        self.known = np.where(is_free, 0, self.known)
        self.length = np.where(is_free, 0, self.length)
        *others, results = self.on_device
        length = _cleared(results.length, is_free.ravel())
        self.on_device = (*others, results._replace(length=length))

    def _of(self, x: np.ndarray, prompt: int) -> np.ndarray:
        (part, entry), g = self.entry[prompt], len(self.samples)
        return x[part, entry * g : (entry + 1) * g]

    def _is_waiting(self) -> bool:
        # Slots are given up when no prompt will come.
        return not self._is_closed or super()._is_waiting()


@jax.jit
def _cleared(length: Array, is_free: Array) -> Array:
    return jnp.where(is_free, 0, length)
