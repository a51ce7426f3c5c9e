"""Shapes of a rollout, from memory and lengths."""

import dataclasses

import pytest

from pfjax.sampler import slots
from tests.sampler import windowed


def test_bytes_by_hand(tiny_config):
    # Keys and values of 2 heads of 8 numbers of 4 bytes.
    assert slots.bytes_per_token(tiny_config, "float32") == 2 * 2 * 8 * 4
    assert slots.bytes_per_token(tiny_config, "bfloat16") == 2 * 2 * 8 * 2
    # Two devices hold a head each; four cannot share two heads and hold both.
    assert slots.bytes_per_token(tiny_config, "float32", tensor=2) == 2 * 8 * 4
    assert slots.bytes_per_token(tiny_config, "float32", tensor=4) == 2 * 2 * 8 * 4


def test_ladder_and_widths():
    assert slots.ladder(64, "xla")[:7] == [64, 48, 40, 32, 24, 20, 16]
    assert slots.ladder(64, "xla")[-4:] == [8, 6, 5, 4]
    assert slots.ladder(64, "tpu") == [64, 16, 4]
    assert slots.ladder(3, "xla") == [3]
    assert slots.response_widths(512, "xla") == [128, 256, 512]
    assert slots.response_widths(300, "xla") == [128, 256, 304]
    assert slots.response_widths(20, "xla") == [32]
    assert slots.response_widths(3072, "tpu") == [128, 512, 2048, 3072]
    assert slots.response_widths(20, "gpu") == [128]


def _most(config, free):
    """Of 16 prompts, 8 samples each of up to 128 tokens; free beside the weights and room for
    twice two copies of tokens and log-probs."""
    drawn = 4 * 16 * 8 * 128 * (4 + 4)
    plan = slots.plan_for(
        config,
        ("cpu", "cpu"),
        lambda: free + slots.weight_bytes(config) + drawn,
        num_prompts=16,
        samples_per_prompt=8,
        max_new_tokens=128,
        prompt_width=32,
    )
    return plan.slots


def test_slots_are_as_many_as_memory_holds(tiny_config):
    config = dataclasses.replace(tiny_config, vocab_size=1)
    per_token = 2 * slots.bytes_per_token(config, "float32")
    assert _most(config, 10**9) == 128
    # 24 slots keep 12 prompts; 32 would need 1.5 x (32 x 128 + 16 x 32) tokens.
    need = 1.5 * per_token * (24 * 128 + 12 * 32) + 24 * 12
    assert _most(config, int(need / 0.85) + 1) == 24
    assert _most(config, int(need / 0.85) - 9) == 20
    # Logits of a large vocabulary count too.
    large = dataclasses.replace(config, vocab_size=100_000)
    assert _most(large, int(need / 0.85) + 1) < 16
    with pytest.raises(ValueError, match="one sample of 128 tokens needs .* are free"):
        _most(config, 1000)


def test_layers_within_a_window_leave_room_for_more(tiny_config):
    config = windowed.config_of(tiny_config, 16, 0, vocab_size=1)
    per_token = slots.bytes_per_token(config, "float32")
    # One layer keeps 16 tokens of each, the other all.
    tokens = 24 * (128 + 16) + 12 * (32 + 16)
    need = 1.5 * per_token * tokens + 24 * 12
    assert _most(config, int(need / 0.85) + 1) == 24
    assert _most(config, int(need / 0.85) - 9) == 20


def test_plan_says_what_it_is(tiny_policy):
    plan = slots.make_plan(
        tiny_policy,
        num_prompts=4,
        samples_per_prompt=4,
        max_new_tokens=40,
        prompt_width=5,
        num_slots=8,
    )
    # (8 x 48 + 4 x 16) tokens of 256 bytes.
    assert plan.cache_bytes == 448 * 256
    assert "8 samples at once, caches of 0.1 MB per device in float32" in str(plan)
    assert (plan.backend, plan.cache_dtype) == ("xla", "float32")
