"""Where metrics are written: `metrics.jsonl`, TensorBoard, W&B."""

import json
import pathlib
import tempfile
import textwrap
from typing import Any

from etils import epath

from pfjax.infra import distributed, storage
from pfjax.infra.dataset_io import read_jsonl, write_jsonl
from pfjax.trainer import tracking

_COMPLETIONS_SHOWN = 8  # of an evaluation in TensorBoard


class Writer:
    """Writes metrics and completions to the run's folder, as TensorBoard events, and
    perhaps to W&B; a context manager. Of several processes the first writes, the others
    only keep the history.

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
        rows = read_jsonl(self._path)
        self.history = [r for r in rows if r["step"] <= last_step]
        self._shown = {r["step"]: r for r in self.history}
        self._board = self._tracker = None
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
            self._events = pathlib.Path(tempfile.mkdtemp(prefix="pfjax-"))
        self._board = SummaryWriter(str(self._events), purge_step=last_step + 1)
        text = textwrap.indent(json.dumps(config, indent=2), "    ")
        self._board.add_text("config", text, max(last_step, 0))

    def __enter__(self) -> "Writer":  # noqa: PYI034
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        if self._board is None:
            return
        self._board.close()
        if storage.is_remote(self._workdir):
            storage.upload(self._events, self._workdir)
        if self._tracker is not None:
            self._tracker.finish(kind)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the row of a step, or replaces it by a fuller one."""
        values = {k: float(v) for k, v in values.items()}
        row = {"step": step} | values | {"step": step}
        self.history = [r for r in self.history if r["step"] != step] + [row]
        if self._board is None:
            return
        # Whole, as files in buckets cannot be appended to: 1 MB after 1,000 steps.
        write_jsonl(self._path, self.history)
        for name, value in tracking.only_new(self._shown, row).items():
            self._board.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(row)

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
