"""Being told to stop: by SIGTERM (preemption, a time limit), SIGINT (Ctrl-C), or SIGHUP (a
terminal that closes, or nobody who reads the output)."""

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from types import FrameType

# A run that was told to stop, has saved, and can be continued ends with this status
# (EX_TEMPFAIL of sysexits.h); the launch scripts know it.
EXIT_STATUS = 75


class Preempted(Exception):
    """The run has saved its state and ended before its last step."""


def hear_again() -> None:
    """From here on what a signal raises is raised again where Python would drop it.

    In a callback of the garbage collector, which JAX has, or of a weak reference, an exception
    ends nothing. A Ctrl-C while a run started was lost in one of five tries.
    """
    before = sys.unraisablehook
    main = threading.main_thread().ident

    def hook(unraisable) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt | Preempted):
            before(unraisable)
            return
        # Later, as the callback may not have returned.
        again = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


class Preemption:
    """A context manager in which the first SIGTERM, SIGINT or SIGHUP is only noted, until
    there is nothing more to save.

    The second does what it always did: a save that hangs can be stopped. SIGHUP is the
    exception: shells repeat it, so a second one is ignored, and under `nohup` the first is
    too. Signals reach the main thread alone: a run in another one does not hear them.
    """

    def __init__(self):
        self.is_asked = False
        self._said = ""

    def __enter__(self) -> "Preemption":  # noqa: PYI034
        is_main = threading.current_thread() is threading.main_thread()
        heard = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        heard = heard if is_main else ()
        self._before = {s: signal.signal(s, self._note) for s in heard}
        return self

    def __exit__(self, *unused) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_at_once(self, said: str) -> None:
        """From here on a signal raises Preempted; one that was noted does so now."""
        self._said = said
        if self.is_asked:
            raise Preempted(said)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
        if number == signal.SIGHUP:
            _write_to_nothing(_is_terminal)
        name = signal.Signals(number).name
        if self._said:
            raise Preempted(f"{name}: {self._said}")
        self.__exit__()
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
        print(f"{name}: saving after this step; again to stop at once", file=sys.stderr)


def say(text: str) -> None:
    """Prints a line. Where nobody reads any more, as after `| head`, the run is told what it
    is told of a closed terminal."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        gone = os.fstat(1)
        _write_to_nothing(lambda output: os.path.samestat(output, gone))
        if callable(signal.getsignal(signal.SIGHUP)):
            signal.raise_signal(signal.SIGHUP)


def _is_terminal(output: os.stat_result) -> bool:
    return stat.S_ISCHR(output.st_mode)


def _write_to_nothing(is_gone: Callable[[os.stat_result], bool]) -> None:
    """From here on what was written there is lost; it would fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            if is_gone(os.fstat(output)):
                os.dup2(nothing, output)
    os.close(nothing)
