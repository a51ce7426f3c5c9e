"""Tensors in safetensors files <-> parameters, and the one table of their names.

Reading touches only the bytes that a device's shard needs; writing holds one tensor at
a time on the host.
"""

import contextlib
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.experimental import multihost_utils

from pfjax.model import transformer

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


def leaves(
    params: transformer.Params,
) -> Iterator[tuple[tuple[str, ...], str, tuple[tuple[int, ...], ...], Any]]:
    """(path, HF name with `{}` for the layer, dimensions, leaf) of each parameter."""
    for name, value in params.items():
        if name == "blocks":
            for key, leaf in value.items():
                hf_name, dims = LAYER[key]
                yield ("blocks", key), "model.layers.{}." + hf_name, dims, leaf
        else:
            yield (name,), *_TOP[name], value


class _Tensor(NamedTuple):
    """A tensor in a file. Opened anew for each read: pages of a mapping that stays
    open would count as this process's memory until the whole model is read."""

    file: pathlib.Path
    name: str
    shape: list[int]

    def read(self, cut: tuple[slice, ...]) -> np.ndarray:
        with safetensors.safe_open(self.file, framework="numpy") as handle:
            return handle.get_slice(self.name)[cut]


def open_folder(folder: pathlib.Path) -> dict[str, _Tensor]:
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


def check_tensors(
    folder: pathlib.Path, tensors: dict[str, _Tensor], abstract: transformer.Params
) -> None:
    wanted = {}
    for path, name, dims, leaf in leaves(abstract):
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


def reader(
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


def write_tensors(
    params: transformer.Params,
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
    params: transformer.Params, dtype: jnp.dtype
) -> Iterator[tuple[str, list[int], Callable[[], np.ndarray]]]:
    """(HF name, shape, a function that fetches the values) of each tensor."""

    def fetch(leaf: jax.Array, layer: int | None, dims: tuple[tuple[int, ...], ...]):
        value = leaf if layer is None else leaf[layer]
        value = value.transpose([d for group in dims for d in group]).astype(dtype)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            value = multihost_utils.process_allgather(value, tiled=True)
        return np.asarray(value)

    for path, name, dims, leaf in leaves(params):
        is_layer = path[0] == "blocks"
        full = leaf.shape[1:] if is_layer else leaf.shape
        shape = [int(np.prod([full[d] for d in group])) for group in dims]
        for i in range(leaf.shape[0]) if is_layer else (None,):
            value = functools.partial(fetch, leaf, i, dims)
            yield name if i is None else name.format(i), shape, value
