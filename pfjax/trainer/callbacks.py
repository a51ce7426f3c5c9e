"""Functions of a person that a run calls, and what becomes of their exceptions."""

from collections.abc import Callable
from typing import Any

from pfjax.infra import distributed
from pfjax.trainer import preemption

OnStep = Callable[[int, dict[str, float]], Any]
OnEvaluation = Callable[[int, dict[str, float], list[dict]], Any]


class Callbacks:
    """Calls them on the first process; an exception waits until the run has saved."""

    def __init__(self, on_step: OnStep | None, on_evaluation: OnEvaluation | None):
        self._on_step, self._on_evaluation = on_step, on_evaluation
        self._error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def on_step(self, step: int, values: dict[str, float]) -> None:
        self._call(self._on_step, step, dict(values))

    def on_evaluation(
        self, step: int, values: dict[str, float], rows: list[dict]
    ) -> None:
        self._call(self._on_evaluation, step, dict(values), [dict(r) for r in rows])

    def raise_error(self, step: int) -> None:
        """Raises what a callback has raised, here or on the first process."""
        how = f"stopped after step {step}; the same call or command continues"
        if self._error is None:
            raise preemption.Preempted(f"a callback failed on the first process: {how}")
        self._error.add_note(f"raised by a callback: {how}")
        raise self._error

    def _call(self, function: Callable | None, *args: Any) -> None:
        if function is None or self.has_failed or not distributed.is_first():
            return
        try:
            function(*args)
        # By SystemExit one may end a run. Raised after a save.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._error = error
