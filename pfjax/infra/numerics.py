"""What values JAX computes with, whatever the process that pfjax is called in has set."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def as_promised() -> Iterator[None]:
    """In this thread numbers have 32 bits and types that mix, and random ones are threefry's.

    Loops on devices carry 32 bits. Of threefry alone a number follows from its key: of the
    generators of XLA (`rbg`, which others set for TPUs) one that is drawn under `vmap`, or on
    several devices, depends on which are drawn beside it.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
    ):
        yield
