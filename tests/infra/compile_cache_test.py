"""What is asked of XLA before it starts."""

import os

import jax
import pytest

from pfjax.infra import compile_cache

FLAG = "xla_cpu_enable_concurrency_optimized_scheduler"


@pytest.mark.parametrize("said", [None, "--xla_dump_to=x", f"--{FLAG}=true"])
def test_collectives_are_ordered_unless_the_user_says_otherwise(monkeypatch, said):
    monkeypatch.setenv("XLA_FLAGS", "")  # for it to be taken back
    if said is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = said
    for _ in range(2):
        compile_cache.order_collectives()
    flags = os.environ.get("XLA_FLAGS", "").split()
    # XLA takes the last of two.
    ours = [f"--{FLAG}=false"] if jax.__version_info__ < (0, 12) else []
    assert flags == ours + (said.split() if said else [])
