"""What values JAX computes with, whatever the process that pfjax is called in has set."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def as_promised() -> Iterator[None]:
    """In this thread numbers have 32 bits, types are promoted as usual, and random numbers
    come from threefry.

    Loops on devices carry 32 bits. With threefry a number depends on its key alone; with the
    generators of XLA (`rbg`, which others set for TPUs) one drawn under `vmap`, or on several
    devices, also depends on those drawn beside it.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
    ):
        yield
