"""How far a long sampling is, for the person who waits."""

import sys
import time


class Progress:
    """Responses and tokens so far, on standard error: a bar when a person watches."""

    def __init__(self, total: int, done: int = 0):
        self._total, self._done, self._tokens, self._bar = total, done, 0, None
        self._begin = time.perf_counter()
        if sys.stderr.isatty():
            import rich.console
            import rich.progress as rp

            self._bar = rp.Progress(
                rp.TextColumn("{task.completed}/{task.total} responses"),
                rp.BarColumn(),
                rp.TextColumn("{task.description}"),
                rp.TimeRemainingColumn(),
                console=rich.console.Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def add(self, responses: int, tokens: int) -> None:
        before = 10 * self._done // self._total
        self._done, self._tokens = self._done + responses, self._tokens + tokens
        rate = f"{self._tokens / (time.perf_counter() - self._begin):.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=rate)
        elif 10 * self._done // self._total > before:
            print(f"{self._done}/{self._total} responses, {rate}", file=sys.stderr)

    def __enter__(self) -> "Progress":  # noqa: PYI034
        return self

    def __exit__(self, *unused) -> None:
        if self._bar is not None:
            self._bar.stop()
