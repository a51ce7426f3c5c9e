"""The rows of `metrics.jsonl`, read back: by a run that goes on, an export, a report."""

from typing import Any

from etils import epath

from pfjax.infra import dataset_io


def read(path: epath.PathLike) -> list[dict[str, Any]]:
    """A row for each step, in their order; of several of a step the last. None if there is no
    file.

    Other programs write null for a number that is none: it counts as absent.

    Raises:
      ValueError: for a row without a step or with a value that is no number, naming it.
    """
    rows = {}
    for found in dataset_io.read_jsonl(path):
        row = {k: v for k, v in found.items() if v is not None}
        wrong = [k for k, v in row.items() if type(v) not in (int, float)]
        if wrong or type(row.get("step")) is not int:
            name = wrong[0] if wrong else "step"
            raise ValueError(
                f"{path}: {name}={row.get(name)!r} in the row {dataset_io.brief(found)}: a row "
                "has a whole number `step`, and numbers; bring the file back or mend the row"
            )
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
