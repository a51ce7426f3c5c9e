"""Weights & Biases: each run's folder is one run there, also when it is continued.

The id is random and kept in the folder (`wandb.json`): names of folders need not differ.
"""

import importlib.util
import json
import pathlib
import secrets
import tempfile
from collections.abc import Iterable
from typing import Any

from etils import epath

from pfjax.infra import dataset_io, distributed, storage
from pfjax.trainer import preemption, run_config

Row = dict[str, Any]
_TABLE_ROWS = 512  # completions that are shown of an evaluation


def check(project: str) -> None:
    """Raises ValueError if runs cannot be written to a project: the package is missing,
    or nobody is logged in."""
    if not project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--config.wandb_project={project} needs a package: pip install wandb; or "
            "leave the setting out (metrics.jsonl and TensorBoard events are always written)"
        )
    import wandb

    try:
        if distributed.is_first():
            wandb.login()
    except wandb.Error as error:
        raise _explained(project, error) from error


class Tracker:
    """A run of W&B, which is given each metric of each step once.

    Args:
      project: of W&B.
      workdir: the run's folder, local or `gs://`.
      config: values of the run's `config.json`.
      rows: metrics that the run's folder held before this process: given already,
        if the folder has a run of this project.
    """

    def __init__(
        self, project: str, workdir: epath.Path, config: Row, rows: Iterable[Row]
    ):
        import wandb

        path = workdir / "wandb.json"
        known = storage.read_json(path) if path.exists() else {}
        if known.get("project") != project:
            known, rows = {"project": project, "id": secrets.token_hex(4)}, []
        self._sent = {row["step"]: row for row in rows}
        place = name = str(workdir.absolute())
        if storage.is_remote(workdir):  # its files can only be written to a disk
            name, place = str(workdir), tempfile.mkdtemp(prefix="pfjax-")
        try:
            self._run = wandb.init(
                **known,
                dir=place,
                name="/".join(name.rstrip("/").split("/")[-2:]),
                group=_group(config),
                config=config,
                resume="allow",
            )
        except wandb.Error as error:
            raise _explained(project, error) from error
        storage.write_text(path, json.dumps(known) + "\n")
        # W&B's own step may not go back; ours does when a run is continued.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """Gives what is new in the row of a step."""
        step, new = row["step"], only_new(self._sent, row)
        if new:
            self._run.log(new | {"step": step})

    def log_completions(self, step: int, rows: list[Row]) -> None:
        """Gives the responses of an evaluation as a table."""
        import wandb

        if "time/eval" in self._sent.get(step, {}):
            return
        columns, shown = list(rows[0]), rows[:_TABLE_ROWS]
        table = wandb.Table(columns, [[row.get(c) for c in columns] for row in shown])
        self._run.log({"completions": table, "step": step})

    def finish(self, error: type[BaseException] | None) -> None:
        """Ends the run as finished, or after an exception as preempted or failed."""
        status = int(error is not None)
        if error is not None and issubclass(error, preemption.Preempted):
            self._run.mark_preempting()
            status = preemption.EXIT_STATUS
        self._run.finish(exit_code=status)


def only_new(known: dict[int, Row], row: Row) -> Row:
    """What the row of a step holds beside what is known, which then includes it."""
    old = known.get(row["step"], {})
    known[row["step"]] = old | row
    return {k: v for k, v in row.items() if k not in old and k != "step"}


def _group(config: Row) -> str:
    """A name that runs share whose settings differ in the seed alone."""
    same = run_config.identity(config)
    del same["seed"]
    model = pathlib.PurePath(config["model"]).name
    of_others = dataset_io.fingerprint(same)[:6]
    return f"{model} {config['objective']} alpha {config['alpha']:g} {of_others}"[-128:]


def _explained(project: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(
        f"--config.wandb_project={project}: {reason} (WANDB_MODE=offline writes "
        "to the run's folder instead, for `wandb sync` later)"
    )
