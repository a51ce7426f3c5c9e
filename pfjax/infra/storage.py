"""Folders that may be in a bucket."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def place(path: epath.PathLike) -> epath.Path:
    """A path as given, local or `gs://`."""
    return epath.Path(str(path) if is_remote(path) else pathlib.Path(path).expanduser())


@contextlib.contextmanager
def local_folder(folder: epath.PathLike) -> Iterator[pathlib.Path]:
    """Where code that knows local files only writes what shall be in `folder`.

    That is the folder itself, or one whose files are copied to it in the end.
    """
    if not is_remote(folder):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="pfjax-") as name:
        local = pathlib.Path(name)
        yield local
        upload(local, epath.Path(str(folder)))


def upload(local: pathlib.Path, folder: epath.Path) -> None:
    """Copies the files of a folder, and of folders in it; `config.json` last, as it
    tells that a model is whole."""
    found = [x for x in sorted(local.rglob("*")) if x.is_file()]
    for file in sorted(found, key=lambda x: x.name == "config.json"):
        target = folder / str(file.relative_to(local))
        target.parent.mkdir(parents=True, exist_ok=True)
        epath.Path(file).copy(target, overwrite=True)
