"""Rows of JSONL and Parquet files and of data sets on the hub."""

import contextlib
import json
import pathlib
from typing import Any

from etils import epath

from pfjax.infra import storage

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"


def read(source: str) -> list[tuple[str, dict[str, Any]]]:
    """All rows of a file or data set, each with where it stands, for messages.

    Args:
      source: a `.jsonl`, `.json` or `.parquet` file, `pfjax/toy/<file>` for those that
        ship with pfjax, or a data set of the hub: `name`, `name:split` (else "train"),
        `name:config:split`; `name@revision` before them.

    Raises:
      ValueError: if there is no such source, or a line is no JSON object (naming it).
    """
    path = pathlib.Path(source).expanduser()
    if source.startswith("pfjax/toy/"):
        path = _ASSETS / source.removeprefix("pfjax/")
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    if path.suffix in (".jsonl", ".json"):
        return _read_lines(path)
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
                f"prompts {source!r} are no .jsonl or .parquet file and could not be "
                f"loaded from the Hugging Face hub: {error}"
            ) from error
    return [(f"{source} row {i}", row) for i, row in enumerate(table)]


def _read_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    # Line by line rather than through `datasets`, whose errors name no line.
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object, got {line!r}")  # noqa: TRY004
            rows.append((where, row))
    return rows


def read_jsonl(path: epath.PathLike) -> list[dict[str, Any]]:
    """Rows of a JSONL file that pfjax wrote, none if there is no file; a last line cut
    short by a kill is left out."""
    path, rows = storage.place(path), []
    with contextlib.suppress(json.JSONDecodeError):
        for line in path.read_text().splitlines() if path.exists() else ():
            rows.append(json.loads(line))
    return rows


def write_jsonl(path: epath.PathLike, rows: list[dict[str, Any]]) -> None:
    """The file appears whole or not at all."""
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    storage.write_text(path, "".join(lines))
