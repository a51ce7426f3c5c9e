"""Where metrics are written: `metrics.jsonl`, TensorBoard, W&B."""

import contextlib
import json
import pathlib
import tempfile
import textwrap
from typing import Any

import numpy as np
from etils import epath

from pfjax.batch import Rollout
from pfjax.infra import distributed, storage
from pfjax.infra.dataset_io import as_jsonl, write_jsonl
from pfjax.infra.uploads import GROWING_EVERY, Uploads
from pfjax.trainer import history, tracking

_COMPLETIONS_SHOWN = 8  # of an evaluation in TensorBoard


class Writer:
    """Writes metrics and completions to the run's folder, as TensorBoard events, and
    perhaps to W&B; a context manager. Of several processes the first writes, the others
    only keep the history.

    To a bucket metrics and events are written in the background: `flush` comes before a
    checkpoint, so that a run that is killed finds all rows up to it.

    Args:
      workdir: the run's folder.
      last_step: lines of later steps are dropped (a resume).
      config: values of the run's `config.json`, for who looks at the metrics.
      wandb_project: of W&B; "" for none.
    """

    def __init__(
        self,
        workdir: epath.Path,
        last_step: int,
        config: dict[str, Any],
        wandb_project: str = "",
    ):
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        rows = history.read(self._path)
        self.history = [r for r in rows if r["step"] <= last_step]
        self._lines = {r["step"]: as_jsonl([r]) for r in self.history}
        self._shown = {r["step"]: r for r in self.history}
        self._board = self._tracker = self._uploads = None
        self._stack = contextlib.ExitStack()
        if not distributed.is_first():
            return
        from tensorboardX import SummaryWriter

        if wandb_project:
            self._tracker = tracking.Tracker(wandb_project, workdir, config, rows)
            for row in self.history:
                self._tracker.log(row)
        write_jsonl(self._path, self.history)
        self._events = pathlib.Path(workdir)
        if storage.is_remote(workdir):  # its events can only be written to a disk
            new = tempfile.TemporaryDirectory(prefix="pfjax-")
            self._events = pathlib.Path(self._stack.enter_context(new))
            self._uploads = self._stack.enter_context(Uploads())
        self._board = SummaryWriter(str(self._events), purge_step=last_step + 1)
        text = textwrap.indent(json.dumps(config, indent=2), "    ")
        self._board.add_text("config", text, max(last_step, 0))

    def __enter__(self) -> "Writer":  # noqa: PYI034
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if self._board is None:
            return
        self._board.close()
        self._put_events()
        self._stack.__exit__(kind, *unused)
        if self._tracker is not None:
            self._tracker.finish(kind)

    def flush(self) -> None:
        """Returns once the metrics are in the run's folder.

        Raises:
          OSError: if they could not be written.
        """
        if self._uploads is not None:
            self._uploads.flush()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the row of a step, or replaces it by a fuller one."""
        values = {k: float(v) for k, v in values.items()}
        row = {"step": step} | values | {"step": step}
        self.history = [r for r in self.history if r["step"] != step] + [row]
        is_new = self._lines.pop(step, None) is None
        self._lines[step] = line = as_jsonl([row])
        if self._board is None:
            return
        if self._uploads is None and is_new:
            storage.append_text(self._path, line)
        else:
            # Whole, as files in buckets cannot be appended to.
            text = "".join(self._lines.values())
            if self._uploads is None:
                storage.write_text(self._path, text)
            else:
                self._uploads.put(self._path, text.encode)
        for name, value in tracking.only_new(self._shown, row).items():
            self._board.add_scalar(name, value, step)
        self._put_events()
        if self._tracker is not None:
            self._tracker.log(row)

    def _put_events(self) -> None:
        """Has the events so far copied to the bucket."""
        if self._uploads is None:
            return
        self._board.flush()  # not where they are read, in a thread: it may be closed by then
        for file in self._events.glob("events.*"):
            self._uploads.put(self._workdir / file.name, file.read_bytes, GROWING_EVERY)

    def write_schedule(self, step: int, ids: list[int], rollout: Rollout) -> None:
        """Writes which weights drew the tokens that a step trained on: a line per prompt, of
        each of the policy's responses from which token on they were of how many steps."""
        if self._board is None or rollout.weights_step is None:
            return
        own = slice(rollout.num_own)
        rows = [
            {
                "prompt": i,
                "weights": [_changes(x[:n]) for x, n in zip(*of, strict=True)],
            }
            for i, *of in zip(
                ids, rollout.weights_step[:, own], rollout.lengths[:, own], strict=True
            )
        ]
        write_jsonl(self._workdir / f"schedule/step_{step:06d}.jsonl", rows)

    def write_completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes the responses of an evaluation, and shows some; before its scores."""
        if self._board is None or not rows:
            return
        write_jsonl(self._workdir / f"completions/step_{step:06d}.jsonl", rows)
        firsts = [row for row in rows if row["sample"] == 0][:_COMPLETIONS_SHOWN]
        # Indented, so that Markdown leaves it as it is.
        quoted = lambda text: textwrap.indent(text, "    ", lambda _: True)
        shown = (f"{quoted(r['prompt'])}\n\n{quoted(r['completion'])}" for r in firsts)
        self._board.add_text("completions", "\n\n---\n\n".join(shown), step)
        if self._tracker is not None:
            self._tracker.log_completions(step, rows)


def _changes(x: np.ndarray) -> list[list[int]]:
    """Indices and values where a sequence changes.

    >>> _changes(np.array([3, 3, 5]))
    [[0, 3], [2, 5]]
    """
    at = np.flatnonzero(np.diff(x, prepend=-1))
    return [[int(i), int(x[i])] for i in at]
