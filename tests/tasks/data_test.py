"""Prompts: every form that is accepted, every mistake by its place, and the order."""

import json

import pytest

from pfjax.model import tokenizer
from pfjax.tasks import benchmarks, data
from pfjax.tasks.benchmarks import Problem


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


def test_mistakes_name_file_and_line(tmp_path, tok):
    path = tmp_path / "bad.jsonl"
    for text, message in [
        ('{"prompt": "1"}\n\nnot json\n', r"bad.jsonl:3: not JSON"),
        ('{"prompt": "1"}\n{"text": "2"}\n', r"bad.jsonl:2: no prompt.*\['text'\]"),
        ('{"prompt": ""}\n', r"bad.jsonl:1: no prompt"),
        ('["prompt"]\n', r"bad.jsonl:1: a row must be a JSON object"),
        ('{"prompt": [{"role": "user"}]}\n', r"bad.jsonl:1: prompt must be"),
        ("\n", "no prompts left in .*bad.jsonl: it is empty"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            data.load_prompts(str(path), tok, 16)
    with pytest.raises(ValueError, match="does not exist"):
        data.load_prompts(str(tmp_path / "absent.jsonl"), tok, 16)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        data.load_prompts(str(tmp_path / "bad.parquet"), tok, 16)
    with pytest.raises(ValueError, match="could not be loaded from the Hugging Face"):
        data.load_prompts("someone/some-data", tok, 16)


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
