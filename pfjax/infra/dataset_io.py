"""Rows of JSONL, JSON, CSV and Parquet files and of data sets on the hub."""

import codecs
import csv
import hashlib
import json
import pathlib
from typing import Any

from etils import epath

from pfjax.infra import storage

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"
FILES = (".jsonl", ".json", ".csv", ".parquet")


def read(source: str) -> list[tuple[str, dict[str, Any]]]:
    """All rows of a file or data set, each with where it stands, for messages.

    Args:
      source: a file of `FILES` (`.json` may be an array, or as `.jsonl`), `pfjax/toy/<file>` for those that ship with pfjax, or a data set of the hub:
        `name`, `name:split` (else "train"), `name:config:split`; `name@revision` before
        them.

    Raises:
      ValueError: if there is no such source, or a row is no JSON object (naming it).
    """
    path = pathlib.Path(source).expanduser()
    if source.startswith("pfjax/toy/"):
        path = _ASSETS / source.removeprefix("pfjax/")
    if path.suffix in FILES and not path.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    if path.suffix in (".jsonl", ".json"):
        return _characters(_read_json(path))
    if path.suffix == ".csv":
        return _read_csv(path)
    import datasets

    datasets.disable_progress_bars()
    if path.suffix == ".parquet":
        try:
            table = datasets.Dataset.from_parquet(str(path))
        except Exception as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    else:
        name, *config, split = source.split(":") if ":" in source else (source, "train")
        name, _, revision = name.partition("@")
        try:
            wanted = {"split": split, "revision": revision or None}
            table = datasets.load_dataset(name, *config, **wanted)
        except Exception as error:
            raise ValueError(
                f"prompts {source!r} are no {', '.join(FILES)} file and could not be "
                f"loaded from the Hugging Face hub: {error}"
            ) from error
    return [(f"{source} row {i}", row) for i, row in enumerate(table)]


def _read_json(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    # Rather than through `datasets`, whose errors name no line.
    lines = _lines(path, path.read_bytes())
    first = next((x for _, x in lines if x.strip()), "")
    if path.suffix == ".jsonl" or not first.lstrip().startswith("["):
        return [(where, _parse(where, x)) for where, x in lines if x.strip()]
    try:
        rows = json.loads("\n".join(x for _, x in lines))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    return [
        (where, _object(where, row))
        for where, row in ((f"{path} row {i}", row) for i, row in enumerate(rows))
    ]


def _read_csv(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    lines = (x + "\n" for _, x in _lines(path, path.read_bytes()))
    reader = csv.DictReader(lines, strict=True)
    out = []
    try:
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
            raise ValueError(
                f"{where}: not UTF-8: {error}; convert the file"
            ) from error
    return out


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        return _object(where, json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, got {row!r}")  # noqa: TRY004
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
    if not path.exists():
        return []
    *whole, (where, last) = _lines(path, _without_torn_character(path.read_bytes()))
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
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    storage.write_text(path, "".join(lines))
