r"""Qwen3.5 2B."""

import ml_collections

import pfjax


def get_config() -> ml_collections.ConfigDict:
    c = pfjax.recipe("qwen3_5_0_8b")
    c.model = "Qwen/Qwen3.5-2B"
    return c
