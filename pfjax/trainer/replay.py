"""The newest responses that the policy drew to each prompt, for later steps to learn from.

The newest, since those are where the policy has its mass, or had it lately; what it said at
its start is what the base says, which draws that anew. Log-probs are not kept: the base
scores what is replayed among the rest of a step. Its pass takes 8 % of a step of the smoke
recipe, and without a quarter of the responses would take 6.
"""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from pfjax.batch import Rollout


class Replay:
    """Responses by the index of their prompt, in the order in which they were drawn.

    Args:
      per_prompt: kept at most; 0 keeps nothing.
    """

    def __init__(self, per_prompt: int):
        new = lambda: collections.deque(maxlen=per_prompt)
        self._per_prompt = per_prompt
        self._kept: dict[int, collections.deque] = collections.defaultdict(new)

    def of(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        """Those to each of some prompts."""
        return [list(self._kept.get(i, ())) for i in indices]

    def add(self, indices: Sequence[int], rollout: Rollout) -> None:
        """Keeps what the policy has drawn at a step to the prompts of these indices."""
        if not self._per_prompt:
            return
        is_own = rollout.is_own.reshape(rollout.lengths.shape)
        for at in zip(*np.nonzero(is_own), strict=True):
            # A view would hold the whole rollout.
            y = rollout.tokens[at][: rollout.lengths[at]].copy()
            self._kept[indices[at[0]]].append(y)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be saved; empty if there is nothing."""
        pairs = [(i, y) for i, of in self._kept.items() for y in of]
        if not pairs:
            return {}
        prompts, responses = zip(*pairs, strict=True)
        return {
            "prompts": np.array(prompts, np.int32),
            "lengths": np.array([len(y) for y in responses], np.int32),
            "tokens": np.concatenate(responses).astype(np.int32),
        }

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Brings back what was saved."""
        self._kept.clear()
        ends = np.cumsum(arrays["lengths"])
        responses = np.split(arrays["tokens"], ends[:-1])
        for i, y in zip(arrays["prompts"].tolist(), responses, strict=True):
            self._kept[i].append(y)
