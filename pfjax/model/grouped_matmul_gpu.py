"""Products of groups of rows, each with a matrix of its own: GPU kernels.

In Pallas for Triton. For GPUs XLA has no such product: it multiplies the rows of all groups
with every matrix. Rows come group by group; groups may be empty, and what lies behind the
last one is left out.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from pfjax.targets import Array

# Triton multiplies matrices of at least 16 rows and columns.
LEAST = 16
# A program's part of a product, and how much of the sum it loads at once.
_ROWS, _COLUMNS, _DEPTH = 64, 128, 64
_DOT = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
_PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=2)


def fits(*sizes: int) -> bool:
    """Whether the kernels take matrices of these sizes."""
    return all(size % LEAST == 0 for size in sizes)


def product(
    rows: Float[Array, "m i"],
    matrices: Float[Array, "e i o"],
    sizes: Int[Array, "e"],
    interpret: bool = False,
) -> Float[Array, "m o"]:
    """Each group of rows times its matrix; undefined behind the last group.

    A program has a tile of rows of one group: groups end within tiles, whose rest is idle.
    """
    (m, depth), (num, _, width) = rows.shape, matrices.shape
    height = min(max(pl.next_power_of_2(pl.cdiv(m, num)), LEAST), _ROWS)
    columns, step = _block(width, _COLUMNS), _block(depth, _DEPTH)
    ends, tiles = jnp.cumsum(sizes), pl.cdiv(sizes, height)
    tile = jnp.arange(pl.cdiv(m, height) + num, dtype=jnp.int32)
    group = jnp.searchsorted(
        jnp.cumsum(tiles), tile, side="right", method="compare_all"
    )
    is_real, group = group < num, jnp.minimum(group, num - 1).astype(jnp.int32)
    first = (ends - sizes)[group] + height * (tile - (jnp.cumsum(tiles) - tiles)[group])
    end = jnp.where(is_real, ends[group], 0)

    def kernel(group_ref, first_ref, end_ref, rows_ref, matrices_ref, out_ref):
        group, first, end = (
            x[pl.program_id(1)] for x in (group_ref, first_ref, end_ref)
        )
        here = pl.ds(pl.program_id(0) * columns, columns)

        @pl.when(first < end)
        def _():
            is_row = (first + jnp.arange(height) < end)[:, None]
            of_tile = pl.ds(first, height)

            def add(j, total):
                part = pl.ds(j * step, step)
                x = plgpu.load(rows_ref.at[of_tile, part], mask=is_row, other=0)
                matrix = plgpu.load(matrices_ref.at[group, part, here])
                return total + _DOT(x, matrix, (((1,), (0,)), ((), ())))

            zeros = jnp.zeros((height, columns), jnp.float32)
            total = lax.fori_loop(0, depth // step, add, zeros)
            total = total.astype(out_ref.dtype)
            plgpu.store(out_ref.at[of_tile, here], total, mask=is_row)

    out = pl.pallas_call(
        kernel,
        grid=(width // columns, len(tile)),
        out_shape=jax.ShapeDtypeStruct((m + height, width), rows.dtype),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="grouped_product",
    )(
        group,
        first.astype(jnp.int32),
        end.astype(jnp.int32),
        _padded(rows, height),
        matrices,
    )
    return out[:m]


def gradient(
    rows: Float[Array, "m i"],
    g: Float[Array, "m o"],
    sizes: Int[Array, "e"],
    interpret: bool = False,
) -> Float[Array, "e i o"]:
    """The product of each group of rows and its gradients; 0 of an empty group."""
    height, width = rows.shape[1], g.shape[1]
    lines, columns = _block(height, _ROWS), _block(width, _COLUMNS)
    step = min(max(pl.next_power_of_2(pl.cdiv(len(rows), len(sizes))), LEAST), _DEPTH)
    ends = jnp.cumsum(sizes).astype(jnp.int32)

    def kernel(start_ref, end_ref, rows_ref, g_ref, out_ref):
        start, end = (x[pl.program_id(2)] for x in (start_ref, end_ref))
        line = pl.ds(pl.program_id(1) * lines, lines)
        here = pl.ds(pl.program_id(0) * columns, columns)

        def add(j, total):
            first = start + j * step
            is_row = (first + jnp.arange(step) < end)[:, None]
            part = pl.ds(first, step)
            x = plgpu.load(rows_ref.at[part, line], mask=is_row, other=0)
            y = plgpu.load(g_ref.at[part, here], mask=is_row, other=0)
            return total + _DOT(x, y, (((0,), (0,)), ((), ())))

        zeros = jnp.zeros((lines, columns), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(end - start, step), add, zeros)
        total = total.astype(out_ref.dtype)
        plgpu.store(out_ref.at[pl.program_id(2), line, here], total)

    padded = (_padded(rows, step), _padded(g, step))
    return pl.pallas_call(
        kernel,
        grid=(width // columns, height // lines, len(sizes)),
        out_shape=jax.ShapeDtypeStruct((len(sizes), height, width), g.dtype),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="grouped_gradient",
    )(ends - sizes, ends, *padded)


def _block(size: int, most: int) -> int:
    """The largest power of two, `most` at most, that divides a size."""
    return min(size & -size, most)


def _padded(x: Array, more: int) -> Array:
    """With rows that the last tile may reach into."""
    return jnp.pad(x, ((0, more), (0, 0)))
