"""Hugging Face folders <-> policies: `config.json` and safetensors, no torch.

One table says where each tensor lives on both sides; loading reads only the bytes
that a device's shard needs, saving writes tensor by tensor.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from pfjax import sharding
from pfjax.policy import hf_config, model
from pfjax.policy.model import Policy

EMBEDDED = "pfjax/toy"  # loads the assets of this package, see pfjax/toy.py
MAX_FILE_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

# Our parameter -> (HF name, for each HF dimension the dimensions of ours that
# it holds, layer axis left out). A layer's names stand below `model.layers.<i>.`.
_TOP = {
    "embed": ("model.embed_tokens.weight", ((0,), (1,))),
    "final_norm": ("model.norm.weight", ((0,),)),
    "head": ("lm_head.weight", ((0,), (1,))),
}
LAYER = {
    "attn_norm": ("input_layernorm.weight", ((0,),)),
    "wq": ("self_attn.q_proj.weight", ((1, 2), (0,))),
    "wk": ("self_attn.k_proj.weight", ((1, 2), (0,))),
    "wv": ("self_attn.v_proj.weight", ((1, 2), (0,))),
    "bq": ("self_attn.q_proj.bias", ((0, 1),)),
    "bk": ("self_attn.k_proj.bias", ((0, 1),)),
    "bv": ("self_attn.v_proj.bias", ((0, 1),)),
    "q_norm": ("self_attn.q_norm.weight", ((0,),)),
    "k_norm": ("self_attn.k_norm.weight", ((0,),)),
    "wo": ("self_attn.o_proj.weight", ((2,), (0, 1))),
    "bo": ("self_attn.o_proj.bias", ((0,),)),
    "mlp_norm": ("post_attention_layernorm.weight", ((0,),)),
    "w_gate": ("mlp.gate_proj.weight", ((1,), (0,))),
    "w_up": ("mlp.up_proj.weight", ((1,), (0,))),
    "w_down": ("mlp.down_proj.weight", ((1,), (0,))),
    "b_gate": ("mlp.gate_proj.bias", ((0,),)),
    "b_up": ("mlp.up_proj.bias", ((0,),)),
    "b_down": ("mlp.down_proj.bias", ((0,),)),
}
# Adapters, named as peft does: A reads what its projection reads, B writes the same.
for _name in ("wq", "wk", "wv", "w_gate", "w_up", "w_down", "wo"):
    _hf_name, (_out, _in) = LAYER[_name]
    _module = _hf_name.removesuffix(".weight")
    LAYER[f"{_name}_a"] = (
        f"{_module}.lora_A.weight",
        ((len(_in),), tuple(range(len(_in)))),
    )
    LAYER[f"{_name}_b"] = (
        f"{_module}.lora_B.weight",
        (tuple(range(1, 1 + len(_out))), (0,)),
    )
# Buffers that some checkpoints carry and nothing reads.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")


def resolve(path_or_hub_id: str | os.PathLike) -> pathlib.Path:
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
    files = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.model"]
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


def _leaves(
    params: model.Params,
) -> Iterator[tuple[tuple[str, ...], str, tuple[tuple[int, ...], ...], Any]]:
    """(path, HF name with `{}` for the layer, dimensions, leaf) of each parameter."""
    for name, value in params.items():
        if name == "blocks":
            for key, leaf in value.items():
                hf_name, dims = LAYER[key]
                yield ("blocks", key), "model.layers.{}." + hf_name, dims, leaf
        else:
            yield (name,), *_TOP[name], value


def load(
    path_or_hub_id: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: str = "float32",
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
    abstract = model.abstract_params(config)
    if mesh is None:
        where = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    else:
        where = sharding.tree_shardings(mesh, model.logical_axes(config), abstract)
    tensors = _open(folder)
    _check_tensors(folder, tensors, abstract)
    params: model.Params = {}
    for path, name, dims, leaf in _leaves(abstract):
        is_layer = path[0] == "blocks"
        read = _reader(tensors, name, dims, leaf.shape, is_layer, jnp.dtype(dtype))
        at = where
        for key in path:
            at = at[key]
        array = jax.make_array_from_callback(leaf.shape, at, read)
        target = params.setdefault("blocks", {}) if is_layer else params
        target[path[-1]] = array
    return Policy(config, params)


class _Tensor(NamedTuple):
    """A tensor in a file. Opened anew for each read: pages of a mapping that stays
    open would count as this process's memory until the whole model is read."""

    file: pathlib.Path
    name: str
    shape: list[int]

    def read(self, cut: tuple[slice, ...]) -> np.ndarray:
        with safetensors.safe_open(self.file, framework="numpy") as handle:
            return handle.get_slice(self.name)[cut]


def _open(folder: pathlib.Path) -> dict[str, _Tensor]:
    """HF name -> tensor, of one file or of an index of many."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    elif single.is_file():
        files = [single]
    else:
        raise ValueError(
            f"{folder} holds neither model.safetensors nor {_INDEX}; weights in other "
            "formats (pytorch_model.bin) are not loaded: convert them with transformers"
        )
    tensors: dict[str, _Tensor] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118
                    shape = list(handle.get_slice(name).get_shape())
                    tensors[name] = _Tensor(file, name, shape)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"{file} cannot be read as safetensors: {error}"
            ) from error
    return tensors


def _check_tensors(
    folder: pathlib.Path, tensors: dict[str, _Tensor], abstract: model.Params
) -> None:
    wanted = {}
    for path, name, dims, leaf in _leaves(abstract):
        is_layer = path[0] == "blocks"
        shape = leaf.shape[1:] if is_layer else leaf.shape
        hf_shape = [int(np.prod([shape[d] for d in group])) for group in dims]
        for i in range(leaf.shape[0] if is_layer else 1):
            wanted[name.format(i)] = hf_shape
    present = {name for name in tensors if not _IGNORED.search(name)}
    if "head" not in abstract:
        present.discard("lm_head.weight")  # a copy of the tied embedding
    problems = [f"missing {n} {wanted[n]}" for n in wanted if n not in present]
    problems += [f"unexpected {n}" for n in sorted(present - set(wanted))]
    problems += [
        f"{n} has shape {tensors[n].shape}, expected {shape}"
        for n, shape in wanted.items()
        if n in present and tensors[n].shape != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{folder} does not match its config.json:\n  {shown}{more}")


def _reader(
    tensors: dict[str, _Tensor],
    name: str,
    dims: tuple[tuple[int, ...], ...],
    shape: tuple[int, ...],
    is_layer: bool,
    dtype: jnp.dtype,
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """A function from an index of our array to its values, reading only those."""

    def read_one(tensor: _Tensor, index: tuple[slice, ...], full: tuple[int, ...]):
        spans = [s.indices(n)[:2] for s, n in zip(index, full, strict=True)]
        cut, sizes = [], []
        for group in dims:
            # Of several dimensions in one, only the first may be split.
            inner = int(np.prod([full[d] for d in group[1:]]))
            lo, hi = spans[group[0]]
            cut.append(slice(lo * inner, hi * inner))
            sizes += [hi - lo, *(full[d] for d in group[1:])]
        order = [d for group in dims for d in group]
        return tensor.read(tuple(cut)).reshape(sizes).transpose(np.argsort(order))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        sizes = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
        out = np.empty(sizes, dtype)
        if is_layer:
            for at, i in enumerate(range(*index[0].indices(shape[0]))):
                out[at] = read_one(tensors[name.format(i)], index[1:], shape[1:])
        else:
            out[...] = read_one(tensors[name], index, shape)
        return out

    return read


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
    out = pathlib.Path(out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    source = None if base is None else resolve(base)
    if dtype is None and source is not None:
        stored = json.loads((source / "config.json").read_text())
        dtype = stored.get("dtype") or stored.get("torch_dtype")
    dtype = dtype or str(policy.params["embed"].dtype)
    if jax.process_index() > 0:  # takes part in gathering only
        write_tensors(policy.params, out, jnp.dtype(dtype))
        multihost_utils.sync_global_devices("pfjax.save")
        return
    tmp = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tmp.chmod(0o755)
        if card is not None:
            (tmp / "README.md").write_text(card)
        # The config comes last: without it a folder does not load.
        write_tensors(policy.params, tmp, jnp.dtype(dtype))
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


def write_tensors(
    params: model.Params,
    out: pathlib.Path,
    dtype: jnp.dtype,
    stem: str = "model",
    prefix: str = "",
) -> None:
    """Writes `<stem>.safetensors`, or an index of many, tensor by tensor: one tensor at a time is on the host, never the model.

    Every process takes part in the gathering, the first one writes.
    """
    files: list[list[tuple[str, list[int], Callable[[], np.ndarray]]]] = [[]]
    size = total = 0
    for name, shape, value in _hf_tensors(params, dtype):
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if files[-1] and size + nbytes > MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append((prefix + name, shape, value))
        size, total = size + nbytes, total + nbytes
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        n = len(files)
        names = [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        weight_map = {
            tensor: name
            for name, file in zip(names, files, strict=True)
            for tensor, _, _ in file
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if jax.process_index() == 0:
            (out / f"{stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )
    for name, file in zip(names, files, strict=True):
        _write_file(out / name, file, dtype)


def _write_file(
    path: pathlib.Path,
    tensors: list[tuple[str, list[int], Callable[[], np.ndarray]]],
    dtype: jnp.dtype,
) -> None:
    """One safetensors file. The library's own writer wants all tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, _ in tensors:
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[dtype.name],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    is_writer = jax.process_index() == 0
    with path.open("wb") if is_writer else contextlib.nullcontext() as file:
        if is_writer:
            file.write(len(text).to_bytes(8, "little") + text)
        for _, _, value in tensors:
            array = value()
            if is_writer:
                file.write(np.ascontiguousarray(array).tobytes())


def _hf_tensors(
    params: model.Params, dtype: jnp.dtype
) -> Iterator[tuple[str, list[int], Callable[[], np.ndarray]]]:
    """(HF name, shape, a function that fetches the values) of each tensor."""

    def fetch(leaf: jax.Array, layer: int | None, dims: tuple[tuple[int, ...], ...]):
        value = leaf if layer is None else leaf[layer]
        value = value.transpose([d for group in dims for d in group]).astype(dtype)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        return np.asarray(value)

    for path, name, dims, leaf in _leaves(params):
        is_layer = path[0] == "blocks"
        full = leaf.shape[1:] if is_layer else leaf.shape
        shape = [int(np.prod([full[d] for d in group])) for group in dims]
        for i in range(leaf.shape[0]) if is_layer else (None,):
            value = functools.partial(fetch, leaf, i, dims)
            yield name if i is None else name.format(i), shape, value
