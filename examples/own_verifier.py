r"""A verifier of your own: runs the Python of a response against the asserts of its prompt.

    python -m examples.own_verifier

Trained on rows such as `{"prompt": "Write add.", "asserts": ["assert add(1, 2) == 3"]}` with

    --config.reward=examples/own_verifier.py:passes --config.alpha=1 --config.beta=20

a policy nears the base given that its code passes; with alpha=4, its power given that.
A program has 2 s of CPU, 512 MiB, no network, and writes to no file. It may read and remove
what its user may, and fork: run what you do not trust in a container. One that sets out to
cheat can, as the asserts run in its process.
"""

import contextlib
import secrets
import shutil
import subprocess
import sys

# A network and processes of its own, which die with it.
UNSHARE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
SECONDS, BYTES = 2, 512 * 2**20
# Ends with a status that the response does not know: to end early is not to pass.
_RUN = f"""
import os, resource, sys
code, status = sys.stdin.read(), int(sys.argv.pop())
addresses = [("AS", {BYTES})] if sys.platform != "darwin" else []  # macOS refuses
for limit, value in [("CPU", {SECONDS}), ("FSIZE", 0), ("CORE", 0), *addresses]:
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (value, value))
exec(code, {{"__name__": "response"}})
os._exit(status)
"""


def sandbox() -> list[str]:
    """What keeps a program from the network; where nothing can, says so."""
    if shutil.which("unshare") and subprocess.call([*UNSHARE, "true"]) == 0:
        return UNSHARE
    print("no unshare here: responses have a network", file=sys.stderr)
    return []


def passes(completions: list, asserts: list[list[str]], **columns) -> list[float]:
    """0 for each response whose program passes its asserts, -1 for others."""
    prefix, out = sandbox(), []
    for completion, checks in zip(completions, asserts, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        code = text.rpartition("```python\n")[2].partition("```")[0]
        out.append(_is_passed("\n".join([code, *checks]), prefix) - 1.0)
    return out


def _is_passed(program: str, prefix: list[str]) -> bool:
    status, none = 2 + secrets.randbelow(120), subprocess.DEVNULL
    command = [*prefix, sys.executable, "-I", "-c", _RUN, str(status)]
    how = {"stdout": none, "stderr": none, "env": {}, "timeout": 3 * SECONDS}
    with contextlib.suppress(subprocess.TimeoutExpired):
        given = program.encode(errors="replace")
        done = subprocess.run(command, input=given, check=False, **how)
        return done.returncode == status
    return False


RESPONSES = {
    "right": "Easily:\n```python\ndef add(a, b): return a + b\n```",
    "wrong": "def add(a, b): return a - b",
    "endless": "while True: pass",
    "greedy": "x = bytearray(2**34)",
    "quits": "__import__('os')._exit(0)",
}


if __name__ == "__main__":
    for name, response in RESPONSES.items():
        print(f"{name:8} {passes([response], [['assert add(1, 2) == 3']])[0]:g}")
