"""Seconds of the phases of a step, and traces of some steps."""

import contextlib
import time
from collections.abc import Iterator

import jax
from etils import epath

from pfjax.infra import storage


class Clock:
    """Seconds of the parts of a step, which bear the same names in a profiler's trace."""

    def __init__(self):
        self._begin = time.perf_counter()
        self._times: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        with jax.profiler.TraceAnnotation(name):
            yield
        self._times[f"time/{name}"] = time.perf_counter() - begin

    def done(self) -> dict[str, float]:
        return self._times | {"time/step": time.perf_counter() - self._begin}


class Profiler:
    """Traces steps from `first` up to but not including `end` (TensorBoard, Perfetto)."""

    def __init__(self, folder: epath.Path, first: int, end: int):
        self._folder, self._steps, self._is_on = folder, range(first, end), False
        self._stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        if number in self._steps and not self._is_on:
            local = self._stack.enter_context(storage.local_folder(self._folder))
            self._stack.enter_context(jax.profiler.trace(local))
            self._is_on = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if number + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        self._stack.close()
        self._is_on = False
