r"""How much of a target p^alpha is on responses that are not listed.

A list is of what a world's generator may say. A fitted base says something beside it. A power
below 1 raises the most what is least likely, and of that there is a lot; one above 1 raises
what a base is likely to say that has not learned its generator. Responses are all that can be
drawn within the limit of tokens, those that are cut there included, as in training. What a
target has on the list is a sum; what it has elsewhere is estimated from samples of the base
at temperature 1 / alpha,

.. math:: q(y) = \prod_t p_0(y_t \mid y_{<t})^\alpha / z(y_{<t}), \qquad
   z(y_{<t}) = \sum_v p_0(v \mid y_{<t})^\alpha,

each that is not listed weighing what its target is over q:

.. math:: \sum_{y \notin L} p_0(y)^\alpha e^{-\lambda |y|} =
   \mathrm{E}_q\Big[ 1_{y \notin L}\, e^{-\lambda |y|} \prod_t z(y_{<t}) \Big].

The mean is unbiased, and a weight bounded: z is at most V^(1 - alpha), of V words, for a power
below 1, and 1 for one above. The log Z at which both sums together are 1 is the target's
(`worlds.exact.target_on`). Below 1 weights are skewed, and a mean of few is below the sum more
often than above it: what is estimated to be listed is rather too much than too little.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import pfjax
from examples.exact import Listed
from pfjax.batch import Rollout
from pfjax.model import scoring
from pfjax.tasks.grading import last_boxed

NUM_DRAWN = 128  # per prompt, listed ones included
GROUPS = 8  # of samples, each left out in turn for the error of what they say


class Unlisted(NamedTuple):
    """Samples of responses to one prompt that are not listed; arrays `[m]`."""

    log_p0: np.ndarray
    log_q: np.ndarray  # expected number of times that each is here
    length: np.ndarray
    is_correct: np.ndarray
    log_p_rare: np.ndarray  # of rare tokens, part of log_p0
    group: np.ndarray | None = None

    def without(self, group: int) -> "Unlisted":
        """The others, as if fewer had been drawn."""
        left = self.group != group
        kept = Unlisted(*(x[left] for x in self))
        return kept._replace(log_q=kept.log_q + np.log(1 - 1 / GROUPS))


def draw(
    policy: pfjax.Policy,
    rows: Sequence[Listed],
    max_tokens: int,
    eta_cutoff: float,
    alpha: float,
    num: int = NUM_DRAWN,
) -> list[Unlisted]:
    """Draws what a base says at temperature 1 / alpha that is not in its lists."""
    tok = policy.tokenizer
    problems = [r.problem for r in rows]
    drawn, graded = graded_samples(policy, problems, num, max_tokens, 1 / alpha)
    responses = [
        row[:n].tolist()
        for row, n in zip(
            drawn.tokens.reshape(len(graded), -1), drawn.lengths.ravel(), strict=True
        )
    ]
    prompts = [x for x in drawn.prompts for _ in range(num)]
    sequences = [x + y for x, y in zip(prompts, responses, strict=True)]
    asked = (policy, sequences, [len(x) for x in prompts])
    total = lambda of_tokens: np.array([x.sum(dtype=float) for x in of_tokens]).reshape(
        -1, num
    )
    log_q = total(pfjax.score(*asked, 1 / alpha))
    rare = total(scoring.rare_log_probs(*asked, eta_cutoff))
    log_p0 = drawn.log_probs.sum(axis=-1, dtype=float, where=_is_there(drawn))
    is_correct = np.array([row["correct"] for row in graded]).reshape(-1, num)
    out = []
    for i, row in enumerate(rows):
        listed = {(*tok.encode(text), tok.eos_token_id) for text in row.texts}
        mine = responses[i * num : (i + 1) * num]
        kept = np.array([g for g, y in enumerate(mine) if tuple(y) not in listed], int)
        of_row = (log_p0[i], log_q[i] + np.log(num), drawn.lengths[i], is_correct[i])
        out.append(Unlisted(*(x[kept] for x in (*of_row, rare[i])), kept % GROUPS))
    return out


def _is_there(drawn: Rollout) -> np.ndarray:
    return np.arange(drawn.tokens.shape[-1]) < drawn.lengths[..., None]


def graded_samples(
    policy: pfjax.Policy,
    problems: Sequence[Any],
    num: int,
    max_tokens: int,
    temperature: float = 1.0,
) -> tuple[Rollout, list[dict[str, Any]]]:
    """Draws responses to problems of a world, and has a row of each, as evaluations of a
    run have them; an answer is correct letter by letter."""
    prompts = [p.prompt for p in problems]
    drawn = pfjax.rollout(policy, prompts, num, max_tokens, temperature)
    rows = [
        {
            "prompt": problems[i].prompt,
            "completion": drawn.texts[i][g],
            "tokens": int(n),
            "terminated": bool(drawn.finished[i, g]),
            "correct": last_boxed(drawn.texts[i][g]) == problems[i].answer,
        }
        for (i, g), n in np.ndenumerate(drawn.lengths)
    ]
    return drawn, rows
