"""Processes that work for this one, and are asked over a pipe."""

import contextlib
import os
import pathlib
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# How a process ends when a scheduler has told all processes of the run to end. The run saves
# first, so it starts another process and asks that.
TOLD_TO_END = -signal.SIGTERM
_ROOT = pathlib.Path(__file__).parents[2]
# Nothing is imported from the current folder, where a file may have the name of any module,
# except pfjax itself if it lies there.
_RUN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import pfjax
sys.path.pop(0)
import runpy
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(module: str, *args: str) -> list[str]:
    """Does `python -m module args`, a module of this package, whatever the current folder
    holds."""
    return [sys.executable, "-P", "-c", _RUN, str(_ROOT), module, *args]


def start(command: Sequence[str], **kwargs: Any) -> subprocess.Popen:
    """Starts one with pipes, in a session of its own, which a Ctrl-C in the terminal does not
    reach."""
    kwargs |= {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, start_new_session=True, **kwargs)


def limit_memory(size: int) -> None:
    """Lets this process have no more than `size` bytes of addresses, where the system can:
    macOS refuses."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def end(process: subprocess.Popen | None) -> int | None:
    """Kills one, if there is one, and what it has started; returns how it ended."""
    if process is None:
        return None
    with contextlib.suppress(BrokenPipeError), process:
        if process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode
