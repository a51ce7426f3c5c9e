"""Hugging Face folders <-> policies: `config.json` and safetensors, no torch."""

import contextlib
import dataclasses
import fnmatch
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from pfjax.infra import sharding, storage
from pfjax.model import hf_config, hub, lora, rope, tokenizer, transformer, weights
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Policy

# Of a policy for every alpha, see `dial`.
DIAL, _DIAL_STEM = "dial.json", "dial"
_DIAL_FIELDS = ("lora_rank", "lora_alpha", "lora_targets", "alpha_range", "stop_ids")
# What an export takes from its base, beside the config: none of it is weights, tells of how
# the base came to be, or describes it.
_SIDE_FILES = [
    "tokenizer*", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json",
    "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "added_tokens.json",
    "special_tokens_map.json", "generation_config.json", "*processor_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
# What else lies in the folder of a model, and may be replaced with it.
_OF_MODEL = [
    "config.json", "*.safetensors", "*.safetensors.index.json", DIAL, "README.md",
    "additional_chat_templates", ".gitattributes", ".cache",
]  # fmt: skip
# A policy is trained to be sampled as it is; transformers would take the 50 likeliest tokens.
_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def load(
    path_or_hub_id: str | os.PathLike, mesh: Mesh | None = None, dtype: str = "float32"
) -> Policy:
    """Loads a policy from a folder in Hugging Face format, a hub id, a GGUF file, or
    "pfjax/toy".

    Args:
      path_or_hub_id: where; `"pfjax/toy"` ships with pfjax.
      mesh: places the parameters on this mesh; the default device when None.
      dtype: type of the parameters and of the computation.

    Raises:
      ValueError: if there is no such model, its architecture is not supported,
        its tensors are not exactly those that its config names, or for another dtype.

    >>> policy = load("pfjax/toy")
    >>> policy.config.num_layers
    3
    """
    dtype, folder = _float_type(dtype), hub.resolve(path_or_hub_id)
    if (folder / DIAL).is_file():
        return _load_dial(folder, mesh, dtype)
    config = dataclasses.replace(hf_config.read(folder), dtype=dtype)
    abstract, where = _places(config, mesh)
    params = weights.load(folder, config, abstract, where, jnp.dtype(dtype))
    return Policy(config, params)


_FLOATS = ("float32", "bfloat16", "float16")


def _float_type(dtype: Any) -> str:
    """Its name. Raises ValueError for what no model is computed or kept in."""
    with contextlib.suppress(TypeError):
        if (name := jnp.dtype(dtype).name) in _FLOATS:
            return name
    raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(_FLOATS)}")


def _check_base(model: ModelConfig, base: str, folder: pathlib.Path) -> None:
    """Raises ValueError if the config of a base, which is to be written for a model, is of
    another one: the folder would be read as what the model is not."""

    def described(c: ModelConfig) -> dict[str, Any]:
        # The others are written as they are of the model.
        kept = {"eos_token_id": None, "tie_word_embeddings": None}
        return hf_config.to_json(c, c.dtype) | kept | {"dtype": None}

    one, other = described(hf_config.read(folder)), described(model)
    names = sorted(x for x in one | other if one.get(x) != other.get(x))
    if names:
        differ = ", ".join(
            f"{x} ({one.get(x)}, the policy {other.get(x)})" for x in names
        )
        raise ValueError(f"base={base} is another model than the policy: {differ}")


def _places(
    config: ModelConfig, mesh: Mesh | None
) -> tuple[transformer.Params, transformer.Params]:
    """Shapes and shardings of the parameters."""
    abstract = transformer.abstract_params(config)
    if mesh is None:
        here = SingleDeviceSharding(jax.devices()[0])
        return abstract, jax.tree.map(lambda _: here, abstract)
    axes = transformer.logical_axes(config)
    return abstract, sharding.tree_shardings(mesh, axes, abstract)


def _load_dial(folder: pathlib.Path, mesh: Mesh | None, dtype: str) -> Policy:
    """A policy for every alpha, its base from where it was trained from."""
    said = storage.read_json(folder / DIAL)
    base = hub.resolve(said["base"])
    if said["base_fingerprint"] != hub.fingerprint(base):
        raise ValueError(
            f"{said['base']} is no longer the model that {folder} was trained from"
        )
    fields = {k: tuple(x) if isinstance(x, list) else x for k, x in said.items()}
    fields = {k: fields[k] for k in _DIAL_FIELDS}
    policy = load(base, mesh, dtype)
    config = dataclasses.replace(policy.config, **fields)
    abstract, where = map(lora.select, _places(config, mesh))
    how = (abstract, where, jnp.dtype("float32"), _DIAL_STEM)
    adapters = weights.load(folder, config, *how)
    return Policy(config, lora.join(policy.params, adapters))


def _write_dial(policy: Policy, folder: pathlib.Path, base: str) -> None:
    """What `_load_dial` reads, beside the base's config and tokenizer."""
    config, params = policy
    adapters, dtype = lora.select(params), jnp.dtype("float32")
    weights.write_tensors(config, adapters, folder, dtype, _DIAL_STEM)
    said = {"base": base, "base_fingerprint": hub.fingerprint(hub.resolve(base))}
    said |= {name: getattr(config, name) for name in _DIAL_FIELDS}
    if jax.process_index() == 0:
        (folder / DIAL).write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def save(
    policy: Policy,
    out_dir: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: str | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder that `transformers` and `pfjax.load` read, whole or not at all.

    Adapters are merged. Of a policy for every alpha they are written alone, for `pfjax.load`,
    which reads the rest from `base`; `at_alpha` makes one of its policies to be merged.

    Args:
      out_dir: the folder; a model that is there is replaced.
      base: a model folder or hub id whose config and tokenizer files are copied, but for
        the stop tokens, which are the policy's and its tokenizer's (of one that reads
        images too, the config of its language model, which is what is written); without
        it a minimal `config.json` is written, and no tokenizer.
      dtype: type of the tensors; that which the base's config names, else of the parameters.
      card: text of `README.md`, the model card; none when not given.

    Raises:
      ValueError: if the folder is the base, holds anything but a model or cannot be replaced,
        a policy for every alpha is given no base, or the base has another config than it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(load("pfjax/toy"), f"{folder}/out", base="pfjax/toy")
    ...     sorted(path.name for path in pathlib.Path(folder, "out").iterdir())[:2]
    ['chat_template.jinja', 'config.json']
    """
    policy = tokenizer.with_stop_ids(transformer.as_policy(policy))
    if policy.config.alpha_range and base is None:
        raise ValueError("a policy for every alpha is saved beside its base: give base")
    check_replaceable(out_dir, base)
    if not policy.config.alpha_range:
        policy = lora.merge(policy)
    if storage.is_remote(out_dir):
        place = storage.place(out_dir)
        with storage.local_folder(place.parent) as local:
            save(policy, local / place.name, base=base, dtype=dtype, card=card)
            if jax.process_index() == 0 and storage.exists(place):
                place.rmtree()
        multihost_utils.sync_global_devices("pfjax.save")
        return
    out = pathlib.Path(storage.place(out_dir)).resolve()  # of a link where it points
    out.parent.mkdir(parents=True, exist_ok=True)
    source = None if base is None else hub.resolve(base)
    if source is not None:
        _check_base(policy.config, os.fspath(base), source)
    config = {} if source is None else storage.read_json(source / "config.json")
    config = hf_config.language_part(config)
    of_base = config.pop("torch_dtype", None)  # as transformers 4 named it
    of_base = config.get("dtype") or of_base
    of_base = of_base if of_base in _FLOATS else policy.params["embed"].dtype
    dtype = _float_type(dtype or of_base)
    config = config or hf_config.to_json(policy.config, dtype)
    with (
        storage.named(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside,
    ):
        folder, old = (pathlib.Path(beside) / name for name in ("new", "old"))
        folder.mkdir()
        if policy.config.alpha_range:
            _write_dial(policy, folder, os.fspath(base))
        else:
            weights.write_tensors(*policy, folder, jnp.dtype(dtype))
        if jax.process_index() == 0:
            if card is not None:
                (folder / "README.md").write_text(card, "utf-8")
            if source is not None:
                _copy_side_files(source, folder)
            _write_configs(folder, config, policy.config, dtype)
            if out.exists():
                out.rename(old)  # where nothing is lost if this fails
            folder.rename(out)
    multihost_utils.sync_global_devices("pfjax.save")


def check_replaceable(
    out_dir: str | os.PathLike, *bases: str | os.PathLike | None
) -> None:
    """Raises ValueError if a folder holds anything but a model, which `save` would remove,
    or is one of the models that it is made from, or cannot be put in the place of another."""
    out = storage.place(out_dir)
    if not storage.exists(out):
        return
    for base in filter(None, bases):
        if storage.is_same(out, storage.place(base)):
            raise ValueError(
                f"{out} is the model that this one is made from, which would be lost: "
                "choose another folder"
            )
    if out.is_file():
        raise ValueError(f"{out} is a file: choose another folder for the model")
    if not storage.is_remote(out):
        here = pathlib.Path(out).resolve()
        if os.path.ismount(here) or pathlib.Path.cwd().is_relative_to(here):
            raise ValueError(
                f"{here} is a mount point, or the folder of this process, and cannot be "
                "replaced: choose a folder inside of it"
            )
    files = [file.name for file in out.iterdir()]
    is_of = lambda name, kinds: any(fnmatch.fnmatch(name, x) for x in kinds)
    other = sorted(x for x in files if not is_of(x, [*_OF_MODEL, *_SIDE_FILES]))
    has_weights = any(x.endswith(".safetensors") for x in files)
    if other or (files and not has_weights):
        raise ValueError(
            f"{out} holds something other than a model, which would be lost "
            f"({', '.join((other or files)[:3])}): choose another folder"
        )


def _write_configs(
    folder: pathlib.Path, config: dict, model: ModelConfig, dtype: str
) -> None:
    """Writes `config.json`, and `generation_config.json`: what ends a response, and nothing
    of how the base was to be sampled."""
    stop_ids = {"eos_token_id": list(model.stop_ids) or None}
    path = folder / "generation_config.json"
    old = storage.read_json(path) if path.is_file() else {}
    kept = {k: old[k] for k in ("bos_token_id", "pad_token_id") if k in old}
    path.write_text(json.dumps(kept | stop_ids | _SAMPLING, indent=2) + "\n", "utf-8")
    config |= rope.older_names(config) | {"tie_word_embeddings": model.tied_embeddings}
    # The second name is that of transformers 4.
    config |= stop_ids | {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _copy_side_files(source: pathlib.Path, out: pathlib.Path) -> None:
    for file in {file for x in _SIDE_FILES for file in source.glob(x)}:
        if file.is_file():
            place = out / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
