"""Adapters: start at the base, merge into it, and mean the same to peft."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pfjax.batch import PackedBatch
from pfjax.model import hf, hub, log_probs, lora, transformer
from pfjax.model.layers import PROJECTIONS
from tests.model import small_families


@pytest.fixture(params=["all-linear", "q_proj,v_proj,down_proj"])
def adapted(tiny_policy, request):
    """The tiny policy with adapters that have moved (B is not zero)."""
    return small_families.adapted(tiny_policy, request.param)


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
    lora.save_peft(adapted, tmp_path / "adapter", str(tmp_path / "base"), dropout=0.1)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        want = loaded(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(_logits(adapted), want, atol=1e-4)
    said, names = loaded.peft_config["default"], lora.target_names
    assert said.lora_dropout == 0.1
    assert said.target_modules == set(names(adapted.config.adapted))
    # Only where they were asked for.
    assert len(lora.select(adapted.params)["blocks"]) == 2 * len(said.target_modules)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [small_families.ALL, "q_proj,down_proj"])
def test_adapters_of_experts_mean_the_same_merged_to_peft_and_read_again(
    tiny_config, tmp_path, targets
):
    import peft
    import torch
    import transformers

    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    params = transformer.init_params(config, jax.random.key(0))
    base, here = transformer.Policy(config, params), jax.devices()[0]
    adapted = small_families.adapted(base, targets)
    logits, merged = _logits(adapted), lora.merge(adapted)
    assert merged.config == config and np.abs(logits - _logits(base)).max() > 1
    log_softmax = lambda x: np.asarray(jax.nn.log_softmax(x))
    want = log_softmax(logits)
    np.testing.assert_allclose(log_softmax(_logits(merged)), want, atol=1e-5)
    hf.save(base, tmp_path / "base")
    lora.save_peft(adapted, tmp_path / "adapter", str(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    with torch.no_grad():
        found = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, logits, atol=1e-4)
    read, own = lora.read_peft(tmp_path / "adapter"), lora.select(adapted.params)
    assert read.targets == adapted.config.adapted == lora.projections(targets)
    where = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(here), own)
    again = lora.load_peft(read, adapted.config, where)
    jax.tree.map(np.testing.assert_array_equal, again, own)


def test_adapters_start_as_wide_as_what_one_expert_reads(tiny_config):
    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    targets = lora.projections("gate_proj,up_proj,down_proj")
    sizes = {"num_experts": 64, "lora_rank": 4, "lora_targets": targets}
    made = lora.init_params(dataclasses.replace(config, **sizes), jax.random.key(0))
    made = made["blocks"]
    assert made["w_gate_a"].shape == (2, 64, 16, 4)
    assert made["w_down_b"].shape == (2, 64, 4, 16) and not made["w_down_b"].any()
    for name in ("w_gate_a", "w_up_a", "w_down_a"):
        assert np.std(made[name]) == pytest.approx(16**-0.5, rel=0.05)


def _by_peft(tmp_path, policy, **config):
    """The folder of an adapter that peft made for a policy, and its logits there."""
    import peft
    import torch
    import transformers

    hf.save(policy, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    # B too is random.
    made = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
    model = peft.get_peft_model(base, made).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ({"r": 5, "lora_alpha": 7, "target_modules": ["v_proj", "q_proj"]}, "wq wv"),
        ({"r": 2, "target_modules": "all-linear", "lora_dropout": 0.5}, None),
        ({"target_modules": r".*\.(gate|up)_proj"}, "w_gate w_up"),
    ],
)
def test_adapters_that_peft_made_are_loaded_and_agree(
    tiny_policy, tmp_path, config, targets
):
    folder, want = _by_peft(tmp_path, tiny_policy, **config)
    adapter = lora.read_peft(folder)
    assert adapter.rank == config.get("r", 8)
    assert adapter.alpha == config.get("lora_alpha", 8.0)
    assert adapter.targets == tuple(targets.split() if targets else PROJECTIONS)
    assert adapter.base == str(tmp_path / "base")
    model = dataclasses.replace(
        tiny_policy.config,
        lora_rank=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_targets=adapter.targets,
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(
        lambda _: here, lora.select(transformer.abstract_params(model))
    )
    params = lora.join(tiny_policy.params, lora.load_peft(adapter, model, where))
    policy = transformer.Policy(model, params)
    assert np.abs(want - _logits(tiny_policy)).max() > 0.1
    np.testing.assert_allclose(_logits(policy), want, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True: only plain LoRA"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"target_modules": ["q_proj", "lm_head"]}, "more or less than .*lm_head"),
        ({"layers_to_transform": [0]}, "layers_to_transform="),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    tiny_policy, tmp_path, config, message
):
    folder, _ = _by_peft(
        tmp_path, tiny_policy, **{"target_modules": ["q_proj"]} | config
    )
    with pytest.raises(ValueError, match=message) as error:
        lora.read_peft(folder)
    assert "\n" not in str(error.value)


def test_adapters_that_change_the_base_are_refused(tmp_path):
    text = (
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "init_lora_weights": "pissa"}'
    )
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        lora.read_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type='IA3'"):
        lora.read_peft(tmp_path)


def test_targets_have_the_names_that_peft_has():
    assert lora.projections("all-linear") == ()
    assert lora.projections("down_proj, q_proj,q_proj") == ("wq", "w_down")
    assert lora.target_names(("wq", "w_down")) == ["q_proj", "down_proj"]
    with pytest.raises(ValueError, match="'qproj' is no .*; did you mean 'q_proj'"):
        lora.projections("qproj,v_proj")


def test_dropout_drops_its_fraction_and_keeps_the_mean(tiny_config):
    batch = PackedBatch(*[None] * 8)._replace(
        positions=np.tile(np.arange(25), (2, 2)),
        segment_ids=np.tile(np.repeat([1, 2], 25), (2, 1)),
        dropout_seed=np.array([[1, 2], [3, 1]], np.uint32),
    )
    thin = lora.dropout(tiny_config, batch, 0.2)
    ones = jax.numpy.ones((2, 50, 4, 8), "bfloat16")
    thinned = lambda layer, name: np.asarray(thin(ones, np.array(layer), name), float)
    x = thinned(1, "wo")
    assert sorted(np.unique(x)) == [0.0, 1.25]
    assert np.mean(x == 0) == pytest.approx(0.2, abs=0.02)
    # Anew in each trajectory, token, layer and projection; by the seed, whatever the row.
    differ = lambda a, b: np.mean(a != b) > 0.2
    assert differ(x[0, :25], x[0, 25:]) and differ(x[:, 0], x[:, 1])
    assert differ(x, thinned(2, "wo")) and differ(x, thinned(1, "wq"))
    np.testing.assert_array_equal(x[0, :25], x[1, 25:])


def test_a_whole_model_is_saved_with_its_adapters_merged(adapted, tmp_path):
    hf.save(adapted, tmp_path / "m")
    saved = hf.load(tmp_path / "m")
    assert not saved.config.lora_rank
    np.testing.assert_allclose(_logits(saved), _logits(adapted), atol=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{bad", "adapter_config.json is not JSON"),
        ("[]", "adapter_config.json holds a list"),
        ('{"r": "x", "lora_alpha": 4}', "rank 'x', alpha 4"),
        ('{"r": null, "lora_alpha": 4}', "rank None, alpha 4"),
        ('{"r": 4, "lora_alpha": []}', r"rank 4, alpha \[\]"),
    ],
)
def test_a_damaged_config_of_adapters_is_named(adapted, tmp_path, text, said):
    lora.save_peft(adapted, tmp_path, "a/b")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{said}"):
        lora.read_peft(tmp_path)
    if "JSON" in said:
        with pytest.raises(ValueError, match=f"{tmp_path}.*{said}"):
            hub.resolve(tmp_path)


def test_the_revision_of_a_base_is_a_field_of_its_own(adapted, tmp_path):
    """As peft has it, which looks for a base of the whole name otherwise."""
    import peft

    lora.save_peft(adapted, tmp_path / "adapter", "a/b@v2")
    said = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (said.base_model_name_or_path, said.revision) == ("a/b", "v2")
    (tmp_path / "x@y").mkdir()
    for base in (f"{tmp_path}/x@y", "a/b"):
        lora.save_peft(adapted, tmp_path / "adapter", base)
        said = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
        assert (said.base_model_name_or_path, said.revision) == (base, None)
