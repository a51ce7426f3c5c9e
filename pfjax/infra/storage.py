"""Folders that may be in a bucket."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def place(path: epath.PathLike) -> epath.Path:
    """A path as given, local or `gs://`."""
    return epath.Path(str(path) if is_remote(path) else pathlib.Path(path).expanduser())


def check_writable(folder: epath.PathLike) -> None:
    """Raises ValueError if a folder on this machine cannot be, or be written to."""
    if is_remote(folder):
        return
    path = pathlib.Path(folder).expanduser().absolute()
    there = next(x for x in (path, *path.parents) if x.exists())
    if not there.is_dir():
        raise ValueError(f"{folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: no permission to write in {there}")


def user_cache(name: str) -> pathlib.Path:
    """A folder of this user that is kept between runs and may be deleted."""
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    (root / "pfjax" / name).mkdir(parents=True, exist_ok=True)
    return root / "pfjax" / name


def write_text(path: epath.PathLike, text: str) -> None:
    """The file appears whole or not at all."""
    path = place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    tmp.replace(path)


@contextlib.contextmanager
def local_folder(folder: epath.PathLike) -> Iterator[pathlib.Path]:
    """Where code that knows local files only writes what shall be in `folder`.

    That is the folder itself, or one whose files are copied to it in the end.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="pfjax-") as local:
            yield pathlib.Path(local)
            upload(pathlib.Path(local), epath.Path(str(folder)))
    else:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(folder)


def upload(local: pathlib.Path, folder: epath.Path) -> None:
    """Copies the files of a folder, and of folders in it; `config.json` last, as it
    tells that a model is whole."""
    for file in sorted(local.rglob("*"), key=lambda x: x.name == "config.json"):
        if file.is_file():
            target = folder / str(file.relative_to(local))
            target.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(file).copy(target, overwrite=True)
