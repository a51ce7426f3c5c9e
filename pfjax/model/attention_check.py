"""A comparison, before training, of this machine's attention with the plain form."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pfjax.infra import sharding
from pfjax.model import attention
from pfjax.model.config import ModelConfig

# Tokens per row: three of the smallest blocks of the kernels.
_LENGTH = 384
# Sliding windows are cut to so many tokens: such a one ends inside all longer segments, a
# block of keys before it can be skipped, and one token more or less is seen.
_WINDOW = 20
_TOLERANCE = 0.05  # of the largest number: bfloat16 stays below 0.02


def check(
    config: ModelConfig,
    mesh: Mesh,
    max_segments: int,
    windows: tuple[int, ...] = (0,),
) -> None:
    """Raises RuntimeError if a kernel of these devices does not compute attention.

    A wrong one would train on without a word. It runs as an update and as a prefill will,
    each with the devices grouped as they are then, and with it the back end: two rows per
    device of unequal segments, since some faults begin in the second row.

    Args:
      config, mesh: of the run.
      max_segments: of a row of an update, padding included.
      windows: of the layers, see `attention.packed_attention`.
    """
    most = max_segments - 1
    many = ((1, 2, 3) * (_LENGTH // 6))[:most]
    update, prefill = [(150, 1, 90)[:most], many], [(_LENGTH,), (3,) * (_LENGTH // 3)]
    runs = ((mesh, update, max_segments), (sharding.regrouped(mesh, 0), prefill, None))
    for window in sorted({min(size, _WINDOW) for size in windows}):
        for of, rows, num_segments in runs:
            with jax.set_mesh(of):
                _compare(config, of, rows, num_segments, window)


def _compare(
    config: ModelConfig,
    mesh: Mesh,
    rows: Sequence[Sequence[int]],
    max_segments: int | None,
    window: int,
) -> None:
    """Compares the back end of a mesh with the plain form on rows of these lengths;
    forward only, as a prefill runs, without `max_segments`."""
    how = (config.attention, config.head_dim, config.dtype, window)
    backend = attention.chosen(*how)
    if backend in ("plain", "chunked"):
        return
    ids = np.zeros((len(rows), attention.shared_length(_LENGTH)), np.int32)
    for row, lengths in zip(ids, rows, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    ids = np.tile(ids, (sharding.batch_ways(mesh), 1))
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (
        jax.random.normal(key, (*ids.shape, n, config.head_dim)).astype(config.dtype)
        for key, n in zip(keys, heads, strict=False)
    )
    weight = jax.random.normal(keys[3], q.shape) * (ids > 0)[..., None, None]

    def run(name):
        def loss(q, k, v):
            args = (q, k, v, ids, name, max_segments, window)
            out = attention.packed_attention(*args)
            return jnp.sum(weight * out), out * (weight != 0)

        if max_segments is None:
            return sharding.fetch((jax.jit(loss)(q, k, v)[1],))
        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, out), gradients = jax.jit(gradient)(q, k, v)
        return sharding.fetch((out, *gradients))

    tested = f"{backend} attention"
    if window:
        tested += f" with a window of {window} tokens"
    where = f"on {jax.devices()[0].device_kind} with jax {jax.__version__}"
    instead = "choose --config.attention=chunked"
    try:
        found = run(backend)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as e:
        # Of these, Pallas has one for a platform that it does not compile for.
        if isinstance(e, ValueError) and "interpret mode" not in str(e):
            raise
        said = f"{tested} does not run {where}; {instead}"
        raise RuntimeError(said) from e
    names = ("output", "d/dq", "d/dk", "d/dv")
    for name, got, want in zip(names, found, run("plain"), strict=False):
        got, want = got.astype(np.float32), want.astype(np.float32)
        error = np.abs(got - want).max() / np.abs(want).max()
        if not error < _TOLERANCE:
            raise RuntimeError(
                f"{tested} is wrong {where}: its {name} is off by "
                f"{error:.1%}; {instead}"
            )
