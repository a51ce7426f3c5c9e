"""How far something long is, for the person who waits."""

import contextlib
import sys
import time

from pfjax.infra import distributed


class Bar(contextlib.AbstractContextManager):
    """A progress bar when a person watches standard error, else nothing.

    Args:
      what: is counted, such as "step".
      total, done: how many there are, and were done before.
      stderr: whether it is drawn there rather than on standard output.
    """

    def __init__(self, what: str, total: int, done: int, stderr: bool):
        self._bar = None
        if distributed.is_first() and sys.stderr.isatty():
            import rich.console
            import rich.progress as rp
            import rich.table

            # How far it is stays whole where a line is too short for all.
            width = len(f"{what} {total}/{total}")
            self._bar = rp.Progress(
                rp.TextColumn(
                    what + " {task.completed}/{task.total}",
                    table_column=rich.table.Column(min_width=width),
                ),
                rp.BarColumn(bar_width=10),
                rp.TimeRemainingColumn(compact=True),
                rp.TextColumn("{task.description}"),
                console=rich.console.Console(stderr=stderr),
            )
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def show(self, done: int, text: str) -> bool:
        """Returns whether there is a bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        return self._bar is not None

    def __exit__(self, *unused) -> None:
        if self._bar is not None:
            self._bar.stop()


class Progress(Bar):
    """Responses and tokens so far; without a bar, a line for each tenth."""

    def __init__(self, total: int, done: int = 0):
        super().__init__("responses", total, done, True)
        self._total, self._done, self._tokens = total, done, 0
        self._begin = time.perf_counter()

    def add(self, responses: int, tokens: int) -> None:
        before = 10 * self._done // self._total
        self._done, self._tokens = self._done + responses, self._tokens + tokens
        rate = f"{self._tokens / (time.perf_counter() - self._begin):.0f} tokens/s"
        has_bar = self.show(self._done, rate)
        if not distributed.is_first():
            return
        if not has_bar and 10 * self._done // self._total > before:
            print(f"{self._done}/{self._total} responses, {rate}", file=sys.stderr)
