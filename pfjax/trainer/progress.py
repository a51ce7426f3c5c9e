"""What a person sees of a run: a bar or lines while it trains, a table at its end."""

from typing import Any

from etils import epath

from pfjax.infra import distributed
from pfjax.sampler.progress import Bar
from pfjax.trainer import evaluations, preemption

_SHOWN = {
    "tb/loss": "loss",
    "completions/mean_length": "length",
    "time/step": "s/step",
    "entropy": "entropy",
}


class Progress(Bar):
    """A progress bar when a person watches, plain lines when nobody does."""

    def __init__(self, start: int, total: int, every: int):
        super().__init__("step", total, start, False)
        self._every, self._total = every, total
        # For a line that stays.
        self.note = preemption.say
        if not distributed.is_first():
            self.note = lambda _: None
        elif self._bar is not None:
            self.note = self._bar.console.print

    def update(self, step: int, values: dict[str, Any]) -> None:
        shown = {s: values[k] for k, s in _SHOWN.items() if k in values}
        text = "  ".join(f"{s} {x:.3g}" for s, x in shown.items())
        is_due = step % self._every == 0 or step == self._total
        if not self.show(step, text) and is_due:
            self.note(f"step {step}/{self._total}  {text}")


def before_and_after(history: list[dict[str, Any]], workdir: epath.Path) -> str:
    """The table a run ends with: the last evaluation, and the first that asked the same."""
    import rich.console
    import rich.table

    evaluated = evaluations.evaluated(history)
    console = rich.console.Console(width=min(100, rich.console.Console().width))
    with console.capture() as captured:
        if evaluated:
            first, last = evaluated[0], evaluated[-1]
            table = rich.table.Table(title="What changed on the held-out prompts")
            for name in ("", f"step {first['step']}", f"step {last['step']}"):
                table.add_column(name, justify="right" if name else "left")
            for key in dict.fromkeys((*first, *last)):  # of sets that changed too
                if key.startswith("eval/") and not key.endswith("_se"):
                    values = (row.get(key) for row in (first, last))
                    shown = ("" if v is None else f"{v:.3f}" for v in values)
                    table.add_row(key, *shown)
            console.print(table)
        console.print(f"run:   {workdir}", soft_wrap=True)
        console.print(f"model: {workdir / 'hf'}", soft_wrap=True)
    return captured.get()
