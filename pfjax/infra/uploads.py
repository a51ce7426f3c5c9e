"""Files that are written again and again while a run goes on, in a bucket off its critical
path: an object cannot be appended to, and each request takes its time."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from pfjax.infra import storage

# Seconds between two writes of an object: GCS takes one a second.
_EVERY = 1.0
# And of those that grow long, whose last part may be lost to a kill.
GROWING_EVERY = 30.0
_SHARE = 0.1  # of the time, at most, that writing takes


class Uploads(contextlib.AbstractContextManager):
    """A thread that writes files, of each the newest content only.

    What could not be written is tried again; `flush` says it.
    """

    def __init__(self):
        self._waiting: dict[epath.Path, tuple[Callable[[], bytes], float]] = {}
        self._not_before: dict[epath.Path, float] = {}
        # Of what is waiting, and of who is writing: `put` waits for no write.
        self._changed, self._writing = threading.Condition(), threading.Lock()
        self._is_over = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(
        self, path: epath.Path, content: Callable[[], bytes], every: float | None = None
    ) -> None:
        """Has a file written, with what `content` returns then, in `every` seconds or
        less if it was written before."""
        with self._changed:
            self._waiting[path] = content, _EVERY if every is None else every
            self._changed.notify()

    def flush(self) -> None:
        """Returns once all is written.

        Raises:
          OSError: if a file could not be.
        """
        with self._writing:
            while (path := next(iter(self._waiting), None)) is not None:
                self._write(path)

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()
        try:
            self.flush()
        except OSError:
            if kind is None:  # otherwise there is more to say
                raise

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_over and (pause := self._pause()):
                    self._changed.wait(pause)
                if self._is_over:
                    return
            with self._writing, contextlib.suppress(OSError):
                now = time.monotonic()
                due = [p for p in [*self._waiting] if self._not_before.get(p, 0) <= now]
                for path in due:
                    self._write(path)

    def _pause(self) -> float:
        """Seconds until something has to be written; many if nothing waits."""
        at = [self._not_before.get(path, 0.0) for path in self._waiting]
        return max(min(at) - time.monotonic(), 0.0) if at else 3600.0

    def _write(self, path: epath.Path) -> None:
        with self._changed:
            content, every = self._waiting.pop(path)
        begin = time.monotonic()
        try:
            storage.write_bytes(path, content())
        except OSError:
            with self._changed:
                self._waiting.setdefault(path, (content, every))
            raise
        finally:
            now = time.monotonic()
            self._not_before[path] = now + max(every, (now - begin) / _SHARE)


@contextlib.contextmanager
def growing(path: epath.PathLike, start: str = "") -> Iterator[Callable[[str], None]]:
    """A text file that begins with `start`, and what adds to it.

    On this machine all of it is there at once; in a bucket each `GROWING_EVERY` seconds,
    and in the end.
    """
    path = storage.place(path)
    if not storage.is_remote(path):
        storage.write_text(path, start)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115, closed below

        def write(text: str) -> None:
            with storage.named(path):
                file.write(text)
                file.flush()

        try:
            yield write
        finally:
            with storage.named(path):  # what could not be written is tried again
                file.close()
        return
    parts = [start.encode()]
    with Uploads() as background:

        def put(text: str) -> None:
            parts.append(text.encode())
            background.put(path, lambda: b"".join(parts), GROWING_EVERY)

        put("")
        yield put
