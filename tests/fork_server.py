"""Commands of this package as processes that need not import it.

A server has imported it, without starting a back end, and forks a process for each command.
This has arguments, environment, output and exit status of its own, receives signals and can
be killed; the five seconds of processor time that imports take are spent once.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Modules whose functions have the shapes and types of their arguments checked. Others are
# called per response, and the check takes longer than they do.
ARRAY_MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in pathlib.Path(ROOT, "pfjax").rglob("*.py")
    if "from jaxtyping" in path.read_text()
]
# JAX reads them when it is imported, which is past.
_OF_JAX = {
    "JAX_PLATFORMS": str,
    "JAX_NUM_CPU_DEVICES": int,
    "JAX_COMPILATION_CACHE_DIR": str,
    "JAX_DISABLE_MOST_OPTIMIZATIONS": lambda text: text == "1",
}


class Process:
    """What `subprocess.Popen` says of `python -m module args`, output kept in files."""

    def __init__(self, module, *args, env=None, stdout=None, stderr=None):
        self.args = [module, *map(str, args)]
        self.returncode: int | None = None
        new = tempfile.TemporaryFile  # closed once it is read
        self._files = [x or new() for x in (stdout, stderr)]
        self._channel, keepers = socket.socketpair()
        with keepers:
            fds = [*(x.fileno() for x in self._files), keepers.fileno()]
            socket.send_fds(_server(), [b"x"], fds)
        request = {"argv": self.args, "env": dict(os.environ if env is None else env)}
        self._lines = self._channel.makefile("rw")
        print(json.dumps(request), file=self._lines, flush=True)
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._channel.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits; standard output and error."""
        self.wait(timeout)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(io.TextIOWrapper(file, errors="replace").read())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_LOCK = threading.Lock()


def _server() -> socket.socket:
    with _LOCK:  # one for all threads
        return _start_server()


@functools.cache
def _start_server() -> socket.socket:
    """Where it takes requests; it ends when this process does."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ROOT},
            stdin=subprocess.DEVNULL,
        )
    return ours


def _serve(requests: socket.socket) -> None:
    _import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave nothing behind
    while (received := socket.recv_fds(requests, 1, 3))[0]:
        fds = received[1]
        if not os.fork():
            requests.close()
            return _keep(*fds)
        for fd in fds:
            os.close(fd)
    return None


def _import_all() -> None:
    import jaxtyping

    with jaxtyping.install_import_hook(ARRAY_MODULES, "beartype.beartype"):
        import pfjax.cli  # noqa: F401
        from pfjax.evaluation import results, scores  # noqa: F401
        from pfjax.model import hub, tokenizer
        from pfjax.sampler import mcmc, progress, smc  # noqa: F401
        from pfjax.trainer import loop, preemption  # noqa: F401
    # What transformers imports when it has something to do.
    tokenizer.load(hub.resolve("pfjax/toy"))


def _keep(stdout: int, stderr: int, channel: int) -> None:
    """Forks the process that is asked for, and says how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = socket.socket(fileno=channel)
    lines = connection.makefile("rw")
    request = json.loads(lines.readline())
    pid = os.fork()
    if pid:
        os.close(stdout)
        os.close(stderr)
        print(pid, file=lines, flush=True)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            print(os.waitstatus_to_exitcode(status), file=lines, flush=True)
        os._exit(0)
    lines.close()
    connection.close()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    _become(request["argv"], request["env"])


def _become(argv: list[str], env: dict[str, str]) -> None:
    import jax

    os.environ.clear()
    os.environ.update(env)
    for name, parse in _OF_JAX.items():
        if name in env:
            jax.config.update(name.lower(), parse(env[name]))
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
