"""What the caches of layers with sliding windows keep, and which of it a token sees.

A token at position p attends to those at positions > p - W. Keys are rotated before they are
kept, so that where in a cache they lie says nothing.

Of a response the last W tokens are kept, in a ring: token t at index t mod W. Of a prompt the
last tokens that fit, in order: the more a sample has drawn, the fewer of them it sees.
"""

import math

import jax.numpy as jnp
from jaxtyping import Int

from pfjax.targets import Array


def cache_widths(
    windows: tuple[int | None, ...], width: int, multiple: int
) -> tuple[int, ...]:
    """Tokens that each layer's cache has room for, where sequences have `width` at most.

    Args:
      windows: of the layers; 0 for none, None for layers that keep no tokens.
      multiple: which all widths are multiples of.
    """
    kept = lambda window: math.ceil(window / multiple) * multiple
    return tuple(
        0 if w is None else min(width, kept(w)) if w else width for w in windows
    )


def response_index(
    window: int, drawn: Int[Array, "s"], keeps_all: bool
) -> Int[Array, "s"]:
    """At which index a layer keeps the token after `drawn` others.

    Args:
      keeps_all: whether the cache is as wide as the response, and no ring.
    """
    return drawn if keeps_all or not window else drawn % window


def of_response(
    window: int, drawn: Int[Array, "s"], keeps_all: bool
) -> tuple[Int[Array, "s"], Int[Array, "s"] | None]:
    """How much of a layer's cache is filled once the token after `drawn` others is stored,
    and from which index on that token sees it (None for all)."""
    if not window:
        return drawn + 1, None
    if keeps_all:
        return drawn + 1, jnp.maximum(drawn + 1 - window, 0)
    return jnp.minimum(drawn + 1, window), None


def of_prompt(
    window: int,
    width: int,
    length: Int[Array, "prefix_slots"],
    prefix_slot: Int[Array, "s"],
    drawn: Int[Array, "s"],
) -> tuple[Int[Array, "prefix_slots"], Int[Array, "s"] | None]:
    """How much of a layer's caches of prompts is filled, and from which index on each sample
    sees its prompt's (None for all).

    Args:
      width: of the caches.
      length: of the prompts.
    """
    if not window:
        return length, None
    position = length[prefix_slot] + drawn
    start = position + 1 - window - _first_kept(length, width)[prefix_slot]
    return jnp.minimum(length, width), jnp.maximum(start, 0)


def prompt_index(
    window: int,
    width: int,
    length: Int[Array, "prefix_slots"],
    prefix_slot: Int[Array, "b t"],
    positions: Int[Array, "b t"],
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """In which prefix slot, and at which index, a layer keeps the tokens of packed prompts;
    a prefix slot of -1 drops them."""
    if not window:
        return prefix_slot, positions
    at = positions - _first_kept(length, width)[prefix_slot]
    return jnp.where(at < 0, -1, prefix_slot), at


def _first_kept(
    length: Int[Array, "prefix_slots"], width: int
) -> Int[Array, "prefix_slots"]:
    """Position of the first token of each prompt that a cache has room for."""
    return jnp.maximum(length - width, 0)
