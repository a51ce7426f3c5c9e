"""Rows in and out: nothing that was written is lost, and what is wrong is named."""

import json

import datasets
import pytest

from pfjax.infra import dataset_io, storage

# What `str.splitlines` takes for the end of a line, and text may hold.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_a_newline_ends_a_row(tmp_path, separator):
    rows = [{"completion": f"a{separator}b"}, {"completion": "c"}]
    path = tmp_path / "x.jsonl"
    dataset_io.write_jsonl(path, rows)
    assert dataset_io.read_jsonl(path) == rows
    assert [row for _, row in dataset_io.read(str(path))] == rows


def test_a_last_line_cut_anywhere_is_left_out(tmp_path):
    path, rows = tmp_path / "x.jsonl", [{"a": 1}, {"b": "\u00e9\u4e2d"}]
    dataset_io.write_jsonl(path, rows)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole) + 1):
        path.write_bytes(whole[:end])
        # Without its newline a whole row is one all the same.
        assert dataset_io.read_jsonl(path) == rows[: 2 if end >= len(whole) - 1 else 1]
    assert dataset_io.read_jsonl(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("bad", [b'{"b"', b'{"b": "\xff"}', b"[1]", b"7", b"\x00"])
def test_damage_before_the_last_line_is_no_torn_line(tmp_path, bad):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad + b'\n{"c": 2}\n')
    for read in (dataset_io.read_jsonl, lambda p: dataset_io.read(str(p))):
        with pytest.raises(ValueError, match=r"x\.jsonl:2: "):
            read(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", '\ufeff{"q": "x", "a": "1"}\r\n\r\n{"q": "y", "a": "2"}'),
        ("a.json", '[\n{"q": "x", "a": "1"},\n {"q": "y",\n "a": "2"}]\n'),
        ("a.json", '{"q": "x", "a": "1"}\n{"q": "y", "a": "2"}\n'),
        ("a.csv", '\ufeffq,a\r\n"x",1\r\ny,2\r\n'),
    ],
)
def test_forms_of_files(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    found = dataset_io.read(str(tmp_path / name))
    assert [row for _, row in found] == [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"a": "\xe9"}', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\\ud83d"}', r"a\.jsonl:2: half of a surrogate"),
        ("a.jsonl", json.dumps('{"a": 1}').encode(), r"a\.jsonl:1: a row must be"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', r"a\.json:2: not JSON"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json row 1: a row must be"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: expected 2 values"),
        ("a.csv", b"a,b\n1\n", r"a\.csv:2: expected 2 values"),
        ("a.csv", b"a,b, a\n1,2,3\n", r"a\.csv:1: several columns 'a'"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        dataset_io.read(str(tmp_path / name))


def test_files_of_every_kind_are_read_from_a_bucket(bucket, tmp_path):
    rows = [{"prompt": "é", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.csv").write_text("prompt,answer\né,1\nb,2\n")
    dataset_io.write_jsonl(tmp_path / "p.jsonl", rows)
    storage.upload(tmp_path, storage.place(f"{bucket}/data"))
    for suffix in dataset_io.FILES:
        found = dataset_io.read(f"{bucket}/data/p{suffix}")
        assert [row for _, row in found] == rows
        assert found[0][0].startswith(f"{bucket}/data/p{suffix}")
    with pytest.raises(ValueError, match=f"did you mean {bucket}/data/p.jsonl"):
        dataset_io.read(f"{bucket}/data/pp.jsonl")
