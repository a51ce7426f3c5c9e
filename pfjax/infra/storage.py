"""One place for all paths: on this machine, or in a bucket (`gs://`, `s3://`).

What a person names is made a path by `place`, which can be read and listed wherever it is.
What is wrong with a bucket is a `BucketError`, one line with the cure.
"""

import contextlib
import fnmatch
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
from etils import epath

try:
    import fcntl
except ImportError:
    raise ImportError("pfjax runs on Linux and macOS; on Windows, in WSL") from None

# Packages by which fsspec reads buckets, and what installs them.
_PACKAGES = {
    "gs": (
        "gcsfs",
        "pip install 'pfjax[gcs]' (in a checkout: pip install -e '.[gcs]')",
    ),
    "s3": ("s3fs", "pip install s3fs"),
}
# What tells a version of an object from another, of the first store that has it.
_STAMPS = ("crc32c", "ETag", "mtime")


class BucketError(OSError, ValueError):
    """A bucket that is not there, may not be used, or does not answer."""


def is_remote(path: epath.PathLike) -> bool:
    return "://" in str(path)


def place(path: epath.PathLike) -> epath.Path:
    """A path as given, local or in a bucket.

    Raises:
      ValueError: if it is a URL of something else.
    """
    text = os.fspath(path)
    if not is_remote(path):
        if match := re.match(r"(gs|s3):/*(?=[^/])", text):
            raise ValueError(
                f"{text}: did you mean {match[1]}://{text[match.end() :]}?"
            )
        return epath.Path(pathlib.Path(text).expanduser())
    scheme, _, rest = text.partition("://")
    if scheme in _PACKAGES and rest.strip("/"):
        _prepare()
        return epath.Path(text)
    if scheme in _PACKAGES:
        raise ValueError(f"{text} names no bucket: {scheme}://BUCKET/FOLDER")
    raise ValueError(
        f"{text}: paths are on this machine or in a bucket, gs://BUCKET/... (s3://)"
    )


def is_same(one: epath.Path, other: epath.Path) -> bool:
    """Whether two paths lead to one file or folder, links followed."""
    whole = lambda path: os.fspath(path) if is_remote(path) else path.resolve()
    return whole(one) == whole(other)


@functools.cache
def _prepare() -> None:
    """Settings of the libraries that read buckets, before they are used first."""
    # Its listings are kept for ever by default, and others write to the same folder.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    fsspec.config.conf.setdefault("s3", {})["use_listings_cache"] = False
    # A warning for each request whose bucket's layout may not be asked for, and a stack
    # for each that fails; what fails is said by `explained`.
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _files(path: epath.PathLike) -> fsspec.AbstractFileSystem:
    """What reads and writes in a bucket, in fewer requests than `epath`."""
    return fsspec.filesystem(os.fspath(path).partition("://")[0])


@contextlib.contextmanager
def explained(path: epath.PathLike) -> Iterator[None]:
    """Turns what libraries raise for a bucket, of many kinds, into a `BucketError`; leaves
    alone what is raised for a path of this machine."""
    try:
        yield
    except BucketError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise BucketError(_explanation(str(path), error)) from error


def _explanation(path: str, error: Exception) -> str:
    scheme, _, rest = path.partition("://")
    bucket, known = f"{scheme}://{rest.partition('/')[0]}", _PACKAGES[scheme]
    said = (str(error) or repr(error)).strip().splitlines()
    code = getattr(error, "code", None)
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, ImportError):
        return f"{path}: {scheme}:// needs the package {known[0]}: {known[1]}"
    if isinstance(error, FileNotFoundError):
        return (
            f"{path}: there is no bucket {bucket}: correct its name, or make it "
            f"(gcloud storage buckets create {bucket} --location=REGION)"
        )
    is_unknown = code in (401, "401") or (kinds & {"google"} and code is None)
    if is_unknown or "NoCredentials" in type(error).__name__:
        return (
            f"{path}: no credentials that {bucket} takes: log in (gcloud auth "
            "application-default login), or on a cloud machine give it a service account "
            f"with access to storage. {said[-1]}"
        )
    is_refused = isinstance(error, PermissionError) or code in (403, "403")
    if is_refused or said[0].startswith("Forbidden"):
        return (
            f"{path}: no permission: give this account roles/storage.objectUser (gcloud "
            f"storage buckets add-iam-policy-binding {bucket} --member=... "
            f"--role=roles/storage.objectUser). {said[-1]}"
        )
    return f"{path}: the bucket does not answer: {type(error).__name__}: {said[0]}"


def exists(path: epath.PathLike) -> bool:
    """Whether there is a file or folder.

    Raises:
      BucketError: if there is not even its bucket, or it may not be asked.
    """
    path = place(path)
    if not is_remote(path):
        return path.exists()
    with explained(path):
        try:
            _files(path).info(str(path))
        except FileNotFoundError:  # as for what is in no bucket
            # A list, unlike the bucket's description, is for all who may read.
            _files(path).ls("/".join(str(path).split("/")[:3]), detail=False)
            return False
        return True


def make_folder(path: epath.PathLike) -> None:
    """In a bucket nothing is made: folders are names there, and gcsfs takes a bucket that
    is empty and may not be described for none."""
    if not is_remote(path):
        place(path).mkdir(parents=True, exist_ok=True)


def check_writable(folder: epath.PathLike) -> None:
    """Raises ValueError if a folder cannot be, or be written to; of a bucket a file is
    written and removed to learn it."""
    if is_remote(folder):
        probe = f"{place(folder)}/.probe-{secrets.token_hex(4)}"
        with explained(folder):
            _files(probe).pipe_file(probe, b"")
            _files(probe).rm_file(probe)
        return
    path = pathlib.Path(place(folder)).absolute()
    there = next(x for x in (path, *path.parents) if x.exists())
    if not there.is_dir():
        raise ValueError(f"{folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: no permission to write in {there}")


def is_stream(path: epath.PathLike) -> bool:
    """Whether it is a device or a pipe: written to, and never replaced by a file."""
    if is_remote(path):
        return False
    local = pathlib.Path(place(path))  # `epath` takes a pipe for a file
    return local.exists() and not (local.is_file() or local.is_dir())


def user_cache(name: str) -> pathlib.Path:
    """A folder of this user that is kept between runs and may be deleted.

    Raises:
      ValueError: if it cannot be written, as in a container whose user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = pathlib.Path(root).expanduser() / "pfjax" / name
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where home is
        folder = None
    if folder is None or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{root} cannot be written: set XDG_CACHE_HOME to a folder that can"
        )
    return folder


def read_bytes(path: epath.PathLike) -> bytes:
    """What a file holds; of a bucket by one request.

    Raises:
      FileNotFoundError: if there is none.
      BucketError: if the bucket is at fault.
    """
    if not is_remote(path):
        return place(path).read_bytes()
    path = place(path)
    try:
        return _files(path).cat_file(str(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise BucketError(_explanation(str(path), error)) from error


def read_text(path: epath.PathLike) -> str:
    """As `read_bytes`, of UTF-8.

    Raises:
      ValueError: if it is none.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def read_json(path: epath.PathLike) -> Any:
    """As `read_text`, of JSON.

    Raises:
      ValueError: if it is none.
    """
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:  # or no text
        if isinstance(error, BucketError):
            raise
        raise ValueError(
            f"{path} is not JSON: {error}; if it is damaged, bring it back or remove it"
        ) from None


def write_text(path: epath.PathLike, text: str) -> None:
    """The file appears whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """The file appears whole or not at all; in a bucket by one request, if it is small.
    A link stays one: what it leads to is written.

    Raises:
      BucketError: if the bucket is at fault.
    """
    path = place(path)
    if is_remote(path):
        with explained(path):
            _files(path).pipe_file(str(path), content)
        return
    if is_stream(path):
        if content:  # who reads a pipe takes the end of an empty write for that of all
            path.write_bytes(content)
        return
    path = epath.Path(os.path.realpath(path))
    make_folder(path.parent)
    tmp = path.with_name(f"{path.name}.tmp")
    with named(path):
        tmp.write_bytes(content)
    tmp.replace(path)


def append_text(path: epath.PathLike, text: str) -> None:
    """Adds to a file of this machine, of which a kill may leave the last line cut."""
    with named(path), open(place(path), "a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def named(path: epath.PathLike) -> Iterator[None]:
    """Puts the file or folder into what is raised of it: a full disk does not say which it is."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def local_copy(path: epath.PathLike, patterns: Sequence[str] = ("*",)) -> pathlib.Path:
    """Where code that knows local files only reads a file, or the files of a folder (not of
    folders in it) whose names match: there, or a copy of what is in a bucket.

    Copies are kept, by their content, in this user's cache; of several processes of a
    machine one makes them.

    Raises:
      ValueError: if it does not exist, or there is no room for it.
    """
    path = place(path)
    if not is_remote(path):
        return pathlib.Path(path)
    if not exists(path):
        raise ValueError(f"{path} does not exist")
    with explained(path):
        found, is_file = _objects(path, patterns)
    versions = [
        (name, x["size"], next((str(x[k]) for k in _STAMPS if x.get(k)), ""))
        for name, x in found.items()
    ]
    digest = hashlib.sha256(repr((str(path), versions)).encode()).hexdigest()[:16]
    folder = user_cache("buckets") / f"{path.stem}-{digest}"
    with open(folder.with_name(f".{folder.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not folder.is_dir():
            _download(path, found, folder)
    return folder / path.name if is_file else folder


def _objects(path: epath.Path, patterns: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """What is known of each file that is meant, by name; whether the path is of one."""
    about = _files(path).info(str(path))
    if about["type"] == "file":
        return {path.name: about}, True
    named = {
        x["name"].rpartition("/")[2]: x
        for x in _files(path).ls(str(path), detail=True)
        if x["type"] == "file"
    }
    is_meant = lambda name: any(fnmatch.fnmatch(name, p) for p in patterns)
    return {k: named[k] for k in sorted(named) if k and is_meant(k)}, False


def _download(path: epath.Path, found: dict[str, Any], folder: pathlib.Path) -> None:
    """The folder appears whole or not at all."""
    size = sum(x["size"] for x in found.values())
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise ValueError(
            f"{path} has {size / 1e9:.1f} GB, and {folder.parent} has room for "
            f"{free / 1e9:.1f}: XDG_CACHE_HOME names another place"
        )
    if size > 1e8:
        print(f"copying {path}, {size / 1e9:.1f} GB, to {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as new:
        made = pathlib.Path(new, folder.name)
        made.mkdir()
        with explained(path):
            if found:  # several at once
                names = [x["name"] for x in found.values()]
                _files(path).get(names, [str(made / name) for name in found])
        made.rename(folder)


@contextlib.contextmanager
def local_folder(folder: epath.PathLike) -> Iterator[pathlib.Path]:
    """Where code that knows local files only writes what shall be in `folder`.

    That is the folder itself, or one whose files are copied to it in the end.
    """
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="pfjax-") as local, named(local):
            yield pathlib.Path(local)
            upload(pathlib.Path(local), place(folder))
    else:
        make_folder(folder)
        yield pathlib.Path(place(folder))


def upload(local: pathlib.Path, folder: epath.Path) -> None:
    """Copies the files of a folder, and of folders in it; `config.json` last, as it
    tells that a model is whole."""
    for file in sorted(local.rglob("*"), key=lambda x: x.name == "config.json"):
        if file.is_file():
            target = str(folder / str(file.relative_to(local)))
            with explained(folder):
                _files(target).put_file(str(file), target)
