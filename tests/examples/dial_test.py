"""What a dial is compared with: mixtures of two models' logits."""

import jax
import numpy as np
import pytest

import pfjax
from examples import dial, exact
from examples.worlds import exact as of_worlds


def _noisy(policy):
    leaves, tree = jax.tree.flatten(policy)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    noise = [x + 0.05 * jax.random.normal(k, x.shape) for k, x in pairs]
    return jax.tree.unflatten(tree, noise)


@pytest.mark.slow
def test_a_mixture_is_either_model_at_its_ends_and_a_distribution_between():
    base, world = pfjax.load("pfjax/toy"), exact.WORLDS["toy"]
    rows = exact.listed(world, base, world.problems()[1][:2])
    other = _noisy(base)
    found = dial.token_log_probs((base, other), rows, [0.0, 0.5, 1.0])
    asked = [r.problem for r in rows], [r.texts for r in rows]
    want = of_worlds.score(other, base.tokenizer, *asked)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found[0][i], row.log_p0, atol=1e-4)
        np.testing.assert_allclose(found[2][i], want[i], atol=1e-4)
        assert 0.3 < np.exp(found[1][i]).sum() <= 1 + 1e-5


def test_the_table_counts_where_the_dial_is_nearer():
    of = lambda tv: {
        "total_variation": tv, "accuracy": 0.5, "target_accuracy": 0.75,
        "distinct_correct": 3.0,
    }  # fmt: skip
    results = [
        {"2": {"dial": of(a), "linear": of(0.4), "mixture": of(b), "base": of(0.5)}}
        for a, b in ((0.1, 0.2), (0.2, 0.1), (0.3, 0.4))
    ]
    (row,) = dial.table(results).splitlines()[2:]
    assert row == (
        "| 2 | 0.200 | 0.400 | 3 of 3 | 0.233 | 2 of 3 | 0.500 | 0.750 | 0.500 | 0.500 "
        "| 0.500 | 3.00 |"
    )


def test_the_linear_mixture_is_base_and_checkpoints_at_their_own_alphas():
    weights = [dial.linear_weight(a) for a in (0.5, 0.75, 1.0, 2.5, 4.0)]
    assert weights == [1.0, 0.5, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("world", ["chains", "nothing"])
def test_worlds_that_cannot_be_listed_are_refused(world):
    with pytest.raises(SystemExit, match="name one world"):
        dial.main(["dial", world])
