r"""The paper's comparison on the toy task: python -m examples.study --out=runs/study

Trains every objective and a sweep of alpha on a number of seeds, a run per core, each as
`configs/study.py` says; flattens what was sharpened (alpha 2, then 0.5); samples the base by
the methods that need no training; and writes a report and a table of last values. Runs that
are there already are kept, so the same command goes on.

--search tries eight settings for each objective on prompts held out of training, with a seed
of its own, and prints the best: where configs/study.py has its settings from.
"""

import pathlib
import sys

from absl import app, flags

from examples.study import search, study
from pfjax import objectives

_OUT = flags.DEFINE_string("out", "runs/study", "folder of the runs and the report")
_SEARCH = flags.DEFINE_bool("search", False, "search settings instead")
_OBJECTIVES = flags.DEFINE_list(
    "objectives", list(objectives.OBJECTIVES), "which are trained"
)
_ALPHAS = flags.DEFINE_list(
    "alphas", ["0.25", "0.5", "1", "2", "8"], "beside 4, for PowerFlow"
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of a kind", lower_bound=1)
_STEPS = flags.DEFINE_integer("num_steps", None, "of a run; default: the config's")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    out = pathlib.Path(_OUT.value).absolute()
    shared = {} if _STEPS.value is None else {"num_steps": _STEPS.value}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if _SEARCH.value:
            search.search(out, _OBJECTIVES.value, shared)
        else:
            study.study(out, _OBJECTIVES.value, _ALPHAS.value, _SEEDS.value, shared)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
