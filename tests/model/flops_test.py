"""FLOPs against hand-worked numbers and XLA's own count."""

import dataclasses

import jax
import numpy as np
import pytest

from pfjax.infra import hardware
from pfjax.model import flops, log_probs, transformer
from tests.model import small_families
from tests.sampler import windowed


def test_one_sequence_by_hand(tiny_config):
    # D 16, H C 32, K C 16, F 32: 16 (32 + 16 + 16) + 32 x 16 + 3 x 16 x 32 = 3,072
    # weights per layer, two layers.
    assert flops.weights_per_token(tiny_config) == 6144
    # 10 tokens attend to 55: 4 x 2 layers x 4 heads x 8 wide; 6 logits of 16 words.
    got = flops.forward_flops(tiny_config, np.array([10]), np.array([6]))
    assert got == 2 * 6144 * 10 + 4 * 2 * 32 * 55 + 2 * 16 * 16 * 6
    assert flops.update_flops(tiny_config, np.array([10]), np.array([4])) == 4 * got


def test_a_token_is_multiplied_with_its_experts_only(tiny_config):
    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    # Of attention 16 (32 + 16 + 16) + 32 x 16, of the router 16 x 4, and 2 of 4 experts
    # of 3 x 16 x 16.
    attention, router, expert = 1536, 64, 768
    num = 2 * (attention + router + 2 * expert)
    assert flops.weights_per_token(config) == num
    assert flops.all_weights(config) == num + 2 * 2 * expert
    ten, four = np.array([10]), np.array([4])
    head = 16 * 16 * 6
    got = flops.forward_flops(config, ten, ten - four)
    assert got == 2 * num * 10 + 4 * 2 * 32 * 55 + 2 * head
    adapted = dataclasses.replace(config, lora_rank=2)
    adapters = flops.weights_per_token(adapted) - num
    assert adapters == 2 * 2 * ((16 + 32) + 2 * (16 + 16) + (32 + 16))
    want = 4 * got + 4 * 2 * adapters * 10 - 2 * (num * 10 + head)
    assert flops.update_flops(adapted, ten, four) == want
    # Of 2 of 4 experts, that read and write 16 each.
    of_experts = dataclasses.replace(adapted, lora_targets=("w_gate", "w_up", "w_down"))
    assert flops.weights_per_token(of_experts) == num + 2 * 2 * 3 * 2 * (16 + 16)
    spared = 2 * (num * 10 + head)
    adapters = flops.weights_per_token(of_experts) - num
    want = 4 * got + 4 * 2 * adapters * 10 - spared
    assert flops.update_flops(of_experts, ten, four) == want
    assert flops.all_weights(of_experts) == num + 2 * 2 * expert + 2 * adapters


def test_a_window_leaves_out_pairs(tiny_config):
    config = windowed.config_of(tiny_config, 0, 4, 20)
    lengths = np.array([10, 3, 30])
    # Within 4 tokens: 1 + 2 + 3 and then 4 each.
    pairs = (55 + 6 + 465) + (6 + 7 * 4 + 6 + 6 + 27 * 4) + (55 + 6 + 190 + 11 * 20)
    got = flops.forward_flops(config, lengths, np.zeros(3, int))
    weights = flops.weights_per_token(config)
    assert got == 2 * weights * 43 + 4 * 32 * pairs


def test_adapters_spare_the_gradient_of_what_is_frozen(tiny_config):
    config = dataclasses.replace(tiny_config, lora_rank=2)
    lengths, prompts = np.array([10]), np.array([4])
    whole = flops.update_flops(tiny_config, lengths, prompts)
    adapted = flops.update_flops(config, lengths, prompts)
    adapters = flops.weights_per_token(config) - 6144
    spared = 2 * (6144 * 10 + 16 * 16 * 6)
    assert adapted == whole + 4 * 2 * adapters * 10 - spared


def test_agrees_with_xla(tiny_config):
    """One layer, all logits, the square of attention: what XLA multiplies."""
    config = dataclasses.replace(
        tiny_config, num_layers=1, attention="plain", embed_dim=64, mlp_dim=256
    )
    t = 32
    params = transformer.abstract_params(config)
    tokens = np.zeros((1, t), np.int32)

    def run(params):
        hidden, _ = transformer.forward_packed(
            config, params, tokens, tokens, tokens + 1
        )
        return log_probs.logits(hidden, transformer.head_weight(params))

    counted = jax.jit(run).lower(params).compile().cost_analysis()["flops"]
    ours = flops.forward_flops(config, np.array([t]), np.array([t]))
    # XLA counts masked pairs too, and norms, activations and the softmax.
    pairs = 4 * 32 * (t * t - t * (t + 1) / 2)
    assert ours + pairs <= counted <= 1.15 * (ours + pairs)


@pytest.mark.parametrize(
    "kind, want",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5e", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4080", None),
        ("Tesla T4", "t4"),
        ("cpu", None),
    ],
)
def test_devices_by_name(kind, want):
    assert hardware.chip_of(kind) == (want and hardware.CHIPS[want])


def test_mfu_is_a_fraction_of_the_peak(monkeypatch):
    assert hardware.mfu(1e12, 1.0) is None  # nobody knows the peak of a CPU
    monkeypatch.setitem(
        hardware.CHIPS, "x", hardware.CHIPS["v5e"]._replace(kinds=("cpu",))
    )
    assert hardware.mfu(8 * 197e12, 2.0) == pytest.approx(0.5)  # 8 devices
