"""Folders in and out: exact, strict, whole or not at all."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from pfjax import sharding
from pfjax.policy import hf, model, tokenizer


@pytest.fixture
def folder(tmp_path, tiny_policy):
    hf.save(tiny_policy, tmp_path / "m")
    return tmp_path / "m"


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def test_saved_and_loaded_is_the_same(folder, tiny_policy):
    loaded = hf.load(folder)
    assert loaded.config == tiny_policy.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_policy.params)


def test_many_files_load_like_one_onto_a_mesh(
    folder, tiny_policy, monkeypatch, tmp_path
):
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 4_000)
    hf.save(tiny_policy, tmp_path / "many", base=folder)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    loaded = hf.load(tmp_path / "many", mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_policy.params)
    assert loaded.params["blocks"]["wq"].sharding.spec == jax.P(
        None, "fsdp", "tensor", None
    )
    assert loaded.params["head"].sharding.spec == jax.P(("fsdp", "tensor"), None)


def test_missing_unexpected_and_misshaped_tensors_are_one_error(folder):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.surprise"] = np.zeros(3, np.float32)
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-1]

    _edit_tensors(folder, edit)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    text = str(error.value)
    assert "missing model.norm.weight [16]" in text
    assert "unexpected model.layers.0.surprise" in text
    assert "up_proj.weight has shape [31, 16], expected [32, 16]" in text


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"use_sliding_window": True, "sliding_window": 64},
        {"unheard_of": 0.5},
        {"auto_map": {"AutoModel": "modeling.Model"}},
        {"architectures": ["Qwen2ForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_theta": 5e5},
    ],
)
def test_fields_that_change_the_result_are_refused_by_name(folder, change):
    _edit_config(folder, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        hf.load(folder)


def test_what_is_no_model_is_said(tmp_path, folder):
    with pytest.raises(ValueError, match="does not exist"):
        hf.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no config.json"):
        hf.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="could not be fetched"):
        hf.load("someone/some-model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        hf.load(folder)


def test_a_failed_save_leaves_the_old_folder(folder, tiny_policy, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        hf.save(tiny_policy, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_embedded_model_loads_and_reads_its_prompts():
    policy = hf.load("pfjax/toy")
    tok = tokenizer.load("pfjax/toy")
    ids = tokenizer.encode_prompt(tok, "47+35")
    assert tok.convert_ids_to_tokens(ids) == [
        "<|user|>", "4", "7", "+", "3", "5", "<|assistant|>",
    ]  # fmt: skip
    assert tokenizer.stop_ids(tok, policy.config.stop_ids) == (tok.eos_token_id,)
    text = "7+5=12,4+3+1=8;\\boxed{82}"
    assert tokenizer.decode(tok, tok.encode(text) + [tok.eos_token_id]) == text
    assert sum(x.size for x in jax.tree.leaves(policy.params)) < 1_000_000


def test_abstract_parameters_match_initialised_ones(tiny_config):
    made = model.init_params(tiny_config, jax.random.key(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        model.abstract_params(tiny_config),
        made,
    )
