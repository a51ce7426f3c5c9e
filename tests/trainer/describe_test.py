"""What a run says of itself at its start."""

import pytest
from ml_collections import FrozenConfigDict

from configs import default
from pfjax.trainer import describe, objective


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "alpha 4"),
        ({"schedules": "alpha:1@0,4@9"}, "alpha:1@0, 4@9"),
        ({"schedules": "behavior.base:0@0,1@9"}, "alpha 4, behavior.base:0@0, 1@9"),
        (
            {"alpha": 0.5, "eta_cutoff": 0.01, "schedules": "behavior.base:0@0,1@9"},
            "alpha 0.5, of rare tokens 1 (eta_cutoff 0.01), behavior.base:0@0, 1@9",
        ),
        (
            {"alpha_range": "0.5,8", "schedules": "behavior.base:0@0,1@9"},
            "alpha from 0.5 to 8, evaluated at 4, behavior.base:0@0, 1@9",
        ),
        ({"objective": "grpo"}, "without a target"),
        # The target of this one is the base, tilted by a reward: of power 1 whatever alpha.
        ({"objective": "flowrl", "beta": 15.0}, "alpha 1"),
    ],
)
def test_the_target_is_said_whole(changes, said):
    c = default.get_config()
    c.update(changes)
    c = FrozenConfigDict(c)
    assert describe.target(c, objective.of_config(c)) == said
