"""Tensors in safetensors files <-> parameters."""

import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from pfjax.infra import sharding
from pfjax.model import transformer
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import EMBED_TENSOR, HEAD_TENSOR

MAX_FILE_BYTES = 5 * 10**9
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_READ = ("F64", *_DTYPES.values())  # as safetensors names types
# Numbers that are looked at together: few enough to stay in a processor's cache.
_CHECKED = 2**16

# Rows of two matrices that are compared at once.
_COMPARED_ROWS = 8192
# Where the language model lies in checkpoints that read images too -> its place by itself.
_LANGUAGE_PART = {"language_model.": "", "model.language_model.": "model."}
# Buffers that some checkpoints carry and nothing reads, and the layers with which Qwen3.5
# drafts several tokens at once.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^mtp\.")


class _Layout(NamedTuple):
    """How the files hold a parameter: one tensor, one per layer, or one per layer and
    expert."""

    names: (
        np.ndarray
    )  # as many dimensions as our first ones that they are stacked along
    shape: list[int]  # of each tensor
    dims: list[tuple[int, ...]]  # of ours in each of its dimensions, without those


def _layouts(
    config: ModelConfig, params: transformer.Params
) -> list[tuple[_Layout, Any]]:
    """Of some of the parameters, or of their shapes, with each its leaf."""
    known = transformer.tensors(config)

    def layout(path, leaf):
        (name, num_read, numbers), is_layer = known[path[-1].key], len(path) > 1
        names = np.array(name)
        if is_layer:
            names = np.array([f"model.layers.{i}.{name}" for i in numbers])
        if "*" in name:
            of_expert = lambda x: [x.replace("*", str(e)) for e in range(leaf.shape[1])]
            names = np.array([of_expert(x) for x in names])
        shape = leaf.shape[names.ndim :]
        order = tuple(range(len(shape)))
        dims = [(d,) for d in order]
        if is_layer and num_read is not None:
            dims = [order[num_read:], order[:num_read]] if num_read else [order]
        sizes = [math.prod(shape[d] for d in group) for group in dims]
        return _Layout(names, sizes, dims)

    return [(layout(*x), x[1]) for x in jax.tree.leaves_with_path(params)]


class _Stored(NamedTuple):
    """A tensor in a file."""

    file: pathlib.Path
    name: str
    shape: list[int]
    kind: str  # its type, as safetensors names it

    def read(self, index: Any = ..., opened: Any = None) -> np.ndarray:
        handle = (opened or _open)(self.file)
        return handle.get_slice(self.name)[index]


def _open(file: pathlib.Path) -> Any:
    """What reads a file, which is closed once nothing refers to it.

    Pages of a mapping that stays open count as this process's memory: it must not be kept
    until the whole model is read.
    """
    return safetensors.safe_open(file, "numpy")


def _open_folder(
    folder: pathlib.Path, stem: str = "model", prefix: str = ""
) -> dict[str, _Stored]:
    """Tensors by their HF names, without a prefix, of one file or of an index of many: as
    transformers, of one file if both are there. Of a checkpoint that reads images too, those
    of its language model, by the names they have alone."""
    names = [f"{stem}.safetensors"]
    index = folder / f"{names[0]}.index.json"
    if (folder / names[0]).is_file():
        pass
    elif index.is_file():
        try:
            files = json.loads(index.read_text("utf-8"))["weight_map"].values()
            names = sorted({str(pathlib.PurePath(file)) for file in files})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index} is not an index of safetensors files: {error!r}"
            ) from error
    else:
        raise ValueError(
            f"{folder} holds neither {names[0]} nor {index.name}, which names the files of a "
            "model in several; weights in other formats (.bin) are not loaded: convert them "
            "with transformers or peft"
        )
    tensors = {}
    for file in (folder / name for name in names):
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118
                    stored = handle.get_slice(name)
                    if (kind := stored.get_dtype()).startswith("F8"):
                        raise ValueError(
                            f"{file} holds {name} in {kind}: quantized models are not read"
                        )
                    found = _Stored(file, name, list(stored.get_shape()), kind)
                    tensors[name.removeprefix(prefix)] = found
        except (OSError, safetensors.SafetensorError) as e:
            raise ValueError(f"{file} cannot be read as safetensors: {e}") from e
    return _language_part(tensors)


def _language_part(tensors: dict[str, _Stored]) -> dict[str, _Stored]:
    for place, alone in _LANGUAGE_PART.items():
        if any(name.startswith(place) for name in tensors):
            part = {
                alone + name.removeprefix(place): x
                for name, x in tensors.items()
                if name.startswith(place)
            }
            head = {HEAD_TENSOR: tensors[HEAD_TENSOR]} if HEAD_TENSOR in tensors else {}
            return part | head
    return tensors


def _check(folder: pathlib.Path, tensors: dict, layouts: list[_Layout]) -> None:
    wanted = {name: x.shape for x in layouts for name in x.names.flat}
    present = {name for name in tensors if not _IGNORED.search(name)}
    if HEAD_TENSOR not in wanted:
        present.discard(HEAD_TENSOR)  # a copy of the embedding, see `has_own_head`
    problems = [f"missing {n} {wanted[n]}" for n in wanted if n not in present]
    problems += [f"unexpected {n}" for n in sorted(present - set(wanted))]
    problems += [
        f"{n} has shape {tensors[n].shape}, expected {shape}"
        for n, shape in wanted.items()
        if n in present and tensors[n].shape != shape
    ]
    problems += [
        f"{n} is of type {tensors[n].kind}, no weights"
        for n in wanted
        if n in present and tensors[n].kind not in _READ
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(f"{folder} does not match its config:\n  {shown}{more}")


def _is_finite(x: np.ndarray) -> bool:
    """Whether there is neither NaN nor infinity, at the speed at which memory is read."""
    if not np.issubdtype(x.dtype, np.floating) and x.dtype.kind != "V":
        return True
    # Of which the exponent's bits are all ones; NumPy itself has no fast test in 16 bits.
    ones = np.array(np.inf, x.dtype).view(f"u{x.itemsize}")
    bits = np.ascontiguousarray(x).reshape(-1).view(ones.dtype)
    parts = (bits[i : i + _CHECKED] for i in range(0, bits.size, _CHECKED))
    return not any(((part & ones) == ones).any() for part in parts)


def names(folder: pathlib.Path, stem: str, prefix: str) -> list[str]:
    """Names of the tensors in `<stem>.safetensors`, without their prefix."""
    return sorted(_open_folder(folder, stem, prefix))


def has_own_head(folder: pathlib.Path) -> bool:
    """Whether the files hold a head other than the embedding. Then transformers uses it,
    even if `config.json` ties the two."""
    names = [EMBED_TENSOR, HEAD_TENSOR]
    tensors = _open_folder(folder)
    if not set(names) <= tensors.keys():
        return False
    embed, head = (tensors[name] for name in names)
    if embed.shape != head.shape:
        return True
    num, n = embed.shape[0], _COMPARED_ROWS
    rows = [slice(first, min(first + n, num)) for first in range(0, num, n)]
    return not all(np.array_equal(embed.read(x), head.read(x)) for x in rows)


def stored_dtype(folder: pathlib.Path) -> str:
    """Type of the weights in the files; float32 for one that is not written here."""
    tensors = _open_folder(folder)
    kind = tensors.get(EMBED_TENSOR, tensors.get(HEAD_TENSOR)).kind
    return next((name for name, x in _DTYPES.items() if x == kind), "float32")


def load(
    folder: pathlib.Path,
    config: ModelConfig,
    abstract: transformer.Params,
    where: Any,
    dtype: jnp.dtype,
    stem: str = "model",
    prefix: str = "",
) -> transformer.Params:
    """Reads the parameters onto the shardings `where`, each device's bytes only; from
    files as `write_tensors` names them.

    Raises:
      ValueError: if the tensors are not exactly those of the `abstract` parameters, or one
        holds NaN, infinity, or what `dtype` cannot hold.
    """
    tensors = _open_folder(folder, stem, prefix)
    layouts = _layouts(config, abstract)
    there = tensors.keys() & {EMBED_TENSOR, HEAD_TENSOR}
    if config.tied_embeddings and there == {HEAD_TENSOR}:
        tensors[EMBED_TENSOR] = tensors.pop(HEAD_TENSOR)
    _check(folder, tensors, [layout for layout, _ in layouts])

    def place(layout, leaf, at):
        names, _, dims = layout
        order = [d for group in dims for d in group]

        def read(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.asarray(names[index[: names.ndim]])
            within = index[names.ndim :]
            full = leaf.shape[names.ndim :]
            spans = [s.indices(n)[:2] for s, n in zip(within, full, strict=True)]
            sizes = [end - begin for begin, end in spans]
            cut = []
            for first, *others in dims:
                # Of several dimensions in one, only the first may be split.
                inner = math.prod(full[d] for d in others)
                cut.append(slice(*(inner * x for x in spans[first])))
            out = np.empty((*wanted.shape, *sizes), dtype)
            for layer in np.ndindex(wanted.shape[:1]):
                # Once for all experts of a layer: to open a file costs milliseconds.
                opened = functools.lru_cache(maxsize=2)(_open)
                for i, name in np.ndenumerate(wanted[layer]):
                    part = tensors[name].read(tuple(cut), opened)
                    if not _is_finite(part):
                        raise ValueError(
                            f"{tensors[name].file} holds NaN or infinity in {name}: it is "
                            "damaged, or of a run that diverged; take another checkpoint"
                        )
                    part = part.reshape([sizes[d] for d in order])
                    out[layer + i] = part.transpose(np.argsort(order))
                    _refuse_overflow(name, out[layer + i], part.dtype)
            return out

        return jax.make_array_from_callback(leaf.shape, at, read)

    tree = jax.tree.structure(abstract)
    layouts = jax.tree.unflatten(tree, [layout for layout, _ in layouts])
    is_layout = lambda x: isinstance(x, _Layout)
    return jax.tree.map(place, layouts, abstract, where, is_leaf=is_layout)


def write_tensors(
    config: ModelConfig,
    params: transformer.Params,
    out: pathlib.Path,
    dtype: jnp.dtype,
    stem: str = "model",
    prefix: str = "",
) -> None:
    """Writes `<stem>.safetensors`, or many and an index; one tensor, or those of the experts
    of one layer, are on the host at once.

    Every process takes part in the gathering, the first one writes.
    """
    tensors = _hf_tensors(config, params, dtype, prefix)
    write_lazy(tensors, out, dtype, stem, is_writer=jax.process_index() == 0)


# Shape, and a function that fetches the values.
Lazy = tuple[list[int], Callable[[], np.ndarray]]


def write_lazy(
    tensors: dict[str, Lazy],
    out: pathlib.Path,
    dtype: np.dtype,
    stem: str = "model",
    is_writer: bool = True,
) -> None:
    """As `write_tensors`, of tensors by their names; only `is_writer` leaves files."""
    import huggingface_hub

    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda x: math.prod(x[0]) * dtype.itemsize,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=MAX_FILE_BYTES,
    )
    if split.is_sharded and is_writer:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (out / f"{stem}.safetensors.index.json").write_text(text, "utf-8")
    for file, names in split.filename_to_tensors.items():
        path = out / file if is_writer else pathlib.Path(os.devnull)
        _write_file(path, {name: tensors[name] for name in names}, dtype)


def _write_file(path: os.PathLike, tensors: dict[str, Lazy], dtype: np.dtype) -> None:
    """One safetensors file. The library's own writer wants all tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, _) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        offsets = {"shape": shape, "data_offsets": [begin, end]}
        header[name] = {"dtype": _DTYPES[dtype.name], **offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, values) in tensors.items():
            x = values()
            _refuse_overflow(name, x, np.dtype("float32"))
            file.write(x.tobytes())


def _refuse_overflow(name: str, x: np.ndarray, of: np.dtype) -> None:
    """Raises ValueError if values of another type did not fit the one they were given."""
    # bfloat16 reaches as far as float32.
    is_narrower = x.dtype == np.float16 or of == np.float64
    if is_narrower and not _is_finite(x):
        way = (
            "give the dtype bfloat16 or float32" if x.dtype == np.float16 else "mend it"
        )
        largest = float(jnp.finfo(x.dtype).max)
        raise ValueError(
            f"{name} holds values that {x.dtype} cannot (above {largest:.3g}): {way}"
        )


def _hf_tensors(
    config: ModelConfig, params: transformer.Params, dtype: jnp.dtype, prefix: str = ""
) -> dict[str, Lazy]:
    layouts = _layouts(config, params)

    # Those of one layer's experts, which may be on many devices, are fetched together.
    @functools.lru_cache(maxsize=1)
    def fetch(number, layer):
        layout, leaf = layouts[number]
        value = leaf[layer] if layer else leaf
        first = layout.names.ndim - len(layer)
        order = [first + d for dims in layout.dims for d in dims]
        value = value.transpose([*range(first), *order]).astype(dtype)
        if not getattr(value, "is_fully_addressable", True):
            value = sharding.fetch(value)
        return np.asarray(value)

    values = lambda number, at: fetch(number, at[:1])[at[1:]]
    return {
        prefix + str(name): (layout.shape, functools.partial(values, number, at))
        for number, (layout, _) in enumerate(layouts)
        for at, name in np.ndenumerate(layout.names)
    }
