"""GGUF files as llama.cpp writes them: the same policy, and the same tokens."""

import json
import shutil
import sys

import gguf
import jax
import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from pfjax.model import hf, hub, scoring, tokenizer
from tests.conftest import ROOT

MERGES = ["h e", "Ġ t", "Ġt he", "1 2", "12 3", "123 4", "Ġ 1", "Ġ ."]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WHOLE = "<think>"  # one token, though not special
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
SIZES = {
    "vocab_size": 256 + len(MERGES) + len(SPECIAL) + 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 266,
}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/pfjax/gguf"


def _model(family, **changes):
    """Random; norms and biases too, which are constants in a new model."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **(SIZES | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim == 1 else 0.1
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def _write(
    path,
    model,
    kind="F32",
    pre="qwen2",
    extra=(),
    tensors=(),
    arch=None,
    merges=MERGES,
):
    """As `convert_hf_to_gguf.py` of llama.cpp, and its names from its package."""
    c, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch or c.model_type)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if c.model_type == "qwen3":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.model_type == "llama":
        writer.add_rope_dimension_count(c.head_dim)
        writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    merged = [pair.replace(" ", "") for pair in MERGES]
    tokens = [*sorted(ByteLevel.alphabet()), *merged, *SPECIAL, WHOLE]
    writer.add_token_list(tokens)
    types = dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL)
    types[WHOLE] = gguf.TokenType.USER_DEFINED
    writer.add_token_types([types.get(t, gguf.TokenType.NORMAL) for t in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(c.eos_token_id)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_chat_template(TEMPLATE)
    for name, value in dict(extra).items():
        writer.add_uint32(name, value)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[c.model_type.upper()], c.num_hidden_layers
    )
    for name, value in model.state_dict().items():
        x = value.numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
        n = heads.get(name.split(".")[-2])
        if c.tie_word_embeddings and name == "lm_head.weight":
            continue
        if c.model_type == "llama" and n:
            halves = x.reshape(n, 2, x.shape[0] // n // 2, *x.shape[1:])
            x = halves.swapaxes(1, 2).reshape(x.shape)
        of = kind if x.ndim > 1 else gguf.GGMLQuantizationType.F32
        of_gguf = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(of_gguf, gguf.quantize(x, of), raw_dtype=of)
    for name, x in dict(tensors).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _scores(model, ids):
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1)[range(len(ids) - 1), ids[1:]].numpy()


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"head_dim": 32, "rope_parameters": LLAMA_3}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
)
def test_a_file_of_float32_is_the_model_that_it_was_written_from(
    family, changes, tmp_path
):
    model = _model(family, **changes)
    model.save_pretrained(tmp_path / "hf")
    tensors, extra = {}, {}
    if "rope_parameters" in changes:
        rope = hf.load(tmp_path / "hf").config.rope
        tensors["rope_freqs.weight"] = _stretch(rope, model.config.head_dim)
    if "head_dim" in changes and family == "llama":
        extra["llama.attention.key_length"] = 32
        extra["llama.attention.value_length"] = 32
    path = _write(tmp_path / "m.gguf", model, tensors=tensors, extra=extra)
    got, want = hf.load(path), hf.load(tmp_path / "hf")
    assert got.config == want.config
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    (scored,) = scoring.score(got, [ids], [1])
    np.testing.assert_allclose(scored, _scores(model, ids), atol=1e-4)


def _stretch(rope, width):
    """As llama.cpp computes it: wave lengths in place of turns."""
    out = []
    for freq in 1.0 / rope.theta ** (np.arange(0, width, 2) / width):
        wave, longest = 2 * np.pi / freq, rope.original_positions
        if wave < longest / rope.high_freq_factor:
            out.append(1.0)
        elif wave > longest / rope.low_freq_factor:
            out.append(rope.factor)
        else:
            smooth = longest / wave - rope.low_freq_factor
            smooth /= rope.high_freq_factor - rope.low_freq_factor
            out.append(1.0 / ((1.0 - smooth) / rope.factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_are_those_of_transformers_reading_the_same_file(
    family, kind, tmp_path, cache
):
    import torch
    import transformers

    path = _write(tmp_path / "m.gguf", _model(family), kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, 256, 40).tolist()
    policy = hf.load(path)
    (scored,) = scoring.score(policy, [ids], [1])
    np.testing.assert_allclose(scored, _scores(theirs, ids), atol=1e-4)
    # Through an export, as transformers reads it.
    hf.save(policy, tmp_path / "out", base=path)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(scored, _scores(exported, ids), atol=1e-4)


@pytest.mark.parametrize("kind, stored", [("F16", "float16"), ("BF16", "bfloat16")])
def test_a_16_bit_file_stays_so_only_if_its_vectors_lose_nothing(
    kind, stored, tmp_path
):
    import torch

    from pfjax.model import weights

    model = _model("llama")
    path = _write(tmp_path / "odd.gguf", model, kind)
    assert weights.stored_dtype(hub.resolve(path)) == "float32"
    path = _write(tmp_path / "m.gguf", model.to(torch.bfloat16).float(), kind)
    assert weights.stored_dtype(hub.resolve(path)) == stored


TEXT = "the the\n\n 12345 it's  THE 数学 .. e\u0301 <think>he<|im_end|>\n"


@pytest.mark.parametrize(
    "family, pre", [("qwen2", "qwen2"), ("qwen3", "qwen2"), ("llama", "llama-bpe")]
)
def test_text_is_cut_as_by_the_tokenizer_of_transformers(family, pre, tmp_path):
    import transformers

    path = _write(tmp_path / "m.gguf", _model(family), pre=pre)
    ours = tokenizer.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    # Theirs lacks the normalisation that Qwen's own has.
    text = TEXT.replace("e\u0301", "\u00e9" if pre == "qwen2" else "e\u0301")
    plain = {"add_special_tokens": False}
    assert ours.encode(TEXT, **plain) == theirs.encode(text, **plain)
    assert ours.decode(ours.encode(TEXT, **plain)) == text
    # Llama 3 begins with a BOS if the file does not say otherwise.
    assert (ours.encode("he")[0] == ours.bos_token_id) == (pre == "llama-bpe")
    assert tokenizer.encode_prompt(ours, "he") == ours.encode(
        "<|im_start|>he<|im_end|>\n<|im_start|>", **plain
    )
    assert WHOLE in ours.tokenize(TEXT) and WHOLE not in ours.all_special_tokens
    assert ours.eos_token == "<|im_end|>" and "<|im_start|>" in ours.all_special_tokens


def test_smollm_cuts_digits_off_their_space_before_anything_else(tmp_path):
    ours = tokenizer.load(_write(tmp_path / "m.gguf", _model("llama"), pre="smollm"))
    assert ours.tokenize(" 1234 the") == ["Ġ", "1", "2", "3", "4", "Ġthe"]
    gpt_2 = tokenizer.load(_write(tmp_path / "g.gguf", _model("llama"), pre="gpt-2"))
    assert gpt_2.tokenize(" 1234") == ["Ġ", "1234"]


def test_a_folder_with_one_file_is_that_file_and_is_converted_once(
    tmp_path, cache, capfd
):
    (tmp_path / "dl").mkdir()
    path = _write(tmp_path / "dl/m.gguf", _model("llama"))
    folder = hub.resolve(tmp_path / "dl")
    assert folder.parent == cache and hub.resolve(str(path)) == folder
    assert capfd.readouterr().err.count("is converted, once") == 1
    assert list(cache.iterdir()) == [folder]
    _write(path, _model("llama", rms_norm_eps=1e-6))  # another of its name
    assert hf.load(path).config.norm_eps == 1e-6
    shutil.copyfile(path, tmp_path / "dl/n.gguf")
    with pytest.raises(ValueError, match=r"\['m.gguf', 'n.gguf'\]: name one"):
        hub.resolve(tmp_path / "dl")
    shutil.copytree(ROOT / "pfjax/assets/toy", tmp_path / "dl", dirs_exist_ok=True)
    assert hub.resolve(tmp_path / "dl") == tmp_path / "dl"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"arch": "gemma2"}, "architecture 'gemma2': not supported"),
        ({"extra": {"llama.expert_count": 8}}, "'expert_count': 8}: not supported"),
        ({"extra": {"llama.attention.causal": 0}}, "'attention.causal': 0}: not supported"),
        ({"extra": {"split.count": 3}}, "one of 3 parts.* --merge"),
        ({"extra": {"llama.rope.scaling.type": 9}}, "rope_parameters.*: 9 is none of"),
        ({"merges": ["h e", "z q"]}, "m.gguf has a damaged tokenizer: "),
        ({"pre": "viking"}, "pre 'viking'; .* Hugging Face folder"),
        ({"tensors": {"blk.0.x.weight": np.ones(3, np.float32)}}, "holds blk.0.x.weight"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 2, np.float32)}}, "of Llama 3"),
        ({"tensors": {"x": np.ones((2, 32), np.int8)}}, "x as I8, .*another type"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name_with_the_way_out(
    change, said, tmp_path, cache
):
    path = _write(tmp_path / "m.gguf", _model("llama"), **change)
    with pytest.raises(ValueError, match=said) as error:
        hf.load(path)
    assert "m.gguf" in str(error.value) or "m-" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_qwen2_with_the_tokenizer_of_another_is_refused(tmp_path):
    path = _write(tmp_path / "m.gguf", _model("qwen2"), pre="llama-bpe")
    with pytest.raises(ValueError, match="m.gguf has a tokenizer .* 'llama-bpe'"):
        hf.load(path)


def test_no_file_no_gguf_and_no_package_are_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="m.gguf does not exist"):
        hf.load(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="m.gguf cannot be read as GGUF"):
        hf.load(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"m.gguf: .*pip install pfjax\[gguf\]"):
        hf.load(tmp_path / "m.gguf")


def test_what_says_that_nothing_is_unusual_is_passed_over(tmp_path):
    extra = {"llama.attention.causal": 1, "llama.expert_count": 0}
    assert hf.load(_write(tmp_path / "m.gguf", _model("llama"), extra=extra))


def test_the_tokenizer_is_written_by_the_names_of_transformers_4_too(tmp_path):
    import transformers

    folder = hub.resolve(_write(tmp_path / "m.gguf", _model("llama")))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert set(said["additional_special_tokens"]) == {"<|im_start|>"}
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = tokenizer.load(folder)
    assert theirs.encode(TEXT) == ours.encode(TEXT)
    assert theirs.all_special_tokens == ours.all_special_tokens
