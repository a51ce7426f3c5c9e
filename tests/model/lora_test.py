"""Adapters: start at the base, merge into it, and mean the same to peft."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pfjax.model import hf, log_probs, lora, transformer


@pytest.fixture
def adapted(tiny_policy):
    """The tiny policy with adapters that have moved (B is not zero)."""
    config = dataclasses.replace(tiny_policy.config, lora_rank=3, lora_alpha=6.0)
    adapters = lora.init_params(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + 0.2 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    adapters = jax.tree.unflatten(tree, moved)
    return transformer.Policy(config, lora.join(tiny_policy.params, adapters))


TOKENS = np.array([[3, 5, 7, 2, 9, 11, 4, 8]])


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params):
    positions = np.arange(TOKENS.shape[1])[None]
    hidden, _ = transformer.forward_packed(
        config, params, TOKENS, positions, np.ones_like(TOKENS)
    )
    return log_probs.logits(hidden, transformer.head_weight(params))


def _logits(policy):
    return np.asarray(_forward(*policy))


def test_adapters_start_at_the_base(tiny_policy):
    config = dataclasses.replace(tiny_policy.config, lora_rank=2, lora_alpha=4.0)
    adapters = lora.init_params(config, jax.random.key(0))
    start = transformer.Policy(config, lora.join(tiny_policy.params, adapters))
    np.testing.assert_array_equal(_logits(start), _logits(tiny_policy))
    wanted = jax.tree.map(lambda x: x.shape, transformer.abstract_params(config))
    assert jax.tree.map(lambda x: x.shape, start.params) == wanted


def test_merged_weights_compute_the_same(adapted, tiny_policy):
    merged = lora.merge(adapted)
    assert merged.config == tiny_policy.config
    assert np.abs(_logits(adapted) - _logits(tiny_policy)).max() > 0.1
    np.testing.assert_allclose(_logits(merged), _logits(adapted), atol=1e-4)


def test_peft_loads_the_adapters_and_agrees(adapted, tiny_policy, tmp_path):
    import peft
    import torch
    import transformers

    hf.save(tiny_policy, tmp_path / "base")
    lora.save_peft(adapted, tmp_path / "adapter", str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        want = loaded(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(_logits(adapted), want, atol=1e-4)


def test_saving_adapters_as_a_whole_model_is_refused(adapted, tmp_path):
    with pytest.raises(ValueError, match="lora.merge"):
        hf.save(adapted, tmp_path / "m")
