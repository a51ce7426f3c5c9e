"""Calls a reward function of a person's own, in a process that can be killed.

`python -m pfjax.tasks.reward_worker FILE.py:FUNCTION` answers each line of JSON, keyword
arguments of the function, with one: {"values": [...]}, {"error": "..."} where it raised, or
{"invalid": "..."} where it returned what is no reward. With one more argument the function
is what FUNCTION makes of it. Imports nothing of pfjax, and what the
function prints goes to standard error.
"""

import asyncio
import concurrent.futures
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable
from typing import Any

_TOO_LARGE = 3e38  # for float32, which rewards become


class Invalid(Exception):
    """A function returned something else than one number for each response."""


def load(spec: str) -> Callable:
    """The function of "path/to/file.py:name" or "package.module:name".

    Raises:
      ValueError: if there is none.
    """
    function = find(spec)
    if not callable(function):
        where, _, name = spec.rpartition(":")
        raise ValueError(f"{where} has no function {name!r}")  # noqa: TRY004
    return function


def find(spec: str) -> Any:
    """What is called `name` in "path/to/file.py:name" or "package.module:name".

    Raises:
      ValueError: if there is none.
    """
    where, _, name = spec.rpartition(":")
    if where.endswith(".py"):
        path = pathlib.Path(where).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        sys.path.insert(0, str(path.parent.absolute()))
        found = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(found)
        sys.modules[path.stem] = module  # so that its classes can be pickled
        found.loader.exec_module(module)
    else:
        if not where.startswith("pfjax."):
            sys.path.insert(0, os.getcwd())
        module = importlib.import_module(where)
    if not hasattr(module, name):
        near = ", ".join(k for k, v in vars(module).items() if inspect.isfunction(v))
        raise ValueError(f"{where} has no function {name!r} (it has: {near})")
    return getattr(module, name)


def call(function: Callable, given: dict[str, Any]) -> list[float | None]:
    """The values of a function for responses, given the arguments that it takes.

    Raises:
      Invalid: if it returns something else than a number or None for each.
    """
    num = len(given["completions"])
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        given = {p.name: given[p.name] for p in parameters if p.name in given}
    values = function(**given)
    if inspect.isawaitable(values):
        values = wait_for(values)
    return numbers(values, num)


def numbers(values: Any, num: int) -> list[float | None]:
    """Values of so many responses as floats; None for what does not apply.

    Raises:
      Invalid: if they are something else.
    """
    if hasattr(values, "tolist"):  # of NumPy, torch, or JAX
        values = values.tolist()
    if isinstance(values, str | dict | set) or not hasattr(values, "__iter__"):
        shown = repr(values)[:80]
        raise Invalid(f"returned {shown}, not a list of numbers")
    values = [v.item() if hasattr(v, "item") else v for v in values]
    if len(values) != num:
        raise Invalid(f"returned {len(values)} values for {num} responses")
    for v in values:
        is_number = isinstance(v, int | float) and abs(v) < _TOO_LARGE
        if v is not None and not is_number:
            raise Invalid(f"returned {v!r:.80} for a response, not a finite number")
    return [None if v is None else float(v) for v in values]


def wait_for(awaitable: Any) -> Any:
    """The result of what is awaited, in a thread: a notebook's has a loop already."""

    async def wait() -> Any:
        return await awaitable

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(wait())).result()


def describe(error: Exception) -> str:
    """An error in one line: where in the function it was raised, its kind and message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())}"


def _serve(spec: str, *argument: str) -> None:
    """Answers what is read from standard input until it closes."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    # What the function prints does not disturb the answers, and what it or a program of
    # its own reads does not take the requests: there is nothing to be read.
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def answer(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        function = load(spec)
        if argument:
            function = function(*argument)
    except Exception as error:  # noqa: BLE001, whatever a file of one's own may raise
        return answer(
            error=str(error) if type(error) is ValueError else describe(error)
        )
    answer(ready=True)
    for line in requests:
        try:
            answer(values=call(function, json.loads(line)))
        except Invalid as error:
            answer(invalid=str(error))
        except Exception as error:  # noqa: BLE001, whatever the function may raise
            answer(error=describe(error))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
