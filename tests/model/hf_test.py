"""Folders in and out: exact, strict, whole or not at all."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import pfjax
from pfjax.infra import sharding, storage
from pfjax.model import (
    hf,
    hf_config,
    hub,
    rope,
    scoring,
    tokenizer,
    transformer,
    weights,
)
from pfjax.sampler import engine
from tests.conftest import run_on_two_processes
from tests.model import small_families


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
    monkeypatch.setattr(weights, "MAX_FILE_BYTES", 4_000)
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
        {"layer_types": ["linear_attention", "full_attention"]},
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": None,
        },
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


def test_a_hub_id_with_a_revision_comes_from_the_local_cache_when_offline(
    folder, tmp_path, monkeypatch, tiny_policy
):
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub/models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/v2").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path / "hub")
    for revision in ("v2", commit):
        loaded = hf.load(f"someone/small@{revision}")
        assert loaded.config == tiny_policy.config
    with pytest.raises(ValueError, match="someone/small@v1.* could not be fetched"):
        hf.load("someone/small@v1")


def test_a_tied_checkpoint_may_carry_a_copy_of_its_head(folder):
    def copy_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    _edit_config(folder, tie_word_embeddings=True)
    _edit_tensors(folder, copy_head)
    assert "head" not in hf.load(folder).params
    # Only that one is let through.
    _edit_tensors(folder, lambda t: t.update(other=np.zeros(1, np.float32)))
    with pytest.raises(ValueError, match="unexpected other"):
        hf.load(folder)


def test_a_head_of_its_own_is_read_and_written_though_the_config_ties_it(
    folder, tmp_path
):
    """As transformers does."""
    import torch
    import transformers

    _edit_config(folder, tie_word_embeddings=True)
    policy = hf.load(folder)
    assert not policy.config.tied_embeddings
    hf.save(policy, tmp_path / "again", base=folder)
    ids = [3, 5, 7, 2]
    with torch.no_grad():
        for place in (folder, tmp_path / "again"):
            model = transformers.AutoModelForCausalLM.from_pretrained(place)
            want = torch.log_softmax(model(torch.tensor([ids])).logits, -1)[0]
            want = want[range(3), ids[1:]].numpy()
            (got,) = scoring.score(hf.load(place), [ids], [1])
            np.testing.assert_allclose(got, want, atol=1e-4)


def test_of_two_sets_of_weights_that_of_transformers_is_read(folder, tiny_policy):
    """The one file, not the index beside it."""
    weight_map = {"model.norm.weight": "old.safetensors"}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    shutil.copyfile(folder / "model.safetensors", folder / "old.safetensors")
    np.testing.assert_array_equal(
        hf.load(folder).params["embed"], tiny_policy.params["embed"]
    )
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds adapters beside the model"):
        hf.load(folder)


# Of SmolLM2, unsloth's copies, transformers.js, and folders that transformers 4 wrote.
INERT = {
    "is_llama_config": True, "rope_interleaved": False, "unsloth_fixed": True,
    "unsloth_version": "2025.1", "transformers.js_config": {"dtype": "q4"},
    "_model_name_or_path": "a/b", "_commit_hash": "abc", "sep_token_id": 5,
    "decoder_start_token_id": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "typical_p": 1.0, "num_beams": 1, "max_length": 20, "pruned_heads": {},
    "task_specific_params": None, "bad_words_ids": None,
    "tf_legacy_loss": False, "is_decoder": True, "gradient_checkpointing": True,
    "use_bfloat16": True, "loss_type": "ForCausalLMLoss", "max_sequence_length": 2048,
    "hidden_act": "swish", "qkv_bias": True, "some_penalty": 0, "some_share": 0.0, "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip


def test_what_changes_nothing_is_passed_over(folder, tiny_policy):
    _edit_config(folder, **INERT)
    assert hf.load(folder).config == tiny_policy.config


@pytest.mark.parametrize(
    "field",
    [
        {"final_logit_softcapping": 30.0},
        {"is_encoder_decoder": True},
        {"pruned_heads": {"0": [1]}},
        {"logit_scale": 0.5},
    ],
)
def test_what_might_change_something_is_refused(folder, field):
    _edit_config(folder, **field)
    with pytest.raises(ValueError, match=f"pfjax does not know.*{next(iter(field))}"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "awq, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
    ],
)
def test_quantised_weights_are_refused_by_their_kind(folder, quantization, kind):
    _edit_config(folder, quantization_config=quantization)
    with pytest.raises(ValueError, match=rf"quantised \({kind}.*checkpoint") as error:
        hf.load(folder)
    assert "\n" not in str(error.value)


def test_a_folder_of_something_else_is_refused_by_what_it_is(tmp_path, tiny_policy):
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    run.mkdir()
    (run / "config.json").write_text('{"config": {}, "versions": {}}')
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=rf"run, .*`pfjax export {run}` writes .*/hf$"):
        hf.load(run)
    hf.save(tiny_policy, run / "hf")
    with pytest.raises(ValueError, match=rf"a run, its model is in hf: give {run}/hf$"):
        hub.resolve_config(run)
    assert hf.load(run / "hf").config == tiny_policy.config
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    way_out = rf"--config.model=a/b --config.lora.init_from={adapter}, or .*peft"
    with pytest.raises(ValueError, match=rf"{adapter} is an adapter.*{way_out}"):
        hf.load(adapter)


def test_stop_tokens_of_the_policy_are_exported(folder, tmp_path, tiny_policy):
    """Those it was trained with, in both places that others read them from."""
    import transformers

    generation = {"eos_token_id": 9, "pad_token_id": 0, "top_k": 5, "temperature": 0.6}
    generation |= {"repetition_penalty": 1.1, "min_p": 0.1, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = dataclasses.replace(tiny_policy.config, stop_ids=(1, 3))
    hf.save(tiny_policy._replace(config=config), tmp_path / "out", base=folder)
    assert hf.load(tmp_path / "out").config.stop_ids == (1, 3)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == [1, 3] and generation.pad_token_id == 0
    # Nothing else shapes what is sampled: the policy was not trained to be sampled so.
    said = json.loads((tmp_path / "out/generation_config.json").read_text())
    shaping = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert said == {"eos_token_id": [1, 3], "pad_token_id": 0} | shaping
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [
        1,
        3,
    ]


@pytest.mark.parametrize("token", [-1, 16, 99])
def test_a_token_that_the_model_lacks_is_refused(tiny_policy, token):
    with pytest.raises(
        ValueError, match=f"sequence 1 holds token id {token}, the model"
    ):
        scoring.score(tiny_policy, [[3, 4], [5, token]], [1, 1])
    with pytest.raises(
        ValueError, match=f"sequence 1 holds token id {token}, the model"
    ):
        engine.rollout(tiny_policy, [[3, 4], [5, token]], 1, 2)


def test_a_base_that_is_another_model_is_refused(folder, tmp_path, tiny_policy):
    rope = dataclasses.replace(tiny_policy.config.rope, theta=123.0)
    config = dataclasses.replace(tiny_policy.config, rope=rope, max_positions=64)
    other = transformer.Policy(config, tiny_policy.params)
    with pytest.raises(
        ValueError, match=r"max_position_embeddings \(128, the policy 64"
    ):
        hf.save(other, tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="rope_parameters"):
        hf.save(other, tmp_path / "out", base=folder)
    with pytest.raises(ValueError, match="dtype='float64': must be one of"):
        hf.save(tiny_policy, tmp_path / "out", dtype="float64")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "model.safetensors.index.json",
            "{}",
            "index.json is not an index of .*weight_map",
        ),
        ("model.safetensors.index.json", "{nothing", "index.json is not an index of"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 5}}', "is not an index"),
        ("config.json", "nothing", "^[^ ]*config.json is not JSON"),
    ],
)
def test_a_broken_json_file_is_named_once(folder, name, text, said):
    (folder / name).write_text(text)
    if "index" in name:
        (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=said):
        hf.load(folder)


def test_a_failed_save_leaves_the_old_folder(folder, tiny_policy, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(weights, "_write_file", fail)
    with pytest.raises(OSError, match=f"disk full: '{folder}'"):
        hf.save(tiny_policy, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_link_stays_and_what_it_points_to_is_replaced(folder, tmp_path, tiny_policy):
    link = tmp_path / "link"
    link.symlink_to(folder)
    (folder / "config.json").unlink()
    hf.save(tiny_policy, link)
    assert link.is_symlink() and hf.load(folder).config == tiny_policy.config


@pytest.mark.parametrize("name", ["notes.md", "checkpoint-1/optimizer.pt", ".git/HEAD"])
def test_what_is_not_of_a_model_is_not_replaced_with_it(folder, tiny_policy, name):
    hf.save(tiny_policy, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=name.partition("/")[0]):
        hf.save(tiny_policy, folder)
    assert (folder / name).read_text() == "mine"


def test_a_folder_that_cannot_be_replaced_is_refused_before_anything_is_lost(
    folder, tiny_policy, monkeypatch
):
    monkeypatch.chdir(folder)
    for name in (".", "", folder.parent):
        with pytest.raises(ValueError, match="choose a folder inside"):
            hf.save(tiny_policy, name)
    monkeypatch.chdir("/")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    with pytest.raises(ValueError, match="mount point"):
        hf.save(tiny_policy, folder)
    assert hf.load(folder).config == tiny_policy.config


def test_stop_tokens_that_only_the_tokenizer_knows_are_exported(tmp_path):
    policy = pfjax.load("pfjax/toy")
    none = dataclasses.replace(policy.config, stop_ids=())
    hf.save(policy._replace(config=none), tmp_path / "out")
    assert hf.load(tmp_path / "out").config.stop_ids == (1,)


def test_files_are_those_of_the_library_and_keep_the_base_type(tmp_path, tiny_policy):
    hf.save(tiny_policy, tmp_path / "half", dtype="bfloat16")
    tensors = safetensors.numpy.load_file(tmp_path / "half/model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}
    assert len((tmp_path / "half/model.safetensors").read_bytes()) % 8 == 0
    # Trained in float32, exported in the type of its base.
    hf.save(hf.load(tmp_path / "half"), tmp_path / "again", base=tmp_path / "half")
    for file in ("model.safetensors", "config.json"):
        same = [(tmp_path / d / file).read_bytes() for d in ("half", "again")]
        assert same[0] == same[1]


_WRONG = ("x", -1, 0, 1.5, True, [], {}, [1], None)
_HARMLESS = {
    "head_dim": (None,),
    "num_key_value_heads": (None,),
    "rms_norm_eps": (1.5,),
    "rope_theta": (1.5, None),
    "tie_word_embeddings": (True, None),
    "eos_token_id": (0, [], [1], None),
    "model_type": (),
    "rope_scaling": (0, [], {}, None),  # as if it were not there
    **dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ),
        (),
    ),
}


@pytest.mark.parametrize("name", _HARMLESS)
def test_a_config_that_no_model_can_have_is_refused_by_its_field(name, tmp_path):
    config = json.loads((hub.resolve("pfjax/toy") / "config.json").read_text())
    has_type = lambda x, xs: any(x == y and type(x) is type(y) for y in xs)
    for value in _WRONG:
        text = json.dumps(config | {name: value})
        (tmp_path / "config.json").write_text(text)
        if has_type(value, _HARMLESS[name]):
            hf_config.read(tmp_path)
            continue
        with pytest.raises(
            ValueError, match=rf"config\.json.* {name}|{tmp_path}.* {name}"
        ):
            hf_config.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "{", '"x"', "\udcff"])
def test_a_config_that_is_no_object_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{path} (is not JSON|holds a)"):
        hf_config.read(tmp_path)


@pytest.mark.slow
def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    """500 M parameters in bfloat16, in a process of their own."""
    config = {
        "model_type": "qwen2", "vocab_size": 32_000, "hidden_size": 1024,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 3072, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "eos_token_id": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    write = """
import json, pathlib, sys, numpy as np, jax.numpy as jnp
from pfjax.model import hf_config, transformer, weights
folder = pathlib.Path(sys.argv[1])
block = np.random.default_rng(0).integers(0, 0x7F00, 2**20).astype(np.uint16)  # finite
class Leaf:
    def __init__(self, shape): self.shape = shape
config = hf_config.read(folder)
shapes = transformer.abstract_params(config)
dtype = jnp.dtype("bfloat16")
tensors = {
    name: (shape, lambda n=int(np.prod(shape)): np.resize(block, n).view(dtype))
    for name, (shape, _) in weights._hf_tensors(config, shapes, dtype).items()
}
weights._write_file(folder / "model.safetensors", tensors, dtype)
"""
    read = """
import resource, sys, jax
from pfjax.model import hf
jax.numpy.zeros(1).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
policy = hf.load(sys.argv[1], dtype="bfloat16")
jax.block_until_ready(policy.params)
size = sum(x.nbytes for x in jax.tree.leaves(policy.params))
print(size, (peak() - before) / size)
"""
    for code in (write, read):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    size, ratio = done.stdout.split()
    assert int(size) > 2 * 450e6
    assert float(ratio) < 1.5


@pytest.mark.slow
def test_two_processes_load_what_one_does(folder, tmp_path, tiny_policy):
    """A model in many files onto 2 processes of 4 devices, and out of them again."""
    out = tmp_path / "out"
    code = """
from pfjax.infra import sharding, storage
from pfjax.model import hf
source, out = args
policy = hf.load(source, sharding.make_mesh(data=1, fsdp=4, tensor=2))
assert not policy.params["head"].is_fully_addressable
hf.save(policy, out)
"""
    run_on_two_processes(code, folder, out)
    loaded = hf.load(out)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_policy.params)


def test_embedded_model_loads_and_reads_its_prompts():
    policy = hf.load("pfjax/toy")
    tok = tokenizer.load("pfjax/toy")
    ids = tokenizer.encode_prompt(tok, "47+35")
    assert tok.convert_ids_to_tokens(ids) == [
        "<|user|>", "4", "7", "+", "3", "5", "<|assistant|>",
    ]  # fmt: skip
    assert tokenizer.stop_ids(tok, policy.config) == (tok.eos_token_id,)
    text = "7+5=12,4+3+1=8;\\boxed{82}"
    assert tokenizer.decode(tok, tok.encode(text) + [tok.eos_token_id]) == text
    assert sum(x.size for x in jax.tree.leaves(policy.params)) < 1_000_000


def test_abstract_parameters_match_initialised_ones(tiny_config):
    made = transformer.init_params(tiny_config, jax.random.key(0))
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)),
        transformer.abstract_params(tiny_config),
        made,
    )


def test_a_model_is_saved_to_a_bucket_and_loaded_from_it(bucket):
    """An old one is replaced; what is none is refused as in a folder."""
    policy = hf.load("pfjax/toy")
    storage.write_text(f"{bucket}/m/model-00001-of-00002.safetensors", "old")
    for scale in (1.0, 2.0):  # the newest is loaded
        params = {**policy.params, "embed": scale * policy.params["embed"]}
        hf.save(policy._replace(params=params), f"{bucket}/m", base="pfjax/toy")
        found = hf.load(f"{bucket}/m")
        np.testing.assert_array_equal(found.params["embed"], params["embed"])
    assert not storage.exists(f"{bucket}/m/model-00001-of-00002.safetensors")
    storage.write_text(f"{bucket}/run/metrics.jsonl", "")
    storage.write_text(f"{bucket}/run/hf/config.json", "{}")
    storage.write_text(f"{bucket}/other/x", "")
    for name, said in (
        ("run", f"its model is in hf: give {bucket}/run/hf"),
        ("other", f"model folder {bucket}/other has no config.json"),
        ("none", f"model folder {bucket}/none does not exist"),
        ("none.gguf", f"{bucket}/none.gguf does not exist"),
    ):
        with pytest.raises(ValueError, match=said):
            hub.resolve(f"{bucket}/{name}")
    with pytest.raises(ValueError, match="something other than a model"):
        hf.save(policy, f"{bucket}/other")


def test_a_model_without_stop_tokens_is_saved_with_none(folder, tmp_path, tiny_policy):
    """transformers fails on an empty list."""
    config = dataclasses.replace(tiny_policy.config, stop_ids=())
    for kwargs in ({}, {"base": folder}):
        hf.save(tiny_policy._replace(config=config), tmp_path / "out", **kwargs)
        for name in ("config.json", "generation_config.json"):
            said = json.loads((tmp_path / "out" / name).read_text())
            assert said["eos_token_id"] is None
        assert hf.load(tmp_path / "out").config.stop_ids == ()


YARN = rope.RopeConfig(2e4, "yarn", factor=4.0, original_positions=32)


@pytest.mark.parametrize("scaling", [rope.RopeConfig(2e4), YARN])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "olmo3"])
def test_a_saved_config_says_the_same_in_the_names_of_transformers_4(
    name, scaling, tmp_path, tiny_config
):
    import transformers

    config = small_families.config_of(name, tiny_config, window=4)
    config = dataclasses.replace(config, rope=scaling, stop_ids=(1,))
    policy = transformer.Policy(
        config, transformer.init_params(config, jax.random.key(0))
    )
    hf.save(policy, tmp_path / "out", dtype="bfloat16")
    # Of a base in the newer names alone, too.
    path = tmp_path / "out/config.json"
    said = json.loads(path.read_text())
    older = ("rope_theta", "rope_scaling", "torch_dtype", "rope_local_base_freq")
    new = {k: x for k, x in said.items() if k not in older}
    shutil.copytree(tmp_path / "out", tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(new))
    hf.save(policy, tmp_path / "again", base=tmp_path / "base")
    assert json.loads((tmp_path / "again/config.json").read_text()) == said
    assert said["torch_dtype"] == said["dtype"] == "bfloat16"
    assert said["rope_theta"] == 2e4
    assert said.get("rope_local_base_freq") == (100.0 if name == "gemma3" else None)
    assert said.get("rope_scaling", {}).get("factor") == (
        4.0 if scaling is YARN else None
    )
    assert hf.load(tmp_path / "out").config == config
    found, want = (
        transformers.AutoConfig.from_pretrained(tmp_path / x) for x in ("out", "base")
    )
    assert found.rope_parameters == want.rope_parameters
    # Alone they are read as the same model, but for a window's own rope.
    (tmp_path / "out/config.json").write_text(
        json.dumps({k: x for k, x in said.items() if k != "rope_parameters"})
    )
    if name != "olmo3":
        assert hf.load(tmp_path / "out").config == config


def test_of_a_base_only_what_belongs_to_its_tokenizer_and_its_terms_is_exported(
    folder, tmp_path, tiny_policy
):
    kept = (
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
        "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
        "special_tokens_map.json", "preprocessor_config.json", "LICENSE",
    )  # fmt: skip
    left = (
        "model.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "rust_model.ot",
        "pytorch_model.bin.index.json", "trainer_state.json", "eval_results.json",
        "params.json", "consolidated.safetensors", ".gitattributes", "mergekit.yml",
        "onnx/config.json", "adapter_model.bin", "README.md", "data.jsonl",
    )  # fmt: skip
    for name in (*kept, *left):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    hf.save(tiny_policy, tmp_path / "out", base=folder)
    found = [x for x in (tmp_path / "out").rglob("*") if x.is_file()]
    found = {str(x.relative_to(tmp_path / "out")) for x in found}
    own = {"config.json", "generation_config.json", "model.safetensors"}
    assert found == {*kept, *own}


def test_a_pointer_of_git_lfs_is_named(folder):
    assert hub.resolve(folder) == folder
    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1044992\n"
    )
    for name in ("tokenizer.model", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text(pointer)
        said = rf"{folder}/{name} is a pointer of git LFS.* `git lfs pull`"
        with pytest.raises(ValueError, match=said):
            hub.resolve(folder)
        assert hub.resolve_config(folder) == folder
        (folder / name).unlink()
    (folder / "m.gguf").write_text(pointer)
    with pytest.raises(ValueError, match="m.gguf is a pointer"):
        hub.resolve(folder / "m.gguf")


def test_a_file_of_a_model_is_answered_with_its_folder(folder):
    for name in ("config.json", "model.safetensors"):
        said = f"{name} is a file: give the folder of the model, {folder}$"
        with pytest.raises(ValueError, match=said):
            hub.resolve(folder / name)


def test_the_same_weights_again_are_neither_fetched_nor_part_of_a_fingerprint(
    folder, monkeypatch
):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.model",
        "model.safetensors.index.json", "additional_chat_templates/tool_use.jinja",
    ]  # fmt: skip
    others = [
        "consolidated.safetensors", "checkpoint-500/model.safetensors", "pytorch_model.bin",
        "checkpoint-500/trainer_state.json", "original/params.json", "onnx/model.onnx",
    ]  # fmt: skip
    found = []

    def fetch(hub_id, revision, local_files_only, **patterns):
        found.extend(filter_repo_objects([*wanted, *others], **patterns))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    hub.resolve("someone/some-model")
    assert found == wanted
    before = hub.fingerprint(folder)
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert hub.fingerprint(folder) == before
    shutil.copyfile(folder / "model.safetensors", folder / "other.safetensors")
    assert hub.fingerprint(folder) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused_by_their_tensor(
    tmp_path, tiny_policy, dtype, value
):
    hf.save(tiny_policy, tmp_path / "m", dtype=dtype)

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value

    _edit_tensors(tmp_path / "m", spoil)
    with pytest.raises(
        ValueError, match=r"model.safetensors holds NaN .*1.mlp.up_proj"
    ):
        hf.load(tmp_path / "m")


@pytest.mark.parametrize("size", [1, weights._CHECKED, 2 * weights._CHECKED + 3])
def test_every_number_is_looked_at(size):
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        dtype = jax.numpy.dtype(dtype)
        largest = np.full(size, np.float64(jax.numpy.finfo(dtype).max)).astype(dtype)
        assert weights._is_finite(largest) and weights._is_finite(-largest)
        for at in {0, size // 2, size - 1}:
            spoilt = largest.copy()
            spoilt[at] = np.inf
            assert not weights._is_finite(spoilt)


def test_what_float16_cannot_hold_is_refused(folder, tmp_path, tiny_policy):
    params = {
        **tiny_policy.params,
        "embed": tiny_policy.params["embed"].at[0, 0].set(1e6),
    }
    policy = tiny_policy._replace(params=params)
    said = r"embed_tokens.weight holds values that float16 .* bfloat16 or float32"
    with pytest.raises(ValueError, match=said):
        hf.save(policy, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    hf.save(policy, tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ValueError, match=said):
        hf.load(tmp_path / "out", dtype="float16")


def test_what_float32_cannot_hold_is_refused(folder):
    def edit(tensors):
        x = tensors["model.norm.weight"].astype(np.float64)
        tensors["model.norm.weight"] = x * 1e300

    _edit_tensors(folder, edit)
    with pytest.raises(
        ValueError, match="norm.weight holds values that float32 cannot"
    ):
        hf.load(folder)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool"])
def test_tensors_that_are_no_weights_are_refused(folder, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    _edit_tensors(folder, lambda t: t.update({name: t[name].astype(dtype)}))
    with pytest.raises(
        ValueError, match=f"{name} is of type [UIB][A-Z0-9]+, no weights"
    ):
        hf.load(folder)


def test_a_tied_checkpoint_may_hold_the_matrix_by_its_other_name(folder):
    """As transformers."""
    _edit_config(folder, tie_word_embeddings=True)
    _edit_tensors(folder, lambda t: t.pop("lm_head.weight", None))
    want = hf.load(folder)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    _edit_tensors(folder, lambda t: t.update({names[0]: t.pop(names[1])}))
    found = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, want.params)
    assert weights.stored_dtype(folder) == "float32"


def test_fields_of_other_implementations_may_say_what_is_so_anyway(
    tmp_path, tiny_config
):
    config = small_families.config_of("qwen3_moe", tiny_config, window=0)
    said = hf_config.to_json(config, "float32")
    # As of Qwen3-Coder.
    same = {
        "use_qk_norm": True,
        "qkv_bias": False,
        "shared_expert_intermediate_size": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(said | same))
    read = dataclasses.replace(hf_config.read(tmp_path), load_tokenizer=None)
    assert read == dataclasses.replace(config, dtype=read.dtype)
    for name, value in (
        ("use_qk_norm", False),
        ("qkv_bias", True),
        ("shared_expert_intermediate_size", 64),
    ):
        (tmp_path / "config.json").write_text(json.dumps(said | {name: value}))
        with pytest.raises(ValueError, match=f"sets {name}={value}: not supported"):
            hf_config.read(tmp_path)


def test_a_width_of_heads_that_is_null_is_that_of_the_hidden_size(
    tmp_path, tiny_config
):
    config = small_families.config_of("qwen3_5", tiny_config, window=0)
    said = hf_config.to_json(config, "float32") | {"head_dim": None}
    said["num_attention_heads"] = 2
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert hf_config.read(tmp_path).head_dim == config.embed_dim // 2
