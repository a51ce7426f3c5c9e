"""Hugging Face folders <-> policies: `config.json` and safetensors, no torch."""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
import re
import shutil
import tempfile

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from pfjax.infra import sharding, storage
from pfjax.model import hf_config, transformer, weights
from pfjax.model.transformer import Policy

EMBEDDED = "pfjax/toy"  # loads the assets of this package, see examples/toy_model.py


_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.model"]


def resolve(
    path_or_hub_id: str | os.PathLike, files: list[str] = _FILES
) -> pathlib.Path:
    """A folder on this machine: the embedded model, a path, or a download.

    A hub id may carry a revision, `Qwen/Qwen2.5-1.5B@<branch, tag or commit>`; offline
    mode (`HF_HUB_OFFLINE`) looks in the local cache only.

    Raises:
      ValueError: if it is neither a folder with a `config.json` nor on the hub.
    """
    name = os.fspath(path_or_hub_id)
    if name == EMBEDDED:
        return pathlib.Path(str(importlib.resources.files("pfjax") / "assets" / "toy"))
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model folder {path} has no config.json")
        return path
    if path.is_absolute() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@\S+)?", name):
        raise ValueError(f"model folder {path} does not exist")
    import huggingface_hub

    hub_id, _, revision = name.partition("@")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision or None, allow_patterns=files
            )
        )
    except Exception as error:
        raise ValueError(
            f"model {name!r} is no folder here ({path.absolute()}) and could not be "
            f"fetched from the Hugging Face hub: {error}"
        ) from error


def resolve_config(path_or_hub_id: str | os.PathLike) -> pathlib.Path:
    """A folder with the `config.json` of a model, its weights perhaps not there.

    Those of the recipes ship with pfjax; others are fetched from the hub.

    Raises:
      ValueError: as `resolve` does.
    """
    name = os.fspath(path_or_hub_id)
    assets = pathlib.Path(str(importlib.resources.files("pfjax") / "assets"))
    shipped = assets / name.partition("@")[0].replace("/", "--")
    if name.count("/") == 1 and (shipped / "config.json").is_file():
        return shipped
    return resolve(name, files=["config.json", "generation_config.json"])


def fingerprint(folder: pathlib.Path) -> str:
    """Tells one model from another without reading all of it: of `config.json`, and of
    names, sizes and 16 samples of each file of weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for i in range(16):
                f.seek(i * max(size - 65_536, 0) // 15)
                digest.update(f.read(65_536))
    return digest.hexdigest()[:16]


def load(
    path_or_hub_id: str | os.PathLike, mesh: Mesh | None = None, dtype: str = "float32"
) -> Policy:
    """Loads a policy from a folder in Hugging Face format, a hub id, or "pfjax/toy".

    Args:
      path_or_hub_id: where; `"pfjax/toy"` is the model that ships with pfjax.
      mesh: places the parameters on this mesh; the default device when None.
      dtype: type of the parameters and of the computation.

    Returns:
      The policy.

    Raises:
      ValueError: if there is no such model, its architecture is not supported, or
        its tensors are not exactly those that its config names.

    >>> policy = load("pfjax/toy")
    >>> policy.config.num_layers
    3
    """
    folder = resolve(path_or_hub_id)
    config = dataclasses.replace(hf_config.read(folder), dtype=dtype)
    abstract = transformer.abstract_params(config)
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    else:
        where = sharding.tree_shardings(
            mesh, transformer.logical_axes(config), abstract
        )
    tensors = weights.open_folder(folder)
    weights.check_tensors(folder, tensors, abstract)
    params: transformer.Params = {}
    for path, name, dims, leaf in weights.leaves(abstract):
        is_layer = path[0] == "blocks"
        read = weights.reader(
            tensors, name, dims, leaf.shape, is_layer, jnp.dtype(dtype)
        )
        at = where
        for key in path:
            at = at[key]
        array = jax.make_array_from_callback(leaf.shape, at, read)
        target = params.setdefault("blocks", {}) if is_layer else params
        target[path[-1]] = array
    return Policy(config, params)


def save(
    policy: Policy,
    out_dir: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder that `transformers` and `pfjax.load` read.

    The folder appears whole or not at all: it is written beside its place and
    renamed.

    Args:
      policy: what to write.
      out_dir: the folder; an old one of that name is replaced.
      base: a model folder or hub id whose config and tokenizer files are copied;
        without it a minimal `config.json` is written, and no tokenizer.
      dtype: type of the tensors; that of the base, else of the parameters.
      card: text of `README.md`, the model card; none when not given.

    Raises:
      ValueError: if the policy has adapters that are not merged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(load("pfjax/toy"), f"{folder}/out", base="pfjax/toy")
    ...     sorted(path.name for path in pathlib.Path(folder, "out").iterdir())[:2]
    ['chat_template.jinja', 'config.json']
    """
    if policy.config.lora_rank:
        raise ValueError(
            "the policy has adapters: save lora.merge(policy), or lora.save_peft"
        )
    if storage.is_remote(out_dir):
        place = epath.Path(os.fspath(out_dir))
        with storage.local_folder(place.parent) as local:
            save(policy, local / place.name, base=base, dtype=dtype, card=card)
        return
    out = pathlib.Path(out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    source = None if base is None else resolve(base)
    if dtype is None and source is not None:
        stored = json.loads((source / "config.json").read_text())
        dtype = stored.get("dtype") or stored.get("torch_dtype")
    dtype = dtype or str(policy.params["embed"].dtype)
    if jax.process_index() > 0:  # takes part in gathering only
        weights.write_tensors(policy.params, out, jnp.dtype(dtype))
        multihost_utils.sync_global_devices("pfjax.save")
        return
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tmp.chmod(0o755)
        if card is not None:
            (tmp / "README.md").write_text(card)
        # The config comes last: without it a folder does not load.
        weights.write_tensors(policy.params, tmp, jnp.dtype(dtype))
        if source is None:
            config = json.dumps(hf_config.to_json(policy.config, dtype), indent=2)
            (tmp / "config.json").write_text(config + "\n")
        else:
            _copy_side_files(source, tmp, dtype)
        if out.exists():
            shutil.rmtree(out)
        tmp.rename(out)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("pfjax.save")


def _copy_side_files(source: pathlib.Path, out: pathlib.Path, dtype: str) -> None:
    for file in sorted(source.iterdir()):
        is_weight = ".safetensors" in file.name or file.suffix in (
            ".bin",
            ".pth",
            ".pt",
        )
        if file.is_file() and not is_weight and file.suffix not in (".md", ".jsonl"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
