"""Rewards by functions of a person's own, each in processes that can be killed.

A function is called as those of TRL are, `fn(prompts, completions, completion_ids,
**columns)`, with a list per argument and the samples of one prompt at a time, and returns a
number for each. What hangs or dies costs the responses that make it hang or die their
reward, and is counted; a function that raises for every response, or returns what is no
reward, ends the run with one line.
"""

import concurrent.futures
import contextlib
import json
import math
import re
import select
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pfjax.infra import storage
from pfjax.tasks import processes, reward_worker

_WORKER = "pfjax.tasks.reward_worker"
_PROGRAM, LOCAL = "pipe:", "python:"
# Of those that come with pfjax, those that take an argument: "regex:PATTERN".
READY = ("regex", "reward_model")
_START_SECONDS = 300.0  # to import what a function needs
# What is between double quotes separates nothing.
_TERM = re.compile(r'(?:"[^"]*"|[^,"])+')
_WEIGHTED = re.compile(r'([^":*]*)\*(.*)', re.DOTALL)


class Failed(Exception):
    """A function gave no values: it raised, or its process died or was killed."""


class Term(NamedTuple):
    """A part of a reward: a function or a name, and what it is multiplied by."""

    name: str
    weight: float = 1.0

    @property
    def is_function(self) -> bool:
        return ":" in self.name


def parse(text: str) -> list[Term]:
    """The terms of "accuracy, 0.5 * my_rewards.py:brief".

    Commas and stars between double quotes are part of a name.

    Raises:
      ValueError: if a weight is no finite number, or a quote is not closed.

    >>> parse("accuracy, 0.5 * my_rewards.py:brief")
    [Term(name='accuracy', weight=1.0), Term(name='my_rewards.py:brief', weight=0.5)]
    >>> parse('2 * regex:"a*, b"')
    [Term(name='regex:"a*, b"', weight=2.0)]
    """
    if text.count('"') % 2:
        raise ValueError(f"--config.reward={text}: a double quote is not closed")
    out = []
    for part in filter(None, map(str.strip, _TERM.findall(text))):
        weighted = _WEIGHTED.fullmatch(part)
        weight, name = weighted.groups() if weighted else (1.0, part)
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"--config.reward={text}: {weight.strip()!r} is no weight")
        out.append(Term(name.strip(), value))
    return out


def argument(spec: str) -> tuple[str, str]:
    """The kind of "regex:PATTERN" or 'regex:"PATTERN"', and its argument."""
    kind, _, rest = spec.partition(":")
    is_quoted = len(rest) > 1 and rest[0] == rest[-1] == '"'
    return kind, rest[1:-1] if is_quoted else rest


def source(spec: str) -> str:
    """What a function is in, or what describes it: the part before its name in
    "FILE.py:NAME", the argument of one that comes with pfjax."""
    kind, given = argument(spec)
    return given if kind in (*READY, "judge") else spec.rpartition(":")[0]


def _command(spec: str) -> list[str]:
    """What runs a function in a process of its own."""
    if spec.startswith(_PROGRAM):
        return shlex.split(spec.removeprefix(_PROGRAM))
    kind, given = argument(spec)
    ready = [f"pfjax.tasks.ready_rewards:{kind}", given]
    if storage.is_remote(where := source(spec)) and kind not in READY:
        spec = f"{storage.local_copy(where)}:{spec.rpartition(':')[2]}"
    return processes.command(_WORKER, *(ready if kind in READY else [spec]))


def plain(value: Any) -> Any:
    """For JSON: a list of an array, else the text of what a column may hold."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


class Worker:
    """A process that calls one function."""

    def __init__(self, spec: str):
        self._spec = spec
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process unless it runs; raises ValueError if it cannot."""
        if self._process is not None:
            return
        try:
            self._process = processes.start(_command(self._spec))
        except OSError as error:
            raise ValueError(f"--config.reward={self._spec}: {error}") from error
        if self._spec.startswith(_PROGRAM):  # which only answers what it is asked
            return
        found = self._read(_START_SECONDS)
        if found is None or "error" in found:
            self.stop()
            reason = found["error"] if found else "its process ended, see above"
            raise ValueError(f"--config.reward={self._spec}: {reason}")

    def call(self, given: dict[str, Any], seconds: float) -> list[float | None]:
        """The function's values, None where it does not apply.

        Raises:
          Failed: after so many seconds of wall time, or if the function raised.
          ValueError: if it returned what is no reward.
        """
        found = self._ask(given, seconds)
        if found is None and self.stop() == processes.TOLD_TO_END:
            found = self._ask(given, seconds)
        if found is None:
            self.stop()
            raise Failed(f"ended or took more than {seconds:g} s")
        if "error" in found:
            raise Failed(found["error"])
        if "invalid" in found:
            raise ValueError(f"--config.reward={self._spec} {found['invalid']}")
        return found["values"]

    def _ask(self, given: dict[str, Any], seconds: float) -> Any:
        """What the process answers, None if it ended or there is none in time."""
        self.start()
        try:
            line = json.dumps(given, default=plain) + "\n"
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
            found = self._read(seconds)
            if self._spec.startswith(_PROGRAM) and found is not None:
                found = {"values": reward_worker.numbers(found, len(given["prompts"]))}
        except BrokenPipeError:
            return None
        except reward_worker.Invalid as error:
            return {"invalid": str(error)}
        return found

    def _read(self, seconds: float) -> Any:
        """A line of the process as JSON, None if there is none in time."""
        out, deadline, line = self._process.stdout, time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([out], [], [], left)[0]:
                return None
            some = out.read1()
            if not some:
                return None
            line += some
        try:
            return json.loads(line)
        except ValueError:
            return line.decode(errors="replace").strip()

    def stop(self) -> int | None:
        """Kills the process, if there is one, and returns how it ended."""
        process, self._process = self._process, None
        return processes.end(process)


def count_failed(spec: str, values: list[list[float]], reasons: list[str]) -> int:
    """How many values are NaN; raises ValueError with the first reason if all are."""
    failed = sum(math.isnan(v) for group in values for v in group)
    if failed and failed == sum(map(len, values)):
        raise ValueError(
            f"--config.reward={spec} failed for every response: {reasons[0]}"
        )
    return failed


class LocalFunction(contextlib.AbstractContextManager):
    """A function of this process, which nobody can kill; what it raises is raised."""

    failures = 0

    def __init__(self, spec: str, function: Callable):
        self.spec, self._function = spec, function

    def __exit__(self, *unused) -> None:
        pass

    def check(self) -> None:
        pass

    def __call__(self, groups: list[dict[str, list]]) -> list[list[float]]:
        """As of `RewardFunction`."""
        try:
            out = [reward_worker.call(self._function, group) for group in groups]
        except reward_worker.Invalid as error:
            raise ValueError(f"reward {self.spec} {error}") from None
        return [[0.0 if v is None else v for v in values] for values in out]


class RewardFunction(contextlib.AbstractContextManager):
    """One function, in a pool of processes; `failures` counts responses without a value.

    Args:
      spec: "path/to/file.py:name", "package.module:name", one of `READY` with its
        argument, or "pipe:COMMAND", a program that answers each line of JSON, the
        arguments, with a line: a list of numbers.
      seconds: of wall time for a response, after which it is given up.
      num_workers: processes, each of which takes the samples of a prompt.
    """

    def __init__(self, spec: str, seconds: float = 10.0, num_workers: int = 1):
        self.spec, self.failures = spec, 0
        self._seconds = seconds
        self._workers = [Worker(spec) for _ in range(num_workers)]
        self._pool = concurrent.futures.ThreadPoolExecutor(num_workers)

    def __exit__(self, *unused) -> None:
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def check(self) -> None:
        """Raises ValueError if the function cannot be loaded."""
        self._workers[0].start()

    def __call__(self, groups: list[dict[str, list]]) -> list[list[float]]:
        """Values of groups of responses, NaN of those that failed.

        Args:
          groups: keyword arguments of the function for the samples of each prompt.

        Raises:
          ValueError: if it failed for every response, or returned what is no reward.
        """
        free = list(self._workers)
        reasons: list[str] = []

        def values(group: dict[str, list]) -> list[float]:
            worker = free.pop()
            try:
                return self._values(worker, group, reasons)
            finally:
                free.append(worker)

        out = list(self._pool.map(values, groups))
        self.failures += count_failed(self.spec, out, reasons)
        return out

    def _values(
        self, worker: Worker, group: dict[str, list], reasons: list[str]
    ) -> list[float]:
        """Of one group: what fails is tried again in halves, until it is one response."""
        n = len(group["completions"])
        try:
            values = worker.call(group, self._seconds * n)
        except Failed as error:
            reasons.append(str(error))
            if n == 1:
                return [math.nan]
            halves = (
                {k: v[part] for k, v in group.items()}
                for part in (slice(n // 2), slice(n // 2, n))
            )
            return [v for half in halves for v in self._values(worker, half, reasons)]
        return [0.0 if v is None else v for v in values]
