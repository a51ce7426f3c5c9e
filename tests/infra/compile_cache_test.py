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


@pytest.fixture
def settings_of_jax():
    """Are what they were when a test has ended."""
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_where_that_can_be_written(
    settings_of_jax, tmp_path, monkeypatch
):
    for root, want in ((os.devnull, None), (tmp_path, f"{tmp_path}/pfjax/compiled")):
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
        compile_cache.use_cache()
        assert jax.config.jax_compilation_cache_dir == want
