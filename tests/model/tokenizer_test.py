"""Tokenizers: both kinds, templates, beginning and end tokens."""

import dataclasses
import json
import random

import pytest
import sentencepiece

from pfjax.model import hf_config, hub, tokenizer

# As Qwen's: brings a system prompt of its own when the messages have none.
TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}system: be brief {% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}answer:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama folder with a sentencepiece model trained here, and no fast tokenizer."""
    folder = tmp_path_factory.mktemp("sp")
    draw = random.Random(0)
    words = [
        *[
            "the",
            "sum",
            "of",
            "two",
            "and",
            "three",
            "is",
            "five:",
            "\\boxed{5}",
            "user",
            "system",
            "be",
            "brief",
        ]
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(draw.choices(words, k=12)) for _ in range(500)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
        user_defined_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "add_bos_token": True,
            }
        )
    )
    config = {
        "model_type": "llama", "vocab_size": 40, "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sentencepiece_text_survives_and_begins_once(folder):
    tok = tokenizer.load(folder)
    text = "the sum of two and three is \\boxed{5}"
    ids = tokenizer.encode_prompt(tok, text)
    assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id
    assert tokenizer.decode(tok, ids) == text


def test_template_writes_the_beginning_and_nobody_adds_another(folder):
    tok = tokenizer.load(folder)
    tok.chat_template = TEMPLATE
    ids = tokenizer.encode_prompt(tok, "the sum")
    assert ids.count(tok.bos_token_id) == 1 and ids[0] == tok.bos_token_id
    text = tokenizer.decode(tok, ids)
    assert text.split() == [
        "system:",
        "be",
        "brief",
        "user:",
        "the",
        "sum",
        "answer:",
    ]


def test_a_system_prompt_of_the_prompts_own_stands_alone(folder):
    tok = tokenizer.load(folder)
    tok.chat_template = TEMPLATE
    messages = [
        {"role": "system", "content": "the \\boxed{}"},
        {"role": "user", "content": "two"},
    ]
    text = tokenizer.decode(tok, tokenizer.encode_prompt(tok, messages))
    assert text.split() == ["system:", "the", "\\boxed{}", "user:", "two", "answer:"]


def test_arguments_of_the_template_are_used_wherever_it_is(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if enable_thinking %} two{% endif %}"
    )
    texts = []
    for kwargs in ("", '{"enable_thinking": true}', '{"enable_thinking": false}'):
        tok = tokenizer.load(tmp_path, kwargs)
        texts.append(tokenizer.decode(tok, tokenizer.encode_prompt(tok, "the")))
    assert texts == ["the", "the two", "the"]
    for wrong in ("enable_thinking", "[1]", "{"):
        with pytest.raises(ValueError, match="must be a JSON object, got"):
            tokenizer.load(tmp_path, wrong)


def test_a_template_is_told_one_time_only(folder, tmp_path, monkeypatch):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert not tokenizer.asks_for_time(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if strftime_now('%Y') == '1999' %} two{% endif %}"
    )
    assert tokenizer.asks_for_time(tmp_path)
    then, now = (tokenizer.load(tmp_path, "", x) for x in ("1999-12-31T23:59:59", ""))
    texts = [
        tokenizer.decode(t, tokenizer.encode_prompt(t, "the")) for t in (then, now)
    ]
    assert texts == ["the two", "the"]
    with pytest.raises(
        ValueError, match="clock must be a time in ISO 8601, got 'noon'"
    ):
        tokenizer.load(tmp_path, "", "noon")
    # What is told is of when the tokenizer was loaded, not of when a prompt is encoded.
    monkeypatch.setattr(tokenizer, "now", lambda: "1999-12-31T23:59:59")
    late = tokenizer.load(tmp_path)
    monkeypatch.setattr(tokenizer, "now", lambda: "2000-01-01T00:00:00")
    assert tokenizer.decode(late, tokenizer.encode_prompt(late, "the")) == "the two"


def test_messages_need_a_template(folder):
    tok = tokenizer.load(folder)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_prompt(tok, [{"role": "user", "content": "two"}])


def _stopping(*ids, vocab_size=100):
    config = hf_config.read(hub.resolve("pfjax/toy"))
    return dataclasses.replace(config, stop_ids=ids, vocab_size=vocab_size)


def test_a_stop_id_that_cannot_be_drawn_is_refused(folder):
    tok = tokenizer.load(folder)
    with pytest.raises(
        ValueError, match=r"\['.*'\] \(ids \[.*2\]\), which a model with"
    ):
        tokenizer.stop_ids(tok, _stopping(vocab_size=2))


@pytest.mark.parametrize(
    "prompt, ids, what",
    [
        ("one <|im_end|>", [3, 4], "hold special tokens"),
        ([{"role": "user", "content": "<|im_end|>"}], [3, 4], "hold special tokens"),
        ("one", [1, 1, 3], "begin with <s> twice"),
        ("one", [1, 3, 2], "end with a token that ends a response"),
        ("one", [1, 3, 1], None),
    ],
)
def test_what_is_strange_about_a_prompt(folder, prompt, ids, what):
    tok = tokenizer.load(folder)
    tok.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tok.bos_token = "<s>"
    ids = [tok.bos_token_id if i == 1 else i for i in ids]
    found = tokenizer.oddities(tok, prompt, ids, (2,))
    assert [x.startswith(what or "-") for x in found] == ([True] if what else [])


def test_every_stop_id_counts(folder, tmp_path):
    """The config's, the generation config's (a list), and the tokenizer's differ."""
    tok = tokenizer.load(folder)
    im_end = tok.convert_tokens_to_ids("<|im_end|>")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    generation = {"eos_token_id": [7, im_end]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    from_files = hf_config.read(tmp_path).stop_ids
    assert set(from_files) == {2, 7, im_end}
    tok.eos_token = "<|im_end|>"
    assert set(tokenizer.stop_ids(tok, _stopping(7))) == {7, im_end}
    tok.eos_token = None
    with pytest.raises(ValueError, match="would never stop"):
        tokenizer.stop_ids(tok, _stopping())


def test_stop_strings_that_are_special_tokens_are_stop_ids(folder):
    """As text they would never be seen."""
    tok = tokenizer.load(folder)
    tok.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    im_end = tok.convert_tokens_to_ids("<|im_end|>")
    strings = ("\nQuestion:", "<|im_end|>", "</s>")
    assert tokenizer.split_stops(tok, strings) == ((im_end, 2), ("\nQuestion:",))
    assert "<|im_end|>" not in tokenizer.decode(tok, [5, im_end])


def test_what_a_template_ends_a_turn_with_ends_a_response(folder):
    """Qwen's base models: the config and the tokenizer name <|endoftext|> only."""
    tok = tokenizer.load(folder)
    tok.add_special_tokens(
        {"additional_special_tokens": ["<|im_end|>", "<|im_start|>"]}
    )
    im_end = tok.convert_tokens_to_ids("<|im_end|>")
    tok.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert set(tokenizer.stop_ids(tok, _stopping(7))) == {7, tok.eos_token_id, im_end}
    tok.chat_template = TEMPLATE  # ends turns with nothing
    assert set(tokenizer.stop_ids(tok, _stopping(7))) == {7, tok.eos_token_id}


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="no tokenizer could be read"):
        tokenizer.load(tmp_path)


_GPT_4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
PROBES = ("the sum 2023", " a  b", "two\n\n3.14", "</s> the", "<s>the</s>sum", "É's")


def _bytes_tokenizer():
    """Of bytes, cut as by Llama 3; beside it, what other classes would take it for."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    how = {"add_prefix_space": False, "use_regex": False}
    cut = [pre_tokenizers.Split(Regex(_GPT_4), "isolated")]
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(**how)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **special)
    made.train_from_iterator(["the sum of 2023 and 202"] * 9, trainer)
    return made


def _spaces_tokenizer(prefix):
    """Of pieces with spaces as sentencepiece has them, but for the one in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", "▁", *"thesumofwan2034.1b", "th", "the", "▁the"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True))
    first = [normalizers.Prepend("▁")] if prefix else []
    spaces = [*first, normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return made


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "named", ["LlamaTokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None]
)
def test_a_tokenizer_file_decides_whatever_class_the_folder_names(
    family, named, tmp_path
):
    """transformers 5 makes what the class says of it."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    if named:
        text = json.dumps(said | {"tokenizer_class": named})
        (tmp_path / "tokenizer_config.json").write_text(text)
    for made in (_bytes_tokenizer(), _spaces_tokenizer(True), _spaces_tokenizer(False)):
        made.save(str(tmp_path / "tokenizer.json"))
        tok = tokenizer.load(tmp_path)
        for text in PROBES:
            want = made.encode(text).ids
            assert tok.encode(text) == want, text
            assert tok.decode(want) == made.decode(want, skip_special_tokens=False)
        if named:
            assert (tok.bos_token, tok.eos_token) == ("<s>", "</s>")
            assert tok.chat_template == TEMPLATE


def test_special_tokens_that_only_the_class_names_are_those_of_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _spaces_tokenizer(False).save(str(tmp_path / "tokenizer.json"))
    for named, eos in (("LlamaTokenizer", "</s>"), ("GPT2Tokenizer", None)):
        text = json.dumps({"tokenizer_class": named})
        (tmp_path / "tokenizer_config.json").write_text(text)
        tok = tokenizer.load(tmp_path)
        assert (tok.eos_token, len(tok)) == (eos, 25)
        assert tokenizer.decode(tok, tok.encode("</s>the")) == "the"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("said", [None, {}, {"add_bos_token": False}])
def test_a_sentencepiece_model_alone_is_read_as_by_sentencepiece(kind, said, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the sum of two and three is five"] * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if said is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tok = tokenizer.load(tmp_path)
    bos = [] if said else [1]
    for text in ("the sum", "  two  and", "three\nfive", "é2 is"):
        assert tok.encode(text) == bos + model.encode(text)
        assert tokenizer.decode(tok, tok.encode(text)) == text
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    named |= {"tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    if kind == "bpe":
        assert tokenizer.load(tmp_path).encode("two")[0] == 1


@pytest.mark.parametrize("is_named", [False, True])
def test_every_way_to_ask_for_the_time_is_told_the_clock(folder, tmp_path, is_named):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (
        "\n  {% set how = '%d %b %Y, %-d' %}\n"
        "{% macro f() %}{{ strftime_now(how) }}{% endmacro %}"
        "{{ f() }}|{{ messages[0]['content'] }}{{ strftime_now is defined }}"
    )
    plain = text.replace("strftime_now(how)", "'31 Dec 1999, 31'")
    for template in (text, plain):
        named = [{"name": x, "template": template} for x in ("default", "tool_use")]
        path = tmp_path / "tokenizer_config.json"
        said = json.loads(path.read_text())
        said["chat_template"] = named if is_named else template
        path.write_text(json.dumps(said))
        tok = tokenizer.load(tmp_path, "", "1999-12-31T23:59:59")
        how = {"tokenize": False}
        found = tok.apply_chat_template([{"role": "user", "content": "two"}], **how)
        assert found == "\n31 Dec 1999, 31|twoTrue"


def test_a_template_that_leaves_out_the_question_is_refused(folder):
    tok = tokenizer.load(folder)
    parts_only = (
        "{% for m in messages %}{% for p in m.content if p.type == 'text' %}"
        "{{ p.text }}{% endfor %}{% endfor %}"
    )
    for lost in (parts_only, "{% for m in messages %}{{ m.text }}{% endfor %}"):
        tok.chat_template = lost
        with pytest.raises(ValueError, match=r"leaves out .* \('two and'\)"):
            tokenizer.encode_prompt(tok, "two and")
    tok.chat_template = parts_only
    parts = [{"type": "text", "text": "two"}]
    ids = tokenizer.encode_prompt(tok, [{"role": "user", "content": parts}])
    assert tokenizer.decode(tok, ids) == "two"
    # Changed is not lost.
    for kept in ("content | upper", "content.split('two')[-1]", "content | tojson"):
        tok.chat_template = "{% for m in messages %}{{ m." + kept + " }}{% endfor %}"
        assert tokenizer.encode_prompt(tok, ' two "and" ')


def test_no_token_ends_turns_where_a_template_shows_none(folder):
    tok = tokenizer.load(folder)
    tok.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    for hidden in (
        "{% for m in messages if m.role == 'user' %}<|im_end|>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<|im_end|>{{ m.content | upper }}{% endfor %}",
    ):
        tok.chat_template = hidden
        assert tokenizer.stop_ids(tok, _stopping(7)) == (2, 7)
