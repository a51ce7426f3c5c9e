"""The same numbers as transformers, over families and every field that matters."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from pfjax.model import hf, hf_config, log_probs, lora, rope, transformer
from pfjax.model.config import FULL, SLIDING

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
# name -> (model_type, what differs from SMALL). Between them: kv heads 1, 2, equal;
# tied and untied; theta 1e4, 5e5, 1e6; every scaling; every bias.
CASES = {
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-untied": (
        "qwen2",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 1e6}},
    ),
    "qwen2-yarn": (
        "qwen2",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 1e6, **YARN}},
    ),
    "qwen3": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-bias": (
        "qwen3",
        {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True},
    ),
    "llama": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 5e5}},
    ),
    "llama-llama3": (
        "llama",
        {
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
        },
    ),
    "llama-linear-bias": (
        "llama",
        {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "linear",
                "factor": 3.0,
            },
        },
    ),
    "llama-dynamic": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "dynamic",
                "factor": 2.0,
            },
        },
    ),
    "llama-yarn-mscale": (
        "llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_theta": 1e4,
                **YARN,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "beta_fast": 16.0,
                "truncate": False,
            },
        },
    ),
    "mistral": (
        "mistral",
        {"num_key_value_heads": 2, "sliding_window": None, "rms_norm_eps": 1e-3},
    ),
    # The reference sees 48 tokens, three times these windows.
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen2-window": (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
    ),
    "qwen3-window": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 15,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "rope_parameters": {"rope_theta": 1e6},
        },
    ),
    "qwen3-moe-bias": (
        "qwen3_moe",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "moe_intermediate_size": 40,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "smollm3": (
        "smollm3",
        {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
    ),
    "smollm3-window": (
        "smollm3",
        {
            "num_key_value_heads": 2,
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "smollm3-untied": (
        "smollm3",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
            "no_rope_layers": [0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_theta": 5e6, **YARN},
        },
    ),
    "seed_oss": (
        "seed_oss",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "attention_out_bias": True,
            "rope_parameters": {"rope_theta": 1e7},
        },
    ),
    "seed_oss-tied": (
        "seed_oss",
        {
            "num_key_value_heads": 1,
            "head_dim": 16,
            "attention_bias": False,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": (
        "olmo2",
        {
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 5e5},
            "attention_bias": True,
        },
    ),
    "olmo2-tied": (
        "olmo2",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "olmo3": (
        "olmo3",
        {
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_theta": 5e5, **YARN},
                "sliding_attention": {"rope_theta": 5e5, "rope_type": "default"},
            },
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_key_value_heads": 1,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3-untied": (
        "gemma3_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "full_attention": {
                    "rope_theta": 1e5,
                    "rope_type": "linear",
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_theta": 2e3, "rope_type": "default"},
            },
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "num_key_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "tie_word_embeddings": True,
        },
    ),
    # Three layers to one, twice.
    "qwen3_5-deep": (
        "qwen3_5_text",
        {
            "num_key_value_heads": 4,
            "num_hidden_layers": 8,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    # Nothing repeats; heads are rotated by half, and stretched.
    "qwen3_5-untied": (
        "qwen3_5_text",
        {
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "linear_conv_kernel_dim": 3,
            "attention_bias": True,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "rope_parameters": {
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                **YARN,
            },
        },
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes each model once: folder, tokens, positions, and the reference's logits."""
    cache = {}

    def make(name):
        if name not in cache:
            cache[name] = _make(tmp_path_factory.mktemp(name), *CASES[name])
        return cache[name]

    return make


def _make(folder, model_type, changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | changes))
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms and biases matter too
            parameter.add_(0.2 * torch.randn_like(parameter))
        _forget_less(reference)
    reference.save_pretrained(folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SMALL["vocab_size"], size=(1, 48))
    middle = rng.choice(np.arange(1, 4095), size=46, replace=False)
    positions = np.sort(np.concatenate([[0], middle, [4095]]))[None]
    return folder, tokens, positions, _reference_logits(reference, tokens, positions)


def _forget_less(reference):
    """Of a state that forgets all a norm would leave the sign of one product, on which
    rounding decides."""
    for name, parameter in reference.named_parameters():
        if name.endswith("A_log"):
            parameter.sub_(5.0)


def _reference_logits(reference, tokens, positions):
    with torch.no_grad():
        return (
            reference(
                torch.tensor(tokens),
                # Given, so that gaps between positions are not taken for packing.
                attention_mask=torch.ones(tokens.shape, dtype=torch.long),
                position_ids=torch.tensor(positions),
            )
            .logits.float()
            .numpy()
        )


def _logits(policy, tokens, positions, choices=None):
    rows = (tokens, positions, np.ones_like(tokens))
    run = functools.partial(transformer.forward_packed, choices=choices)
    hidden, _ = run(policy.config, policy.params, *rows)
    return np.asarray(log_probs.logits(hidden, transformer.head_weight(policy.params)))


# One of each family.
SOME = (
    *("qwen2", "qwen3", "llama-llama3", "mistral-window", "qwen3-moe", "smollm3"),
    *("seed_oss", "olmo2", "olmo3", "gemma3", "qwen3_5"),
)
SOME_CASES = [
    pytest.param(x, marks=() if x in SOME else pytest.mark.slow) for x in CASES
]


@pytest.mark.parametrize("name", SOME_CASES)
def test_float32_logits_equal_those_of_transformers(made, name):
    folder, tokens, positions, want = made(name)
    got = _logits(hf.load(folder), tokens, positions)
    assert want.std() > 0.3
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("qwen2", "gemma3") else pytest.mark.slow)
        for x in (
            *("qwen2", "qwen3", "llama-llama3", "mistral", "smollm3", "seed_oss"),
            *("olmo2", "olmo3", "gemma3", "qwen3_5"),
        )
    ],
)
def test_bfloat16_logits_are_within_rounding(made, name):
    """Of the same bfloat16 weights, computed by the reference in float32."""
    folder, tokens, positions, _ = made(name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    ).float()
    want = _reference_logits(reference, tokens, positions)
    got = _logits(hf.load(folder, dtype="bfloat16"), tokens, positions)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2


@pytest.mark.parametrize(
    "name", ["qwen3-moe", pytest.param("qwen3-moe-bias", marks=pytest.mark.slow)]
)
def test_bfloat16_logits_are_within_rounding_with_the_same_experts(made, name):
    """Some choices are so close that rounding decides them, in any implementation."""
    folder, tokens, positions, _ = made(name)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    ).float()
    want = _reference_logits(reference, tokens, positions)
    with torch.no_grad():
        given = {"position_ids": torch.tensor(positions), "output_router_logits": True}
        mask = torch.ones(tokens.shape, dtype=torch.long)
        routers = reference(torch.tensor(tokens), mask, **given).router_logits
    policy = hf.load(folder, dtype="bfloat16")
    k = policy.config.num_experts_per_tok
    chosen = np.stack([x.topk(k).indices.numpy() for x in routers], axis=1)
    choices = chosen.reshape(*tokens.shape, -1).astype(np.uint8)
    got = _logits(policy, tokens, positions, choices)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2
    own = _logits(policy, tokens, positions)
    assert np.abs(own - want).max() > 2 * np.abs(got - want).max()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen2-untied", "rope.theta", 1e4),
        ("qwen2-yarn", "rope.kind", "default"),
        ("qwen2-yarn", "rope.attention_factor", 1.0),
        ("qwen2-yarn", "rope.original_positions", 64),
        ("qwen2-yarn", "rope.beta_fast", 4.0),
        ("qwen2-yarn", "rope.beta_slow", 8.0),
        ("llama-yarn-mscale", "rope.truncate", True),
        ("llama-llama3", "rope.factor", 4.0),
        ("llama-llama3", "rope.low_freq_factor", 2.0),
        ("llama-llama3", "rope.high_freq_factor", 16.0),
        ("llama-llama3", "rope.original_positions", 4096),
        ("llama-linear-bias", "rope.factor", 1.0),
        ("mistral", "norm_eps", 1e-6),
        ("qwen3-bias", "attention_bias", False),
        ("llama-linear-bias", "attention_bias", False),
        ("llama-linear-bias", "mlp_bias", False),
        ("mistral-window", "sliding_window", 15),
        ("qwen2-window", "sliding_window", 17),
        ("qwen2-window", "layer_types", (SLIDING, SLIDING)),
        ("qwen3-window", "layer_types", (FULL, SLIDING)),
        ("qwen3-moe", "norm_topk_prob", False),
        ("qwen3-moe", "num_experts_per_tok", 2),
        ("qwen3-moe-bias", "norm_topk_prob", True),
        ("qwen3-moe-bias", "num_experts_per_tok", 3),
        ("qwen3-moe-bias", "attention_bias", False),
        ("qwen3-moe-bias", "norm_eps", 1e-6),
        ("smollm3", "no_rope_layers", (1, 1)),
        ("smollm3-untied", "no_rope_layers", (0, 0)),
        ("smollm3-window", "sliding_window", 15),
        ("smollm3-untied", "attention_bias", False),
        ("smollm3-untied", "mlp_bias", False),
        ("seed_oss", "attention_bias", False),
        ("seed_oss", "attention_out_bias", False),
        ("seed_oss", "rope.theta", 1e4),
        ("seed_oss-tied", "mlp_bias", False),
        ("olmo2", "attention_bias", False),
        ("olmo2-tied", "norm_eps", 1e-6),
        ("olmo3", "sliding_window", 0),
        ("olmo3", "local_rope", None),
        ("olmo3", "rope.kind", "default"),
        ("gemma3", "query_pre_attn_scalar", 16),
        ("gemma3", "sliding_window", 15),
        ("gemma3", "local_rope", None),
        ("gemma3", "rope.theta", 1e4),
        ("gemma3-untied", "layer_types", (SLIDING, FULL)),
        ("gemma3-untied", "attention_bias", False),
        ("gemma3-untied", "norm_eps", 1e-6),
        ("gemma3-untied", "rope.factor", 1.0),
        ("qwen3_5", "rope.rotated", 0.5),
        ("qwen3_5", "rope.theta", 1e4),
        ("qwen3_5", "norm_eps", 1e-2),
        ("qwen3_5-untied", "rope.rotated", 1.0),
        ("qwen3_5-untied", "rope.kind", "default"),
        ("qwen3_5-untied", "attention_bias", False),
    ],
)
@pytest.mark.slow
def test_a_field_read_wrongly_would_fail_the_comparison(made, name, field, value):
    folder, tokens, positions, want = made(name)
    policy = hf.load(folder)
    config = policy.config
    if field.startswith("rope."):
        changed = dataclasses.replace(config.rope, **{field[5:]: value})
        assert changed != config.rope
        config = dataclasses.replace(config, rope=changed)
    else:
        config = dataclasses.replace(config, **{field: value})
    wanted = transformer.abstract_params(config)
    params = {**policy.params}
    params["blocks"] = {k: params["blocks"][k] for k in wanted["blocks"]}
    got = _logits(transformer.Policy(config, params), tokens, positions)
    assert np.abs(got - want).max() > 1e-3


@pytest.mark.parametrize("name", SOME_CASES)
def test_config_is_the_same_in_the_spelling_of_transformers_4(made, name, tmp_path):
    folder = made(name)[0]
    c = json.loads((folder / "config.json").read_text())
    parameters = c.pop("rope_parameters")
    if "sliding_attention" in parameters:
        if c["model_type"] == "gemma3_text":
            c["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
    c["rope_theta"] = parameters.pop("rope_theta")
    c["torch_dtype"] = c.pop("dtype")
    kind = parameters.pop("rope_type")
    if kind != "default":
        c["rope_scaling"] = {"type": kind, **parameters}
    (tmp_path / "config.json").write_text(json.dumps(c))
    assert hf_config.read(tmp_path) == hf_config.read(folder)


@pytest.mark.parametrize("name", SOME_CASES)
def test_saved_folders_load_in_transformers_and_are_stable(made, name, tmp_path):
    folder, tokens, positions, want = made(name)
    policy = hf.load(folder)
    # With the base's files beside it, and with a config written from ours alone.
    for base in (folder, None):
        out = tmp_path / f"out-{base is None}"
        hf.save(policy, out, base=base)
        reference = transformers.AutoModelForCausalLM.from_pretrained(out)
        np.testing.assert_allclose(
            _reference_logits(reference, tokens, positions), want, atol=1e-5
        )
    assert hf.load(out).config == policy.config
    hf.save(hf.load(out), tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def _gemma_with_images():
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 4, "patch_size": 2}
    config = transformers.Gemma3Config(
        text_config=SMALL | CASES["gemma3"][1] | {"eos_token_id": None},
        vision_config=vision | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        eos_token_id=[1, 5],
        image_token_index=63,
    )
    return config, transformers.Gemma3ForConditionalGeneration


def _qwen_with_images():
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1}
    vision |= {"patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 4}
    config = transformers.Qwen3_5Config(
        text_config=SMALL | CASES["qwen3_5"][1] | {"eos_token_id": [1, 5]},
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return config, transformers.Qwen3_5ForConditionalGeneration


@pytest.mark.parametrize(
    ("make", "place", "alone"),
    [
        (_gemma_with_images, "language_model.model.", "Gemma3ForCausalLM"),
        (_gemma_with_images, "model.language_model.", "Gemma3ForCausalLM"),
        (_qwen_with_images, "model.language_model.", "Qwen3_5ForCausalLM"),
    ],
)
def test_the_language_model_of_one_that_reads_images_too(make, place, alone, tmp_path):
    """By both names that its tensors have had; what is saved is the language model."""
    config, model = make()
    torch.manual_seed(0)
    reference = model(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        _forget_less(reference)
    tensors = {
        name.replace("model.language_model.", place): x
        for name, x in reference.state_dict().items()
        if name != "lm_head.weight"  # the embedding
    }
    # Layers that draft tokens, which transformers leaves out too.
    tensors["mtp.fc.weight"] = torch.ones(2, 2)
    folder = tmp_path / "whole"
    config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    tokens = np.random.default_rng(0).integers(0, 60, size=(1, 48))
    positions = np.arange(48)[None]
    want = _reference_logits(reference, tokens, positions)
    policy = hf.load(folder)
    np.testing.assert_allclose(_logits(policy, tokens, positions), want, atol=1e-4)
    assert policy.config.stop_ids == (1, 5)
    hf.save(policy, tmp_path / "saved", base=folder)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(saved).__name__ == alone
    found = _reference_logits(saved, tokens, positions)
    np.testing.assert_allclose(found, want, atol=1e-4)
    assert hf.load(tmp_path / "saved").config == policy.config


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("smollm3", "qwen3-moe") else pytest.mark.slow)
        for x in (
            *("gemma3-untied", "olmo3", "smollm3"),
            *("qwen3-window", "qwen3_5", "qwen3-moe"),
        )
    ],
)
def test_adapters_that_peft_made_mean_the_same(made, name, tmp_path):
    import peft

    folder, tokens, positions, plain = made(name)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    # Of a model with experts peft would adapt them too.
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets = attention if name == "qwen3-moe" else "all-linear"
    how = {"r": 2, "target_modules": targets, "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **how))
    model.eval().save_pretrained(tmp_path)
    want = _reference_logits(model, tokens, positions)
    policy, adapter = hf.load(folder), lora.read_peft(tmp_path)
    sizes = {"lora_rank": adapter.rank, "lora_alpha": adapter.alpha}
    config = dataclasses.replace(policy.config, **sizes)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = lora.select(transformer.abstract_params(config))
    where = jax.tree.map(lambda _: here, shapes)
    params = lora.join(policy.params, lora.load_peft(adapter, config, where))
    adapted = transformer.Policy(config, params)
    assert np.abs(want - plain).max() > 0.1
    for same in (adapted, lora.merge(adapted)):
        np.testing.assert_allclose(_logits(same, tokens, positions), want, atol=1e-4)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 5e6])
def test_frequencies_are_those_of_torch_to_the_last_bit(theta):
    exponent = torch.arange(0, 128, 2, dtype=torch.int64).float() / 128
    want = (1.0 / theta**exponent).numpy()
    got = rope.frequencies(rope.RopeConfig(theta), 128)
    assert (got != want).sum() <= 1  # a power that torch does not round to the nearest


def test_scaled_frequencies_reduce_to_the_plain_ones():
    plain = rope.frequencies(rope.RopeConfig(theta=1e4), 64)
    for kind in ("linear", "yarn", "llama3"):
        c = rope.RopeConfig(theta=1e4, kind=kind, factor=1.0, original_positions=512)
        np.testing.assert_allclose(rope.frequencies(c, 64), plain, rtol=1e-6)


def test_loading_casts_on_the_way(made):
    policy = hf.load(made("llama")[0], dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(policy.params)} == {"bfloat16"}
