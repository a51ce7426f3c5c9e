"""Compiled programs: kept for the next start, and counted."""

import os
from typing import Any

import jax

from pfjax.infra import storage

_IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def order_collectives() -> None:
    """Has XLA schedule a CPU program one operation after the other, on JAX before 0.12.

    Its other schedule lets independent collectives run at once. A program read from the
    cache seems to have lost their order then: fake devices wait for each other in different
    collectives, and the process hangs, within five updates on a 4 x 2 mesh. No values
    change. What XLA_FLAGS says itself stands. To be called before the back end starts.
    """
    if jax.__version_info__ < (0, 12):
        said = os.environ.get("XLA_FLAGS", "")
        if _IN_ORDER not in said:
            os.environ["XLA_FLAGS"] = f"{_IN_ORDER} {said}".strip()


def use_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, or ~/.cache/pfjax/compiled if that
    can be written."""
    order_collectives()
    if not jax.config.jax_compilation_cache_dir:
        try:
            folder = storage.user_cache("compiled")
        except ValueError:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a run has many.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Compilations:
    """Seconds and number of compilations since it was asked last."""

    _seconds, _made, _found = 0.0, 0, 0

    def __init__(self):
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._seconds += seconds
            self._made += 1

    def _on_event(self, event: str, **_: Any) -> None:
        self._found += event == "/jax/compilation_cache/cache_hits"

    def take(self) -> tuple[float, int, int]:
        """Seconds; programs, those found in the cache included; and those found."""
        out = self._seconds, self._made, self._found
        self._seconds, self._made, self._found = 0.0, 0, 0
        return out

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)
