"""What the least time of a phase is reckoned from, by hand."""

import pytest

from pfjax.planner import roofline
from pfjax.sampler import slots
from tests.sampler import windowed


def _decoded_bytes(config, prompt_tokens):
    sizes = {"num_prompts": 4, "samples_per_prompt": 8, "max_new_tokens": 96}
    plan = slots.plan_for(
        config,
        ("cpu", "cpu"),
        lambda: 10**9,
        prompt_width=prompt_tokens,
        num_slots=16,
        **sizes,
    )
    work = roofline.Workload(
        model=config,
        mesh={"tensor": 1},
        rollout_mesh={"tensor": 1},
        plan=plan,
        prompt_tokens=prompt_tokens,
        response_tokens=32,
        micro_batch=1,
        remat="full",
        weight_bytes=1000,
        param_bytes=0,
        state_bytes=0,
        room=4,
        **sizes,
    )
    # 32 responses of 32 tokens by 16 slots, and the longest of 96 at the end of them.
    assert work.decode_steps == 96
    return roofline._decoded_bytes(work) / 96 - 1000


def test_decoding_reads_no_more_than_windows(tiny_config):
    # 32 x 32 / 96 are busy on average, of 2 prompts.
    busy, prompts = 32 * 32 / 96, 2
    per_token = slots.bytes_per_token(tiny_config, "float32")
    full = busy * 16 + prompts * 40
    got = _decoded_bytes(tiny_config, 40)
    assert got == pytest.approx(2 * per_token * full)
    # After 0, 1, 2 ... tokens (a half more on average): 8 of them at most, and of the
    # prompt what is left of 8.
    own = (sum(t + 0.5 for t in range(8)) + 24 * 8) / 32
    of_prompt = sum(8 - t - 0.5 for t in range(8)) / 32
    within = busy * own + prompts * of_prompt
    got = _decoded_bytes(windowed.config_of(tiny_config, 0, 8), 40)
    assert got == pytest.approx(per_token * (full + within))
