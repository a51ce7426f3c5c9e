"""Finds the folder of a model or of adapters: on this machine, in a bucket, on the hub."""

import hashlib
import os
import pathlib
import re

from pfjax.infra import storage
from pfjax.model import gguf, hf_config

_ASSETS = pathlib.Path(__file__).parents[1] / "assets"
_METRICS = "metrics.jsonl"  # in the folder of a run
ADAPTER_CONFIG, _ADAPTER = "adapter_config.json", "adapter_model.safetensors"
_FILES = [
    "README.md",
    "*.json",
    "*.safetensors",
    "tokenizer*",
    "*.jinja",
    "*.txt",
    "*.model",
]
# Of those on the hub: the same weights again, and folders of checkpoints or other formats.
_NOT_FETCHED = ["consolidated*", "*/*.json", "*/*.safetensors"]


def resolve(
    path_or_hub_id: str | os.PathLike, files: list[str] = _FILES
) -> pathlib.Path:
    """A folder on this machine: the embedded model, a path, or a download. Of a GGUF file
    (or a folder with one), the folder that it is converted to.

    A hub id may carry a revision, `Qwen/Qwen2.5-1.5B@<branch, tag or commit>`; with
    `HF_HUB_OFFLINE` set only the local cache is looked in.

    Raises:
      ValueError: if it is neither a folder with a model nor on the hub; what else it may
        be is named, with the way out.
    """
    name = os.fspath(path_or_hub_id)
    if name == "pfjax/toy":  # see examples/toy_model.py
        return _ASSETS / "toy"
    path = storage.place(name)
    is_there = storage.exists(path)
    if file := gguf.find(path):
        local = storage.local_copy(file)
        _refuse_pointers([local])
        return gguf.convert(local)
    if is_there and not path.is_dir():
        raise ValueError(
            f"{name} is a file: give the folder of the model, {path.parent}"
        )
    if is_there:
        folder = storage.local_copy(path, [*files, _METRICS])
    else:
        folder = path = _fetch(name, files)
    _refuse_other_folders(folder, name, path)
    _refuse_pointers([file for x in files for file in folder.glob(x)])
    return folder


def _refuse_pointers(files: list[pathlib.Path]) -> None:
    """Raises ValueError for what git puts in the place of a large file."""
    said = b"version https://git-lfs"
    for file in files:
        is_small = file.is_file() and file.stat().st_size < 1024
        if is_small and file.read_bytes().startswith(said):
            raise ValueError(
                f"{file} is a pointer of git LFS, not the file itself: run `git lfs pull` in "
                "its folder"
            )


def _fetch(name: str, files: list[str]) -> pathlib.Path:
    """Files of a hub id that may carry a revision."""
    path = storage.place(name)
    if (
        storage.is_remote(path)
        or path.is_absolute()
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@\S+)?", name)
    ):
        raise ValueError(f"model folder {path} does not exist")
    import huggingface_hub

    hub_id, _, revision = name.partition("@")
    wanted = {"revision": revision or None, "allow_patterns": files}
    wanted["ignore_patterns"] = _NOT_FETCHED
    # Some versions would ask for the list of the files of a commit all the same.
    is_offline = wanted["local_files_only"] = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, **wanted))
    except Exception as error:
        raise ValueError(
            f"model {name!r} is no folder here ({path.absolute()}) and could not be "
            f"fetched from the Hugging Face hub{' (HF_HUB_OFFLINE is set)' * is_offline}: {error}"
        ) from error


def _refuse_other_folders(folder: pathlib.Path, name: str, path: os.PathLike) -> None:
    """Raises ValueError for a folder that is none of a model, and says what it is; `path`
    is where it lies, of which `folder` may be a copy."""
    if (folder / _METRICS).is_file():
        model = storage.place(path) / "hf"
        has_model = (model / "config.json").is_file()
        what = f"give {model}" if has_model else f"`pfjax export {path}` writes {model}"
        raise ValueError(f"{path} is the folder of a run, its model is in hf: {what}")
    has_config, adapter = (folder / "config.json").is_file(), folder / ADAPTER_CONFIG
    if has_config and adapter.is_file():
        raise ValueError(
            f"{path} holds adapters beside the model (adapter_config.json), which "
            "transformers would add to it: merge them first, or move them elsewhere"
        )
    if adapter.is_file():
        base = hf_config.read_object(adapter).get("base_model_name_or_path") or "BASE"
        raise ValueError(
            f"{name} is an adapter, not a model: train from it with --config.model={base} "
            f"--config.lora.init_from={name}, or make a model of both with peft "
            "(merge_and_unload, save_pretrained) and give that"
        )
    if not has_config:
        raise ValueError(f"model folder {path} has no config.json")


def resolve_config(path_or_hub_id: str | os.PathLike) -> pathlib.Path:
    """As `resolve`, a folder in which only the `config.json` need be.

    Those of the recipes ship with pfjax; others are fetched from the hub.
    """
    name = os.fspath(path_or_hub_id)
    shipped = _ASSETS / name.partition("@")[0].replace("/", "--")
    if name.count("/") == 1 and (shipped / "config.json").is_file():
        return shipped
    return resolve(
        name, files=["config.json", "generation_config.json", ADAPTER_CONFIG]
    )


def resolve_adapter(path_or_hub_id: str) -> pathlib.Path:
    """As `resolve`, a folder of adapters in peft's format.

    Raises:
      ValueError: if there is none.
    """
    path, files = storage.place(path_or_hub_id), [ADAPTER_CONFIG, _ADAPTER]
    if not storage.exists(path) or not path.is_dir():
        path = _fetch(path_or_hub_id, files)
    if not (path / ADAPTER_CONFIG).is_file():
        of_run = path / "adapter"
        found = (of_run / ADAPTER_CONFIG).is_file()
        hint = f": give {of_run}" if found else ", it holds no adapter of peft's format"
        raise ValueError(f"adapter folder {path} has no {ADAPTER_CONFIG}{hint}")
    return storage.local_copy(path, files)


def fingerprint(folder: pathlib.Path, config: str = "config.json") -> str:
    """Tells one model from another without reading all of it: of its config, and of
    names, sizes and 16 samples of each file of weights."""
    digest = hashlib.sha256((folder / config).read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("consolidated"):  # the same weights again
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for i in range(16):
                f.seek(i * max(size - 65_536, 0) // 15)
                digest.update(f.read(65_536))
    return digest.hexdigest()[:16]
