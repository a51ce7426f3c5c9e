"""Every recipe trains two steps on a small random model of its family."""

import importlib
import json
import pathlib

import pytest
import transformers

from pfjax.infra import dataset_io
from pfjax.model import hub
from pfjax.trainer import loop, recipes

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SHARED = {"default", "reasoning", "creative", "smoke", "study"}
RECIPES = sorted({p.stem for p in CONFIGS.glob("*.py")} - SHARED)


def test_all_recipes_are_there():
    assert RECIPES == [
        "creative_qwen2_5_1_5b_instruct",
        "creative_qwen2_5_3b_instruct",
        "creative_qwen2_5_7b_instruct",
        "gemma3_1b_it",
        "llama3_2_3b_instruct",
        "olmo2_1b_instruct",
        "qwen2_5_0_5b_gsm8k",
        "qwen2_5_1_5b",
        "qwen2_5_math_1_5b",
        "qwen2_5_math_7b",
        "qwen3_30b_a3b",
        "qwen3_5_0_8b",
        "qwen3_5_2b",
    ]


def test_the_recipe_for_one_gpu_takes_alpha_as_its_argument():
    assert recipes.recipe("qwen2_5_0_5b_gsm8k").alpha == 2
    assert recipes.recipe("qwen2_5_0_5b_gsm8k:4").alpha == 4


def _small_model(folder, family):
    """Random weights, the embedded tokenizer, the family's rope and windows."""
    own = {"rope_parameters": {"rope_theta": 1e6}}
    if family == "llama":
        own["rope_parameters"] = {
            "rope_theta": 5e5,
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if family == "gemma3_text":
        types = ["sliding_attention", "full_attention"]
        own = {"sliding_window": 4, "layer_types": types, "head_dim": 8}
    if family == "qwen3_5_text":
        types = ["linear_attention", "full_attention"]
        own = {"layer_types": types, "head_dim": 8, "linear_num_key_heads": 2}
        own |= {"linear_num_value_heads": 4, "linear_key_head_dim": 4}
        own |= {"linear_value_head_dim": 4}
    if family == "qwen3_moe":
        own |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        own |= {"head_dim": 8, "norm_topk_prob": True}
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        **own,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in hub.resolve("pfjax/toy").glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    template = hub.resolve("pfjax/toy") / "chat_template.jinja"
    (folder / template.name).write_bytes(template.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    expected = {"l": 2.0, "g": 2.0, "o": 2.0, "q": 4.0, "c": 0.5}[name[0]]
    of_chat_models = name.endswith("gsm8k") or name.startswith("qwen3")
    assert config.alpha == (2.0 if of_chat_models else expected)
    assert (config.format_penalty == 0) == (name[0] == "c")
    families = {"l": "llama", "g": "gemma3_text", "o": "olmo2"}
    family = families.get(name[0], "qwen2")
    family = "qwen3_5_text" if name.startswith("qwen3_5") else family
    family = "qwen3_moe" if name == "qwen3_30b_a3b" else family
    config.model = str(_small_model(tmp_path, family))
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": "1+2", "answer": "3"}))
    config.data.train = str(tmp_path / "p.jsonl")
    config.data.eval = config.data.eval and config.data.train
    config.num_steps = 2
    config.max_new_tokens, config.pack_length = 8, 128
    config.prompts_per_step, config.samples_per_prompt = 8, 2
    config.eval_samples = 2
    loop.train_and_evaluate(config, str(tmp_path / "run"))
    rows = dataset_io.read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2]
    card = (tmp_path / "run/hf/README.md").read_text()
    assert f"alpha {config.alpha:g}" in card and "\n2 steps of " in card
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf")
