"""Which evaluations of a run may be compared: those that asked the same.

A run may be continued with other prompts of evaluations, or other samples of them.
"""

from typing import Any

from ml_collections import FrozenConfigDict

from pfjax.infra import dataset_io

# In rows of `metrics.jsonl`, a number as all there is.
FINGERPRINT = "evaluation/fingerprint"


def fingerprint(config: FrozenConfigDict, prompts: str) -> int:
    """The number of evaluations that ask what these do.

    Args:
      prompts: fingerprint of those that are evaluated.
    """
    how = [prompts, config.eval_samples]
    how += sorted(config.eval_sampling.to_dict().items())
    return int(dataset_io.fingerprint(how)[:8], 16)


def best_of(config: FrozenConfigDict, number: int) -> str:
    """What the best checkpoint is the best of: the metric, and the evaluation if it is of
    one."""
    name = config.best_metric
    return f"{name} of evaluation {number}" if name.startswith("eval/") else name


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl`, without the scores that are not to be compared with the last.
    An older pfjax did not say what it asked: its scores stay."""
    known = [row[FINGERPRINT] for row in rows if FINGERPRINT in row]
    is_other = lambda row: known and row.get(FINGERPRINT, known[-1]) != known[-1]
    unscored = lambda row: {k: v for k, v in row.items() if not k.startswith("eval/")}
    return [unscored(row) if is_other(row) else row for row in rows]


def evaluated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of steps that were evaluated as the last of them was."""
    return [r for r in comparable(rows) if any(k.startswith("eval/") for k in r)]
