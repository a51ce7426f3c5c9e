"""Prompts: every form that is accepted, every mistake by its place, and the order."""

import json

import pytest

from pfjax.infra import dataset_io
from pfjax.model import tokenizer
from pfjax.tasks import benchmarks, data, samples
from pfjax.tasks.problems import Fields, Problem, check_fields


@pytest.fixture(scope="module")
def tok():
    return tokenizer.load("pfjax/toy")


def _jsonl(tmp_path, *rows):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def _texts(prompts):
    return [benchmarks.text_of(p) for p in prompts.problems]


def _answers(prompts):
    return [p.gold for p in prompts.problems]


def test_forms_of_jsonl(tmp_path, tok):
    messages = [{"role": "user", "content": "1+2"}]
    path = _jsonl(
        tmp_path,
        {"prompt": "1+2", "answer": 3},
        {"problem": "3+4", "answer": "7", "subject": "sums"},
        {"question": "5+6"},
        {"prompt": messages, "reward_model": {"style": "rule", "ground_truth": "3"}},
        {"prompt": messages, "reward_model": {"ground_truth": ["4", "5"]}},
    )
    got = data.load_prompts(path, tok, 16)
    assert _texts(got) == ["1+2", "3+4", "5+6", "1+2", "1+2"]
    assert _answers(got) == ["3", "7", None, "3", "4"]
    # A string is one user message.
    assert got.tokens[0] == got.tokens[3] == tokenizer.encode_prompt(tok, messages)


def test_suffix_goes_to_the_last_message_with_its_braces(tmp_path, tok):
    messages = [{"role": "user", "content": "1"}, {"role": "user", "content": "2"}]
    path = _jsonl(tmp_path, {"prompt": "1+2"}, {"prompt": messages})
    got = data.load_prompts(path, tok, 64, suffix=r" \boxed{}.")
    assert _texts(got) == [r"1+2 \boxed{}.", r"2 \boxed{}."]
    with_suffix = [messages[0], {"role": "user", "content": r"2 \boxed{}."}]
    assert got.tokens[1] == tokenizer.encode_prompt(tok, with_suffix)


def test_parquet_and_embedded_files(tmp_path, tok):
    import datasets

    rows = [{"prompt": [{"role": "user", "content": "1+2"}], "ability": "math"}]
    path = tmp_path / "p.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert _texts(data.load_prompts(str(path), tok, 16)) == ["1+2"]
    held_out = data.load_prompts("pfjax/toy/eval.jsonl", tok, 16)
    train = data.load_prompts("pfjax/toy/train.jsonl", tok, 16)
    assert len(_texts(held_out)) == 64 and all(_answers(held_out))
    assert not set(_texts(held_out)) & set(_texts(train))
    assert not any(_answers(train))


_LONG = "a long text of the file. " * 40
_ASKED = {"role": "user", "content": "1+2"}
_IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
_ANSWERED = [_ASKED, {"role": "assistant", "content": _LONG}]


def _prompt(x):
    return json.dumps({"prompt": x})


# A file, what is in it, and what is said of it, after "error: ".
_MISTAKES = [
    ("p.jsonl", "", "p.jsonl is empty"),
    ("p.jsonl", "\n", "p.jsonl is empty"),
    ("p.json", "[]", "p.json is empty"),
    ("p.csv", "prompt,answer\n", "p.csv is empty"),
    ("p.jsonl", f"{_prompt(1)[:-1]}", r"p.jsonl:1: not JSON"),
    ("p.jsonl", f"{_prompt('1')}\n\nnot json\n", r"p.jsonl:3: not JSON"),
    ("p.jsonl", json.dumps([{"prompt": _LONG}]), r"p.jsonl:1: .*named p\.json"),
    ("p.jsonl", json.dumps([{"prompt": _LONG}], indent=1), r"named p\.json"),
    ("p.json", json.dumps([_LONG]), r"p.json row 0: a row .* got 'a long"),
    ("p.json", json.dumps([{"prompt": "1"}, 2]), r"p.json row 1: a row .* got 2"),
    ("p.json", json.dumps({"data": [{"prompt": _LONG}]}, indent=1), r"\['data'\].*array"),
    ("p.json", json.dumps({"data": [_LONG]}), r"p.json:1: no prompt.*\['data'\]"),
    ("p.json", json.dumps([{"prompt": _LONG}])[:-9], r"p.json:1: not JSON"),
    ("p.jsonl", json.dumps(_LONG), r"p.jsonl:1: a row must be a JSON object"),
    ("p.jsonl", '{"prompt": "1"}\n{"text": "2"}', r"p.jsonl:2: no prompt.*\['text'\]"),
    ("p.jsonl", _prompt("1") + "\n" + _prompt(""), r"p.jsonl:2: an empty prompt \(prompt"),
    ("p.jsonl", _prompt(" \n"), "p.jsonl:1: an empty prompt"),
    ("p.jsonl", _prompt(None), "p.jsonl:1: an empty prompt"),
    ("p.jsonl", _prompt([]), "p.jsonl:1: an empty prompt"),
    ("p.jsonl", _prompt([{**_ASKED, "content": ""}]), "empty prompt.*last message"),
    ("p.jsonl", _prompt(17), r"p.jsonl:1: prompt must be a string or .* got 17"),
    ("p.jsonl", _prompt({"text": _LONG}), "p.jsonl:1: prompt must be a string or"),
    ("p.jsonl", _prompt([{"role": "user", "text": _LONG}]), r"p.jsonl:1: prompt must be"),
    ("p.jsonl", _prompt([_LONG]), r"p.jsonl:1: prompt must be"),
    ("p.jsonl", _prompt([_IMAGE]), r"p.jsonl:1: .* no text \(image\)"),
    ("p.jsonl", _prompt(_ANSWERED), "ends with a message of the assistant: leave"),
    ("p.jsonl", b'{"prompt": "caf\xe9"}', r"p.jsonl:1: not UTF-8: .*iconv"),
    ("p.csv", b"prompt\ncaf\xe9\n", r"p.csv:2: not UTF-8: .*iconv"),
    ("p.csv", f"{_LONG},2\n3+4,7\n", r"p.csv:2: no prompt.*a CSV file begins with"),
    ("p.csv", "prompt;answer\n1+2;3\n", r"p.csv:1: columns with ';' between, which must"),
    ("p.csv", "prompt\n1+2\n".encode("utf-16"), r"not UTF-8: .*iconv -f UTF-16 -t"),
    ("p.jsonl", "[" * 100_000, r"p.jsonl:1: a row must be a JSON object|not JSON"),
    ("p.jsonl", '{"a": ' + "[" * 100_000, r"p.jsonl:1: not JSON"),
    ("p.jsonl", f'{{"prompt": "1", "n": {"1" * 5000}}}', r"p.jsonl:1: a number of too many"),
    ("p.jsonl", _prompt([{**_ASKED, "content": None}]), "without text .its content is null"),
    ("p.csv", "prompt,answer\n,3\n", r"p.csv:2: an empty prompt"),
    ("p.parquet", "no parquet", "p.parquet cannot be read as Parquet, is it whole"),
    ("p.jsonl.gz", "", r"\.gz; unpack it first"),
    ("p.txt", _LONG, r"\.txt; write it as \.jsonl, one"),
    ("p.tsv", _LONG, r"\.tsv; make it one of \.jsonl"),
    ("prompts", _LONG, r"a file without a suffix; make it one of \.jsonl"),
    ("p.jsonl", {"answer": {"a": _LONG, "b": 1}}, "an answer must be one string, got"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), _MISTAKES)
def test_a_mistake_in_a_file_is_one_line_that_names_the_place(
    tmp_path, tok, name, content, message
):
    if isinstance(content, dict):
        content = json.dumps({"prompt": "1+2", **content})
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    _assert_one_line(lambda: data.load_prompts(str(tmp_path / name), tok, 16), message)


def _assert_one_line(load, message):
    with pytest.raises(ValueError, match=message) as error:
        load()
    said = str(error.value)
    assert "\n" not in said and len(said) < 400 and _LONG[:200] not in said


def test_a_source_that_is_not_there_is_named_with_what_may_be_meant(tmp_path, tok):
    (tmp_path / "prompts.jsonl").write_text(_prompt("1+2"))
    (tmp_path / "folder").mkdir()
    for source, message in [
        (tmp_path / "promts.jsonl", r"does not exist; did you mean .*/prompts.jsonl\?"),
        (tmp_path / "none/p.csv", "p.csv does not exist$"),
        (tmp_path / "none.txt", "none.txt does not exist"),
        (tmp_path / "folder", r"is a folder \(give a file\) which could not be"),
        ("", "must be named"),
        ("gs:/bucket/p.jsonl", "did you mean gs://bucket/p.jsonl"),
        ("math50", r"no benchmark 'math50'.*did you mean math500\?"),
        ("someone/some-data", "could not be loaded as a data set of the Hugging Face"),
        ("someone/some-data@main:train", "could not be loaded"),
    ]:
        load = lambda source=source: data.load_prompts(str(source), tok, 16)
        _assert_one_line(load, message)


def test_columns_by_name_and_the_others_are_kept(tmp_path, tok):
    rows = [
        {"question": "odd", "instruction": "1+2", "target": 3, "level": "easy"},
        {"question": "5+6", "answer": "11"},  # without them, as ever
    ]
    path = _jsonl(tmp_path, *rows)
    fields = Fields("instruction", "target")
    got = data.load_prompts(path, tok, 16, fields=fields)
    assert _texts(got) == ["1+2", "5+6"] and _answers(got) == ["3", "11"]
    assert [p.columns for p in got.problems] == rows
    check_fields(fields, got.problems)
    with pytest.raises(ValueError, match=r"answer_field=traget: .* are \['target', "):
        check_fields(Fields("instruction", "traget"), got.problems)
    found = data.load_prompts(path, tok, 16)
    assert _texts(found) == ["odd", "5+6"] and _answers(found) == [None, "11"]


def test_what_became_what_is_said_with_the_prompt_as_the_model_sees_it(tmp_path, tok):
    rows = [
        {"question": "1+2", "target": 3, "level": "easy"},
        {"prompt": "3+4", "answer": "7"},
        {"prompt": "5+6", "answer": ""},
    ]
    path = _jsonl(tmp_path, *rows)
    got = data.load_prompts(path, tok, 16, fields=Fields(answer="target"))
    first, second = data.describe(got, tok).splitlines()
    assert first == (
        f"{path}: 3 prompts from column prompt (2), question (1), answers from column target (1), "
        "answer (1); other columns: level"
    )
    seen = tok.decode(tokenizer.encode_prompt(tok, "1+2"))
    assert seen != "1+2"  # but within its chat template
    told = f"first prompt, as the model sees it: {seen!r}; its answer: '3'"
    assert second.strip() == told
    path = _jsonl(tmp_path, {"prompt": "1+" * 300 + "2", "solution": "none"})
    first, second = data.describe(data.load_prompts(path, tok, 999), tok).splitlines()
    assert first.endswith(
        "1 prompts from column prompt, no answers; other columns: solution"
    )
    assert len(second) < 450 and " ... " in second and second.endswith("'")


def test_rewards_find_the_columns_of_their_prompts(tmp_path, tok):
    rows = [{"prompt": f"{i}+2", "level": i} for i in range(5)]
    got = data.load_prompts(_jsonl(tmp_path, *rows), tok, 16)
    indices, *_ = data.next_prompts(got, 0, 5, seed=0)
    levels = [got.problems[i].columns["level"] for i in indices]
    assert [f"{x}+2" for x in levels] == [_texts(got)[i] for i in indices]


def test_over_long_prompts_are_counted_and_skipped(tmp_path, tok, caplog):
    path = _jsonl(tmp_path, {"prompt": "1+2"}, {"prompt": "1" * 20}, {"prompt": "1+2"})
    got = data.load_prompts(path, tok, 16)
    assert _texts(got) == ["1+2", "1+2"]
    assert "skipped 1 of 3 prompts longer than 16 tokens" in caplog.text
    assert "1 prompts are duplicates" in caplog.text
    with pytest.raises(ValueError, match="all are too long"):
        data.load_prompts(path, tok, 2)


def test_prompts_of_both_training_and_evaluation_are_counted(tmp_path, tok, caplog):
    train, held_out = (
        data.load_prompts(_jsonl(tmp_path, *({"prompt": x} for x in prompts)), tok, 16)
        for prompts in (("1+2", "3+4"), ("3+4", "5+6", "7+8"))
    )
    data.warn_of_overlap(train, data.PromptSet([], []))
    assert "trained on" not in caplog.text
    data.warn_of_overlap(train, held_out)
    assert "1 of 3 prompts for evaluation are trained on" in caplog.text


def test_order_is_a_permutation_each_epoch_and_resumes_anywhere():
    prompts = data.PromptSet(
        [Problem(x, x, None) for x in "abcde"], [[i] for i in range(5)]
    )
    chosen, ids, cursor = data.next_prompts(prompts, 0, 15, seed=1)
    assert ids == list(range(15)) and cursor == 15
    epochs = [chosen[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(e) == list(range(5)) for e in epochs)
    assert epochs[0] != epochs[1]
    later, later_ids, _ = data.next_prompts(prompts, 7, 4, seed=1)
    assert later == chosen[7:11] and later_ids == ids[7:11]
    assert data.next_prompts(prompts, 0, 15, seed=2)[0] != chosen


def test_a_benchmark_is_asked_by_its_name_as_training_prompts_are(tok, monkeypatch):
    rows = [("hub row 0", {"problem": "1+2", "answer": "3"})]
    source = "HuggingFaceH4/MATH-500:test"
    monkeypatch.setattr(dataset_io, "read", {source: rows}.get)
    got = data.load_prompts("math500", tok, 16, suffix="+4")
    assert (_texts(got), _answers(got)) == (["1+2+4"], ["3"])
    assert benchmarks.name_of("math500") == "math500"


def test_responses_to_learn_from_are_found_by_their_prompts(tmp_path):
    path = tmp_path / "given.jsonl"
    rows = [([2, 3], [4, 1]), ([5], [1]), ([2, 3], [6])]
    named = [{"prompt_tokens": p, "completion_tokens": y} for p, y in rows]
    dataset_io.write_jsonl(path, named)
    got = samples.load_responses(str(path), [[5], [2, 3]], max_new_tokens=2)
    assert {p: [y.tolist() for y in of] for p, of in got.items()} == {
        (2, 3): [[4, 1], [6]],
        (5,): [[1]],
    }
    with pytest.raises(ValueError, match="no response to 1 of 2 training prompts"):
        samples.load_responses(str(path), [[5], [7]], max_new_tokens=2)
    with pytest.raises(ValueError, match="of 2 tokens, where max_new_tokens is 1"):
        samples.load_responses(str(path), [[5]], max_new_tokens=1)
    dataset_io.write_jsonl(path, [{"prompt": "x", "completion": "y"}])
    with pytest.raises(ValueError, match="no 'prompt_tokens'; responses to learn from"):
        samples.load_responses(str(path), [[5]], max_new_tokens=1)


def test_messages_that_a_csv_file_holds_as_text_are_messages(tmp_path, tok):
    import csv

    messages = [{"role": "user", "content": "1+2"}]
    with open(tmp_path / "p.csv", "w", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", " answer"])  # a space that is no part of the name
        rows.writerow([json.dumps(messages), "3"])
        rows.writerow([str(messages), "3"])
        rows.writerow(["1+2", "3"])
    found = data.load_prompts(str(tmp_path / "p.csv"), tok, 16)
    assert _answers(found) == ["3"] * 3
    assert found.tokens[0] == found.tokens[1] == found.tokens[2]


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path, tok, monkeypatch):
    import datasets

    rows = [{"prompt": "1+2", "answer": "3"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    found = data.load_prompts(str(tmp_path / "saved"), tok, 16)
    assert _texts(found) == ["1+2"] and _answers(found) == ["3"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="has no splits: give it without :test"):
        data.load_prompts("saved:test", tok, 16)


def test_a_split_of_a_folder_is_read_wherever_the_folder_is(tmp_path, tok):
    import datasets

    one = datasets.Dataset.from_list([{"prompt": "1+2"}])
    two = datasets.Dataset.from_list([{"prompt": "3+4"}, {"prompt": "5+6"}])
    splits = datasets.DatasetDict(train=one, test=two)
    splits.save_to_disk(str(tmp_path / "saved"))
    for name, split in splits.items():
        split.to_parquet(tmp_path / f"cloned/data/{name}-00000-of-00001.parquet")
    for folder in ("saved", "cloned"):
        found = data.load_prompts(str(tmp_path / folder), tok, 16)
        assert _texts(found) == ["1+2"]
        for split, texts in [("test", ["3+4", "5+6"]), ("test[:1]", ["3+4"])]:
            found = data.load_prompts(f"{tmp_path / folder}:{split}", tok, 16)
            assert _texts(found) == texts
    with pytest.raises(ValueError, match="p.jsonl does not exist"):
        data.load_prompts(str(tmp_path / "saved@p.jsonl"), tok, 16)
