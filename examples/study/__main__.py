r"""Compares methods on worlds with exact answers: python -m examples.study --out=runs/study

Fits base models to each world, trains every method from each of them on a number of seeds,
a run per core, and measures where each ended by listing all responses. By default the main
methods on three worlds, in about 40 minutes on 2 cores; --full is all of them. Writes tables
(`tables.md`), pictures, all values (`results.json`), and a page with curves and samples.
What is there already is kept, so the same command goes on.

--search tries a fixed list of 20 settings for every method, on prompts that it does not
train on, and prints which is best: by their answers, by the certificate of a run, which reads
none, and by the exact distance. Where configs/study.py has its settings from.
"""

import itertools
import json
import os
import pathlib
import sys

import jax
from absl import app, flags

from examples.study import cells, ends, pictures, search, tables
from examples.study.cells import Cell
from examples.study.ends import TRAIN
from examples.study.methods import MAIN, TRAINED, UNTRAINED, Base, Method, alpha_of
from examples.worlds import WORLDS
from pfjax.report import page
from pfjax.report import runs as report_runs

_LISTABLE = [w.name for w in WORLDS.values() if w.is_listable]

_OUT = flags.DEFINE_string("out", "runs/study", "folder of the runs and the report")
_WORLDS = flags.DEFINE_multi_enum(
    "world", ["sums", "detour", "stories"], _LISTABLE, "which; may be repeated"
)
_METHODS = flags.DEFINE_multi_enum(
    "method", list(MAIN), list(TRAINED), "which; may be repeated"
)
_FULL = flags.DEFINE_bool("full", False, "all worlds and methods")
_SEARCH = flags.DEFINE_bool("search", False, "search settings instead, on one world")
_BASES = flags.DEFINE_integer("bases", 2, "base models of a world", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 5, "runs of a kind", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "num_steps", None, "of a run; default: the config's", lower_bound=1
)
_BASE_STEPS = flags.DEFINE_integer(
    "base_steps", None, "of fitting a base; default: the world's", lower_bound=1
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    out = pathlib.Path(_OUT.value).absolute()
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that train
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    more = {} if _STEPS.value is None else {"num_steps": _STEPS.value}
    names = _LISTABLE if _FULL.value else _WORLDS.value
    methods = list(TRAINED) if _FULL.value else _METHODS.value
    try:
        if _SEARCH.value:
            search.search(out / "search", names[0], methods, more, _BASE_STEPS.value)
        else:
            _study(out, names, methods, more)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _study(out: pathlib.Path, names: list[str], methods: list[str], more: dict) -> None:
    bases = range(_BASES.value)
    cells.prepare(out, names, bases, methods, _BASE_STEPS.value)
    # Seed by seed, so that what is there when it is stopped is comparable.
    order = itertools.product(range(_SEEDS.value), names, bases, methods)
    asked = [Cell(w, b, m, s) for s, w, b, m in order if TRAINED[m].is_apt(w)]
    cells.train(out, [(cell, more) for cell in asked])
    cells.add_training(out, asked)
    worlds = [_world(out, name, bases, methods) for name in names]
    results = [r for w in worlds for r in w.runs]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    text = "\n".join(
        [f"## {w.name}, alpha {w.alpha:g}\n\n{tables.of_world(w)}" for w in worlds]
        + [f"## Where runs should end\n\n{tables.of_ends(worlds)}"]
        + [f"## Over worlds\n\n{tables.of_all([w for w in worlds if w.alpha > 1])}"]
    )
    (out / "tables.md").write_text(text, "utf-8")
    folders = {n: [str(c.folder(out)) for c in asked if c.world == n] for n in names}
    for name, mine in folders.items():
        groups = report_runs.group(report_runs.load(mine))
        pictures.write(groups, out / "pictures" / name)
    page.write([*itertools.chain(*folders.values())], str(out / "report"))
    print(f"\n{text}\ntables: {out}/tables.md\nreport: {out}/report/index.html")


def _world(
    out: pathlib.Path, name: str, bases: range, methods: list[str]
) -> tables.World:
    loaded = [
        [cells.load_base(out, name, b, is_train=is_train) for is_train in (False, True)]
        for b in bases
    ]
    known = UNTRAINED | {m: TRAINED[m] for m in methods}
    predictions = {
        key: [_predict(method, *of_base) for of_base in loaded]
        for key, method in known.items()
        if method.prediction and method.is_apt(name)
    }
    paths = sorted((out / name).glob("*/*/*/result.json"))
    runs = [json.loads(p.read_text("utf-8")) for p in paths]
    runs = [
        r
        for r in runs
        if r["base"] in bases and r["method"] in methods and r["seed"] < _SEEDS.value
    ]
    return tables.World(name, alpha_of(name), runs, predictions)


def _predict(method: Method, held_out: Base, train: Base) -> dict[str, float]:
    on_train = ends.predict(train, method).items()
    return ends.predict(held_out, method) | {f"{TRAIN}{k}": v for k, v in on_train}


if __name__ == "__main__":
    app.run(main)
