r"""Grammars: responses as chains of choices, and what is exact of them.

A grammar says what may follow a state, with which probability. The choices of a state
begin with different tokens, so that a choice is made at one token, and what follows is
finite. Then one description gives samples, the list of all responses, temperature, and
by dynamic programming over states any power of the whole distribution, also where the
responses are far too many to list:

.. math:: V(s) = \log \sum_c p(c \mid s)^\alpha\, e^{-\log Z' |c|}\, e^{V(s_c)}

The tilted distribution is a grammar again, with choices in proportion to the summands.
"""

import functools
import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

BOX = "\\boxed{"
_TOKEN = re.compile(r"\\boxed\{|.")


class Choice(NamedTuple):
    """What may follow a state."""

    probability: float
    text: str
    state: Hashable  # after it; True and False end a response: correct, and incorrect


class Grammar(NamedTuple):
    """A distribution over responses to one prompt."""

    start: Hashable
    choices: Callable[[Hashable], Sequence[Choice]]


class Response(NamedTuple):
    text: str
    probability: float
    is_correct: bool
    length: int  # tokens, the stop token included


class Summary(NamedTuple):
    """Expectations over one response."""

    accuracy: float
    length: float  # tokens, the stop token included
    length_std: float


@functools.cache
def num_tokens(text: str) -> int:
    return len(_TOKEN.findall(text))


def first_token(text: str) -> str:
    return _TOKEN.match(text)[0]


def sample(grammar: Grammar, rng: np.random.Generator) -> Response:
    """Draws a response."""
    state, text, probability = grammar.start, "", 1.0
    while not isinstance(state, bool):
        left = rng.random()
        for choice in grammar.choices(state):
            left -= choice.probability
            if left < 0:
                break
        # Rounding may leave something: the last choice then.
        state, text = choice.state, text + choice.text
        probability *= choice.probability
    return Response(text, probability, state, num_tokens(text) + 1)


def responses(grammar: Grammar) -> list[Response]:
    """Lists all responses."""
    return list(_responses(grammar, grammar.start, "", 1.0, 1))


def _responses(
    grammar: Grammar, state: Hashable, text: str, probability: float, length: int
) -> Iterator[Response]:
    if isinstance(state, bool):
        yield Response(text, probability, state, length)
        return
    for p, more, after in grammar.choices(state):
        n = length + num_tokens(more)
        yield from _responses(grammar, after, text + more, probability * p, n)


def summary(grammar: Grammar) -> Summary:
    @functools.cache
    def moments(state: Hashable) -> np.ndarray:
        """Of correctness, and of the length from here: mean and mean square."""
        if isinstance(state, bool):
            return np.array([state, 1.0, 1.0])
        total = np.zeros(3)
        for p, text, after in grammar.choices(state):
            n, (correct, mean, square) = num_tokens(text), moments(after)
            total += p * np.array([correct, mean + n, square + 2 * n * mean + n * n])
        return total

    correct, mean, square = moments(grammar.start)
    return Summary(float(correct), float(mean), math.sqrt(max(square - mean**2, 0.0)))


def tempered(grammar: Grammar, temperature: float) -> Grammar:
    """What sampling each token at a temperature gives: choices are made at one token."""

    def choices(state: Hashable) -> list[Choice]:
        old = grammar.choices(state)
        weights = np.array([c.probability for c in old]) ** (1 / temperature)
        return _reweighted(old, weights / weights.sum())

    return Grammar(grammar.start, functools.cache(choices))


def tilted(grammar: Grammar, alpha: float, log_z: float = 0.0) -> tuple[float, Grammar]:
    """p^alpha e^{-log_z |y|}, normalised.

    Args:
      alpha: power of the whole response's probability.
      log_z: log Z', in nats per token; 0 is the target of whole sequences.

    Returns:
      The log of the sum before it is normalised, and the distribution.
    """

    @functools.cache
    def log_weights(state: Hashable) -> np.ndarray:
        return np.array(
            [
                alpha * math.log(p) - log_z * num_tokens(text) + log_sum(after)
                for p, text, after in grammar.choices(state)
            ]
        )

    @functools.cache
    def log_sum(state: Hashable) -> float:
        if isinstance(state, bool):
            return -log_z  # the stop token
        return float(np.logaddexp.reduce(log_weights(state)))

    @functools.cache
    def choices(state: Hashable) -> list[Choice]:
        weights = np.exp(log_weights(state) - log_sum(state))
        return _reweighted(grammar.choices(state), weights)

    return log_sum(grammar.start), Grammar(grammar.start, choices)


def length_aware(grammar: Grammar, alpha: float) -> tuple[float, Grammar]:
    """Returns the log Z' at which p^alpha e^{-log Z' |y|} sums to 1, and the distribution."""
    excess = lambda log_z: tilted(grammar, alpha, log_z)[0]
    # Responses have a token at least: the sum changes by a nat per nat or more.
    bound = abs(excess(0.0)) + 1e-6
    log_z = optimize.brentq(excess, -bound, bound, xtol=1e-12)
    return log_z, tilted(grammar, alpha, log_z)[1]


def _reweighted(choices: Sequence[Choice], weights: np.ndarray) -> list[Choice]:
    return [
        c._replace(probability=float(w))
        for c, w in zip(choices, weights, strict=True)
    ]  # fmt: skip


def distinct_correct(grammar: Grammar, num_samples: int) -> float:
    """Expected number of different correct responses among samples, by listing."""
    p = np.array([r.probability for r in responses(grammar) if r.is_correct])
    return float(np.sum(1 - (1 - p) ** num_samples))
