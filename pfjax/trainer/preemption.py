"""Being told to stop: by SIGTERM (preemption, a time limit) or SIGINT (Ctrl-C)."""

import signal
import sys
from types import FrameType

# A run that was told to stop, has saved, and can be continued ends with this status
# (EX_TEMPFAIL of sysexits.h); the launch scripts know it.
EXIT_STATUS = 75


class Preempted(Exception):
    """The run has saved its state and ended before its last step."""


class Preemption:
    """A context manager in which the first SIGTERM or SIGINT is only noted, until there is
    nothing more to save.

    The second does what it always did: a save that hangs can be stopped.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.is_asked = False
        self._said = ""

    def __enter__(self) -> "Preemption":  # noqa: PYI034
        self._before = {s: signal.signal(s, self._note) for s in self._SIGNALS}
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
        self.__exit__()
        name = signal.Signals(number).name
        if self._said:
            raise Preempted(f"{name}: {self._said}")
        print(f"{name}: saving after this step; again to stop at once", file=sys.stderr)
