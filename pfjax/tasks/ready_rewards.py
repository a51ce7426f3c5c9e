"""Reward functions that come with pfjax; they run in processes as those of one's own do."""

import re
import resource
import warnings

_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_MEMORY_BYTES = 2 * 2**30


def compiles_python(completions: list, **unused) -> list[float]:
    """1 for a response whose last code block (all of it, without one) is valid Python.

    Nothing of it is run. What takes too much time or memory to compile fails.
    """
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    return [float(_compiles(_text(completion))) for completion in completions]


def _text(completion: str | list[dict]) -> str:
    """Of a completion as text or as messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _compiles(text: str) -> bool:
    blocks = _BLOCK.findall(text)
    code = blocks[-1] if blocks else text
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(code, "response", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False
    return bool(code.strip())
