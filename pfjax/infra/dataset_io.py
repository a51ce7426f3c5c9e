"""Rows of JSONL, JSON, CSV and Parquet files and of data sets on the hub."""

import codecs
import csv
import difflib
import hashlib
import json
import logging
import pathlib
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from etils import epath

from pfjax.infra import storage

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"
FILES = (".jsonl", ".json", ".csv", ".parquet")


def read(source: str) -> list[tuple[str, dict[str, Any]]]:
    """All rows of a file or data set, each with where it stands, for messages.

    Args:
      source: a file of `FILES` (`.json` may be an array, or as `.jsonl`),
        `pfjax/toy/<file>` for those that ship with pfjax, or a data set of the hub:
        `name`, `name:split` (else "train"), `name:config:split`; `name@revision` before
        them. A split may be cut as `datasets` does, `train[:1024]`.

    Raises:
      ValueError: if there is no such source, it cannot be read or has no rows, or a row
        is no JSON object (naming it).
    """
    path = storage.place(source)
    if source.startswith("pfjax/toy/"):
        path = epath.Path(_ASSETS / source.removeprefix("pfjax/"))
    _check_is_readable(source, path)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        rows = _characters(_read_json(path))
    elif suffix == ".csv":
        rows = _read_csv(path)
    elif suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_data_set(source)
    if not rows:
        raise ValueError(f"{source} is empty: it has no rows")
    return rows


def _check_is_readable(source: str, path: epath.Path) -> None:
    """Raises ValueError for what is no file of rows, and for none that could be on the hub."""
    if not source.strip():
        raise ValueError(f"a file or a data set must be named, got {source!r}")
    suffix, is_there = path.suffix.lower(), storage.exists(path)
    if is_there and path.is_file() and suffix not in FILES:
        cure = f"make it one of {', '.join(FILES)}"
        if suffix in _PACKED:
            cure = f"unpack it first, to one of {', '.join(FILES)}"
        if suffix == ".txt":
            cure = 'write it as .jsonl, one {"prompt": "..."} per line'
        raise ValueError(f"{path}: {suffix or 'a file without a suffix'}; {cure}")
    could_be_on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[^:]+)?(:[^/]+)?", source)
    name, *_ = _data_set(source)
    is_folder = storage.place(name).is_dir()  # of which a split is named
    is_file = suffix in (*FILES, *_PACKED)
    if is_there or (not is_file and (could_be_on_hub or is_folder)):
        return
    beside = [x.name for x in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise ValueError(f"prompt file {path} does not exist{hint}")


_PACKED = (".gz", ".zip", ".bz2", ".xz", ".zst", ".tar")


def _read_parquet(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet

    try:
        content = pyarrow.BufferReader(storage.read_bytes(path))
        rows = pyarrow.parquet.ParquetFile(content).read().to_pylist()
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as Parquet, is it whole? {one_line(error)}"
        ) from error
    return [(f"{path} row {i}", row) for i, row in enumerate(rows)]


def _read_data_set(source: str) -> list[tuple[str, dict[str, Any]]]:
    """Of the hub, or of a folder that holds one."""
    import datasets

    datasets.disable_progress_bars()
    # Of each try; what comes of it is said below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    name, revision, config, split = _data_set(source)
    folder = storage.place(name)
    saved = (folder / "state.json").is_file()  # by `save_to_disk`
    if saved and name != source:
        raise ValueError(
            f"{name} is a folder of save_to_disk, which has no splits: give it without "
            f"{source.removeprefix(name)}"
        )
    try:
        wanted = {"split": split, "revision": revision or None}
        if saved:
            table = datasets.load_from_disk(str(folder))
        else:
            what = str(folder) if folder.is_dir() else name
            table = datasets.load_dataset(what, *config, **wanted)
    except Exception as error:
        what = f"{source!r} is no {', '.join(FILES)} file and"
        if folder.is_dir():
            files = sorted(x.name for x in folder.iterdir() if x.suffix in FILES)[:3]
            hint = f", such as {', '.join(files)}" if files else ""
            what = f"{name!r} is a folder (give a file{hint}) which"
        raise ValueError(
            f"{what} could not be loaded as a data set of the Hugging Face hub (a file "
            f"fetched from there can be given instead): {one_line(error)}"
        ) from error
    return [(f"{source} row {i}", row) for i, row in enumerate(table)]


def _data_set(source: str) -> tuple[str, str, list[str], str]:
    """Name, revision, config (one or none) and split of a data set."""
    parts = re.split(r":(?![^\[]*\])", source)  # not at a colon within brackets
    name, *config, split = parts if len(parts) > 1 else (source, "train")
    name, _, revision = name.partition("@")
    return name, revision, config, split


def one_line(error: Exception, width: int = 300) -> str:
    """What a library says, without its line breaks."""
    return textwrap.shorten(str(error) or repr(error), width, placeholder=" ...")


def brief(value: Any, width: int = 80) -> str:
    """`repr`, cut in the middle where it is long: a message shows no file's content."""
    text = repr(value)
    half = (width - 5) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def _read_json(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    # Rather than through `datasets`, whose errors name no line.
    lines = _lines(path, storage.read_bytes(path))
    where, first = next(((w, x) for w, x in lines if x.strip()), ("", ""))
    is_array = first.lstrip().startswith("[")
    if path.suffix.lower() == ".jsonl" and is_array:
        raise ValueError(
            f"{where}: a row must be a JSON object; the file of a JSON array is to be "
            f"named {path.stem}.json"
        )
    if path.suffix.lower() == ".jsonl" or not is_array:
        if first.strip() == "{":  # as programs write one
            _refuse_single_object(path, lines)
        return [(where, _parse(where, x)) for where, x in lines if x.strip()]
    try:
        rows = json.loads("\n".join(x for _, x in lines))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that Python reads: {error}") from error
    return [
        (where, _object(where, row))
        for where, row in ((f"{path} row {i}", row) for i, row in enumerate(rows))
    ]


def _refuse_single_object(path: epath.Path, lines: list[tuple[str, str]]) -> None:
    """Raises ValueError if the lines are one object, such as `{"data": [...]}`."""
    try:
        whole = json.loads("\n".join(x for _, x in lines))
    except json.JSONDecodeError:
        return
    raise ValueError(
        f"{path}: one JSON object of {brief(sorted(whole))}, where rows are expected: an "
        'array of objects in a .json file, [{"prompt": "..."}, ...]'
    )


def _read_csv(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    lines = (x + "\n" for _, x in _lines(path, storage.read_bytes(path)))
    csv.field_size_limit(2**31 - 1)  # a prompt may be a book
    reader = csv.DictReader(lines, strict=True)
    out = []
    try:
        names = [x.strip() for x in reader.fieldnames or ()]
        if twice := [x for x in dict.fromkeys(names) if names.count(x) > 1]:
            raise ValueError(
                f"{path}:1: several columns {twice[0]!r}, of which one only can be read: "
                "rename or remove the others"
            )
        reader.fieldnames = names
        if len(reader.fieldnames) == 1 and (
            other := re.search(r"[;\t]", reader.fieldnames[0])
        ):
            raise ValueError(
                f"{path}:1: columns with {other[0]!r} between, which must be a comma: "
                f"{reader.fieldnames[0]}"
            )
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: expected {len(reader.fieldnames)} values, as the header"
                )
            out.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    return out


def _lines(path: epath.PathLike, content: bytes) -> list[tuple[str, str]]:
    """Each line, with where it stands. Only a newline ends one: text may hold what else
    `str.splitlines` takes for an end."""
    out = []
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            out.append((where, line.decode()))
        except UnicodeDecodeError as error:
            is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            kind = "UTF-16" if is_utf16 else "LATIN1, say,"
            raise ValueError(
                f"{where}: not UTF-8: {error}; convert the file (iconv -f {kind} -t UTF-8)"
            ) from error
    return out


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise ValueError(f"{where}: a number of too many digits") from error
    return _object(where, found)


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(  # noqa: TRY004
            f'{where}: a row must be a JSON object, {{"prompt": "..."}}, got {brief(row)}'
        )
    return row


def _characters(rows: list[tuple[str, dict[str, Any]]]) -> list:
    """The rows; what no tokenizer takes is named."""
    for where, row in rows:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: half of a surrogate pair, which is no character: {error}"
            ) from error
    return rows


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
    """Rows of a JSONL file that pfjax wrote; none if there is no file.

    What follows the last newline was cut short by a kill, unless it is a whole row.

    Raises:
      ValueError: if any other line is no JSON object, naming it: what is there must not
        be written anew from a part of it.
    """
    path = storage.place(path)
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        return []
    *whole, (where, last) = _lines(path, _without_torn_character(content))
    rows = [_parse(where, x) for where, x in whole if x.strip()]
    try:
        return [*rows, _parse(where, last)]
    except ValueError:
        return rows


def _without_torn_character(content: bytes) -> bytes:
    """A kill may cut within a character of the last line."""
    *lines, last = content.split(b"\n")
    return b"\n".join([*lines, last.decode(errors="ignore").encode()])


def fingerprint(values: Any) -> str:
    """Tells one version of data from another; `values` are those of JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def write_jsonl(path: epath.PathLike, rows: list[dict[str, Any]]) -> None:
    """The file appears whole or not at all."""
    storage.write_text(path, as_jsonl(rows))


def as_jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """One line each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
