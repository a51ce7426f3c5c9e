"""Checkpoints of a run, by Orbax.

A checkpoint of step `s` holds what decides the future after `s` updates: the
parameters, log Z', the optimiser's state, the step, and the data cursor. Random
numbers need no state, they are made from (seed, step, ...). Restoring goes: (1)
build the abstract state with the shardings of the mesh at hand; (2) find the latest
step; (3) Orbax reads each shard into place, whatever mesh wrote it; (4) the caller
cuts `metrics.jsonl` back to that step.
"""

import logging
import pathlib
from typing import Any

from orbax.checkpoint import v1 as ocp

KEEP = 2  # the latest, and the one before should that be damaged


class Checkpoints:
    """The `checkpoints/` of one run; a context manager."""

    def __init__(self, directory: pathlib.Path):
        # Orbax and tensorstore report every file at INFO.
        logging.getLogger("absl").setLevel(logging.WARNING)
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(KEEP),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":  # noqa: PYI034
        return self

    def __exit__(self, *unused) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, cursor: dict[str, int]) -> None:
        """Copies the state and writes it in the background."""
        if step != self.latest_step:
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "cursor": cursor}
            )

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, int]]:
        """The latest state, with the shardings of `abstract_state`, and its cursor."""
        out = self._checkpointer.load_checkpointables(
            None, {"state": abstract_state, "cursor": None}
        )
        return out["state"], out["cursor"]

    def wait(self) -> None:
        """Returns once what was saved is on disk."""
        self._checkpointer.wait()
