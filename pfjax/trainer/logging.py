"""Where metrics are written: `metrics.jsonl`, TensorBoard, W&B."""

import json
import pathlib
import tempfile
from typing import Any

from etils import epath

from pfjax.infra import distributed, storage
from pfjax.infra.dataset_io import read_jsonl, write_jsonl


class Writer:
    """Writes metrics to `metrics.jsonl`, TensorBoard, and perhaps W&B: of several
    processes the first does, the others only keep the history."""

    def __init__(self, workdir: epath.Path, last_step: int, wandb_project: str = ""):
        """Opens the files, dropping lines of steps past `last_step` (a resume)."""
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self.history = [r for r in read_jsonl(self._path) if r["step"] <= last_step]
        self._board = self._wandb = None
        if not distributed.is_first():
            return
        from tensorboardX import SummaryWriter

        write_jsonl(self._path, self.history)
        self._events = pathlib.Path(workdir)
        if storage.is_remote(workdir):  # its events can only be written to a disk
            self._events = pathlib.Path(tempfile.mkdtemp(prefix="pfjax-"))
        self._board = SummaryWriter(str(self._events), purge_step=last_step + 1)
        if wandb_project:
            import wandb  # the extra `wandb`

            self._wandb = wandb.init(
                project=wandb_project,
                dir=workdir,
                id=workdir.name,
                resume="allow",
                config=json.loads((workdir / "config.json").read_text())["config"],
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds the row of a step, or replaces it by a fuller one."""
        values = {k: float(v) for k, v in values.items()}
        row = {"step": step} | values | {"step": step}
        self.history = [r for r in self.history if r["step"] != step] + [row]
        if self._board is None:
            return
        # Whole, as files in buckets cannot be appended to: 1 MB after 1,000 steps.
        write_jsonl(self._path, self.history)
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(row, step=step)

    def close(self) -> None:
        if self._board is None:
            return
        self._board.close()
        if storage.is_remote(self._workdir):
            storage.upload(self._events, self._workdir)
        if self._wandb is not None:
            self._wandb.finish()
