"""What a person is told of the match at the end of a run."""

import pytest

from pfjax.trainer import match

FOUND = {
    "num_prompts": 64,
    "num_samples": 16,
    "base_temperature": 1.0,
    "total_variation": 0.02,
    "kl_policy_target": 0.1,
    "kl_target_policy": 0.01,
    "exponent": 3.6,
    "exponent_target": 3.9,
    "ess": 0.7,
    "repeats_across_prompts": 0.1,
    "base_repeats_across_prompts": 0.2,
}
ERRORS = {f"{name}_se": 0.1 for name in FOUND}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        # 4 less a fifth and two standard errors is 3.0.
        ({"exponent": 3.05}, ""),
        ({"exponent": 2.95}, "the power of 2.95 rather than 4"),
        ({"exponent": 5.05}, "the power of 5.05 rather than 4"),
        ({"ess": 0.04}, "4.0% of the samples carry the target"),
        ({"repeats_across_prompts": 0.9}, "90% of the responses are given to other"),
        ({"repeats_across_prompts": 0.49}, ""),
        # The base says so too.
        ({"repeats_across_prompts": 0.9, "base_repeats_across_prompts": 0.7}, ""),
    ],
)
def test_a_match_that_is_none_is_warned_of(changed, said):
    found = FOUND | ERRORS | changed
    warnings = match.warnings(found, 4.0)
    assert len(warnings) == bool(said) and all(said in x for x in warnings)
    text = match.describe(found, 4.0)
    assert "64 prompts x 16 samples" in text and "4 is asked for" in text
    assert ("warning: " in text) == bool(said)


def test_below_alpha_1_a_target_may_be_what_the_base_hardly_says():
    found = FOUND | ERRORS | {"exponent": 0.5, "base_temperature": 2.0}
    assert match.warnings(found, 0.5) == []
    assert "each, and of the base at temperature 2:" in match.describe(found, 0.5)
    (warning,) = match.warnings(found | {"total_variation": 0.5}, 0.5)
    assert "text that the base hardly ever says" in warning


def test_of_one_prompt_there_is_no_error():
    found = FOUND | {"num_prompts": 1}
    assert "total variation 0.020\n" in match.describe(found, 4.0)
    assert "exponent 3.600 over" in match.describe(found, 4.0)
    (warning,) = match.warnings(found | {"exponent": 3.0}, 4.0)
    assert "the power of 3.00" in warning
