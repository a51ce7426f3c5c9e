"""What configs on the hub say of layers, and that one file makes a family."""

import dataclasses
import json
import re

import numpy as np
import pytest
import transformers

from pfjax.model import experts, hf_config, hub, rope, transformer
from pfjax.model.config import LayerKind
from pfjax.model.families import FAMILIES

MOE = "Qwen/Qwen3-30B-A3B"
SMOLLM = "HuggingFaceTB/SmolLM3-3B"
GEMMA, OLMO = "google/gemma-3-1b-it", "allenai/OLMo-2-0425-1B-Instruct"
QWEN = "Qwen/Qwen3.5-0.8B"
# As published (of Qwen3.5, as other projects quote it); those of recipes ship with the
# package.
SHARED = {"rms_norm_eps": 1e-6, "rope_scaling": None, "attention_bias": False}
HUB = {
    MOE: {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    SMOLLM: {
        "architectures": ["SmolLM3ForCausalLM"],
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "mistralai/Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
}


for _name in (GEMMA, OLMO, QWEN):
    HUB[_name] = json.loads((hub.resolve_config(_name) / "config.json").read_text())


def _read(folder, config):
    (folder / "config.json").write_text(json.dumps(SHARED | config))
    return hf_config.read(folder)


def _windows(config):
    return [kind.window for kind in config.layer_kinds]


def test_gemma_of_the_hub(tmp_path):
    c = _read(tmp_path, HUB[GEMMA])
    assert _windows(c) == ([512] * 5 + [0]) * 4 + [512] * 2
    assert {kind.rope.theta for kind in c.layer_kinds if kind.window} == {1e4}
    assert {kind.rope.theta for kind in c.layer_kinds if not kind.window} == {1e6}
    assert c.tied_embeddings and c.stop_ids == (1, 106)
    size = sum(np.prod(x.shape) for x in _leaves(c))
    assert size == 999_885_952  # as published


def test_qwen_with_experts_of_the_hub(tmp_path):
    c = _read(tmp_path, HUB[MOE])
    assert sum(np.prod(x.shape) for x in _leaves(c)) == 30_532_122_624  # as published
    assert c.experts == experts.Routing(128, 768, 8, is_normalised=True)
    assert c.rope == rope.RopeConfig(1e6) and set(_windows(c)) == {0}
    shapes = transformer.abstract_params(c)["blocks"]
    assert shapes["w_down"].shape == (48, 128, 768, 2048)
    # Adapters are of attention, if experts are not named.
    adapted = dataclasses.replace(c, lora_rank=2).adapted
    assert adapted == ("wq", "wk", "wv", "wo")
    # As transformers 5 writes it.
    renamed = {k: v for k, v in HUB[MOE].items() if k != "num_experts"}
    assert _read(tmp_path, renamed | {"num_local_experts": 128}) == c


def test_larger_gemmas_are_read_without_their_images(tmp_path):
    """The config of google/gemma-3-4b-it, which leaves out what is as usual."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    scaling = {"factor": 8.0, "rope_type": "linear"}
    text |= {"model_type": "gemma3_text", "rope_scaling": scaling}
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": text | {"sliding_window": 1024},
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(whole))
    c = hf_config.read(tmp_path)
    assert sum(np.prod(x.shape) for x in _leaves(c)) == 3_880_263_168
    assert c.rope == rope.RopeConfig(1e6, "linear", 8.0)
    assert c.local_rope == rope.RopeConfig(1e4)
    assert c.stop_ids == (1, 106) and c.max_positions == 131_072
    assert _windows(c).count(1024) == 29
    # What else has a language model of a known family inside is not it.
    llava = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    for change, message in (
        (llava, "model_type 'llava'"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "architectures="),
        ({"auto_map": {"AutoModel": "x"}}, "auto_map"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"text_config": text | {"model_type": "llama"}}, "text_config.model_type="),
        ({"text_config": text | {"model_type": []}}, "text_config.model_type="),
        ({"text_config": 3}, "text_config=3"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=message):
            hf_config.read(tmp_path)


def test_smollm_of_the_hub(tmp_path):
    listed = HUB[SMOLLM]
    c = _read(tmp_path, listed)
    none = [i for i, kind in enumerate(c.layer_kinds) if kind.rope is None]
    assert none == [*range(3, 36, 4)]
    assert _windows(c) == [0] * 36 and c.tied_embeddings
    # Without the list its rule says the same, and is what is written.
    rule = {k: v for k, v in listed.items() if k != "no_rope_layers"}
    by_rule = _read(tmp_path, rule)
    assert by_rule.layer_kinds == c.layer_kinds
    written = hf_config.to_json(by_rule, "float32")
    assert transformers.SmolLM3Config(**written).no_rope_layers == [1, 1, 1, 0] * 9


def test_qwen_with_states_of_the_hub(tmp_path):
    c = _read(tmp_path, HUB[QWEN])
    assert c.period == ("linear_attention",) * 3 + ("full_attention",)
    assert _windows(c) == [None, None, None, 0] * 6
    assert c.rope == rope.RopeConfig(1e7, rotated=0.25) and c.stop_ids == (248044,)
    shapes = transformer.abstract_params(c)["blocks"]
    assert shapes["wq"].shape == (6, 1024, 8, 512)
    assert shapes["w_mixed"].shape == (18, 1024, 6144)
    assert shapes["w_up"].shape == (24, 1024, 3584)
    assert sum(np.prod(x.shape) for x in _leaves(c)) == 752_393_024
    text = HUB[QWEN]["text_config"]
    for change, message in (
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid'"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types="),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads=0"),
        ({"linear_num_key_heads": 5}, "linear_num_key_heads=5"),
        ({"full_attention_interval": 0}, "full_attention_interval=0"),
        ({"rope_parameters": {"partial_rotary_factor": 0}}, "rotary_factor=0"),
        ({"rope_parameters": {"partial_rotary_factor": True}}, "rotary_factor=True"),
        ({"rope_parameters": {"partial_rotary_factor": "x"}}, "rotary_factor='x'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "rotary_factor=0.1"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "rotary_factor=2"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            _read(tmp_path, HUB[QWEN] | {"text_config": text | change})


def test_olmo_and_mistral_of_the_hub(tmp_path):
    c = _read(tmp_path, HUB[OLMO])
    shapes = transformer.abstract_params(c)["blocks"]
    assert shapes["q_norm"].shape == (16, 16, 128)
    assert c.layer_kinds == (LayerKind(0, rope.RopeConfig(5e5)),) * 16
    c = _read(tmp_path, HUB["mistralai/Mistral-7B-v0.1"])
    assert _windows(c) == [4096] * 32


def test_a_window_as_wide_as_the_positions_hides_nothing(tmp_path):
    mistral = HUB["mistralai/Mistral-7B-v0.1"]
    c = _read(tmp_path, mistral | {"max_position_embeddings": 4096})
    assert _windows(c) == [0] * 32
    # The layers of Gemma still differ, in their ropes.
    gemma = HUB[GEMMA] | {"max_position_embeddings": 512}
    assert len(set(_read(tmp_path, gemma).layer_kinds)) == 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (GEMMA, {"final_logit_softcapping": 30.0}),
        (GEMMA, {"use_bidirectional_attention": True}),
        (GEMMA, {"hidden_activation": "gelu"}),
        (GEMMA, {"query_pre_attn_scalar": "x"}),
        (GEMMA, {"sliding_window": 0}),
        (SMOLLM, {"no_rope_layers": 3}),
        (OLMO, {"clip_qkv": 8.0}),
        (MOE, {"mlp_only_layers": [0]}),
        (MOE, {"decoder_sparse_step": 2}),
        (MOE, {"shared_expert_intermediate_size": 512}),
        (MOE, {"num_local_experts": 64}),
        (MOE, {"num_experts_per_tok": 129}),
        (OLMO, {"attention_bias": "yes"}),
    ],
)
def test_what_a_family_does_not_know_is_refused_by_name(tmp_path, name, change):
    with pytest.raises(ValueError, match=re.escape(next(iter(change)))):
        _read(tmp_path, HUB[name] | change)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (GEMMA, "query_pre_attn_scalar"),
        (GEMMA, "sliding_window"),
        (GEMMA, "sliding_window_pattern"),
        (GEMMA, "rope_local_base_freq"),
        (GEMMA, "layer_types"),
        (SMOLLM, "no_rope_layers"),
        (SMOLLM, "no_rope_layer_interval"),
        (SMOLLM, "max_window_layers"),
        (SMOLLM, "mlp_bias"),
        (OLMO, "attention_bias"),
        (MOE, "moe_intermediate_size"),
        (MOE, "norm_topk_prob"),
        (MOE, "num_experts"),
        (MOE, "num_experts_per_tok"),
    ],
)
@pytest.mark.parametrize("value", ["x", -1, 1.5, [1], {"a": 1}, [[]], [[]] * 26])
def test_values_that_no_model_can_have_are_refused_by_name(
    tmp_path, name, field, value
):
    if (field, value) == ("rope_local_base_freq", 1.5):
        return
    with pytest.raises(ValueError, match=field):
        _read(tmp_path, HUB[name] | {field: value})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (GEMMA, {"sliding_window_pattern": None}),
        (GEMMA, {"rope_local_base_freq": None}),
        (SMOLLM, {"no_rope_layer_interval": None, "no_rope_layers": None}),
        (SMOLLM, {"max_window_layers": None, "use_sliding_window": True}),
        (OLMO, {"original_max_position_embeddings": None}),
    ],
)
def test_null_is_as_if_it_were_not_there(tmp_path, name, change):
    assert _read(tmp_path, HUB[name] | change) == _read(
        tmp_path, {k: v for k, v in (HUB[name] | change).items() if v is not None}
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_theta": -1.0}, "rope_theta must be a positive"),
        ({"rope_theta": 1.0}, "base must be above 1"),
        ({"rope_theta": True}, "rope_theta must be"),
        ({"rope_type": "linear", "factor": -8.0}, "factor must be"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor must be"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}, "beta_fast must be"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": -1.0}, "mscale must not"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}
            | {"high_freq_factor": 4.0},
            "low_freq_factor below",
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0},
            "but no low_freq_factor",
        ),
        (
            {"rope_type": "longrope", "factor": 4.0, "long_factor": [1.0]},
            "'longrope' is none of default, linear",
        ),
        (
            {"rope_type": "yarn", "factor": 4.0}
            | {"original_max_position_embeddings": 512},
            "original_max_position_embeddings=1024 beside",
        ),
    ],
)
def test_ropes_that_no_model_can_have_are_refused_by_name(
    tmp_path, parameters, message
):
    config = HUB[OLMO] | {"rope_theta": None, "rope_parameters": parameters}
    config["original_max_position_embeddings"] = 1024
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, config)


@pytest.mark.parametrize("model_type", ["gemma3_text", "olmo3"])
@pytest.mark.parametrize("beside", [{}, {"sliding_attention": {"rope_theta": 5e3}}])
def test_a_rope_of_no_type_is_refused_where_types_have_their_own(
    tmp_path, model_type, beside
):
    """transformers passes over it: its Gemma 3 would keep a base of 1e6."""
    config = HUB[GEMMA if model_type == "gemma3_text" else OLMO]
    config = config | {"model_type": model_type, "architectures": None}
    config |= {"rope_theta": None, "rope_parameters": {"rope_theta": 5e4} | beside}
    with pytest.raises(ValueError, match="full_attention and sliding_attention"):
        _read(tmp_path, config)


def test_a_base_beside_the_parameters_stands_in_for_one_within(tmp_path):
    default = {"rope_theta": 2e5, "rope_parameters": {"rope_type": "default"}}
    assert _read(tmp_path, HUB[OLMO] | default).rope.theta == 2e5
    # And says nothing of layers with a window.
    types = {"full_attention": {}, "sliding_attention": {"rope_theta": 5e3}}
    c = _read(tmp_path, HUB[GEMMA] | {"rope_theta": 2e5, "rope_parameters": types})
    assert (c.rope.theta, c.local_rope.theta) == (2e5, 5e3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (GEMMA, {"head_dim": 255}, "head_dim"),
        (MOE, {"use_sliding_window": True}, "sets use_sliding_window=True: not supported"),
        (OLMO, {"quantization_config": "fp8"}, r"quantised \(fp8"),
        ("mistralai/Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "types"),
        (OLMO, {"model_type": "olmo3", "rope_theta": 1e6, "architectures": None}, "rope_theta"),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused(tmp_path, name, change, message):
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, HUB[name] | change)


@pytest.mark.parametrize("name", HUB)
def test_configs_are_written_as_they_are_read(tmp_path, name):
    c = _read(tmp_path, HUB[name])
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_json(c, "float32")))
    assert hf_config.read(tmp_path) == c


def test_every_parameter_has_a_tensor_of_its_own():
    for family in FAMILIES.values():
        sizes = dict.fromkeys(("num_heads", "num_kv_heads", "vocab_size"), 2)
        sizes |= dict.fromkeys(("embed_dim", "num_layers", "head_dim", "mlp_dim"), 2)
        flags = {x: True for x in family.own_fields() if x.endswith("_bias")}
        c = family(
            **sizes, **flags, rope=rope.RopeConfig(1e4), norm_eps=1e-6,
            tied_embeddings=False, max_positions=8, stop_ids=(1,), lora_rank=2,
        )  # fmt: skip
        names = [x.name for x in transformer.tensors(c).values()]
        assert len(set(names)) == len(names) == len(_leaves(c))


def _leaves(config):
    shapes = transformer.abstract_params(config)
    return [x for part in (shapes.pop("blocks"), shapes) for x in part.values()]
