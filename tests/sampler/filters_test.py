"""Filters keep the tokens they say they keep."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pfjax.sampler import filters, options
from pfjax.sampler.options import TokenFilters

# Probabilities 0.4, 0.3, 0.2, 0.1, not in order.
LOGITS = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.3]])) + 5.0


@pytest.mark.parametrize(
    "kwargs, kept",
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),  # the fewest whose mass is at least p
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),
        ({"min_p": 0.6}, [1, 3]),  # 0.6 x 0.4 = 0.24
        ({"min_p": 0.2}, [0, 1, 2, 3]),
        # 0.6 of the mass of the three that top-k leaves: 0.4 / 0.9, 0.7 / 0.9.
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
        ({"top_k": 2, "min_p": 0.9}, [1]),
    ],
)
def test_kept_tokens_by_hand(kwargs, kept):
    got = filters.apply(TokenFilters(**kwargs), LOGITS)[0]
    assert np.flatnonzero(got > -1e29).tolist() == kept
    np.testing.assert_array_equal(got[np.array(kept)], LOGITS[0, np.array(kept)])


def test_rows_have_thresholds_of_their_own():
    logits = jnp.stack([LOGITS[0], jnp.zeros(4), -LOGITS[0]])
    got = filters.apply(TokenFilters(top_p=0.5), logits) > -1e29
    # Equally likely tokens are all kept: none is likelier than another. The last row
    # has 0.48, 0.24, 0.16, 0.12.
    np.testing.assert_array_equal(got, [[0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenFilters(**kwargs)


@pytest.mark.parametrize("name", options.FILTER_NAMES)
def test_a_filter_is_written_where_it_is_declared_and_where_it_acts(name):
    root = pathlib.Path(filters.__file__).parents[2]
    files = [*(root / "pfjax").rglob("*.py"), *(root / "configs").rglob("*.py")]
    written = re.compile(rf"(?<!lax\.)\b{name}\b")  # lax.top_k is a function of JAX
    found = {p.name for p in files if written.search(p.read_text())}
    # Exports turn off what transformers would filter by itself.
    assert found - {"hf.py"} == {"options.py", "filters.py"}


def test_filters_are_read_from_other_values():
    values = {"top_k": 2, "top_p": 0.5, "min_p": 0.1, "temperature": 0.7}
    assert options.token_filters(values) == TokenFilters(2, 0.5, 0.1)
