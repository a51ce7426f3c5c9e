"""The study from its runs to the report and the tables."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from examples.study import jobs, pictures, tables
from pfjax.report import page
from pfjax.report import runs as report_runs

# Few enough for one frame.
_FIGURE = ("powerflow", "tb_traj", "tb_token", "ttrl", "empo", "intuitor")


def study(
    out: pathlib.Path,
    names: Sequence[str],
    alphas: Sequence[str],
    seeds: int,
    shared: dict[str, Any],
    run: Callable[[jobs.Job], None] = jobs.run,
) -> None:
    """Carries out the study; see `jobs.plan`."""
    trained, sampled = jobs.plan(out, names, alphas, seeds, shared)
    jobs.carry_out([*trained, *(j for found in sampled.values() for j in found)], run)
    runs = [job for job in trained if job.label]
    for job in runs:
        (job.folder / "label.txt").write_text(job.label + "\n")
    table = out / "table.md"
    table.write_text(_tables(runs, sampled))
    page.write([str(out)], str(out / "report"))
    figure = [str(out / name) for name in _FIGURE if (out / name).exists()]
    for name, folders in (("all", [str(out)]), ("figure", figure)):
        if folders:
            groups = report_runs.group(report_runs.load(folders))
            pictures.write(groups, out / "pictures" / name)
    print(f"\n{table.read_text()}\ntable:  {table}\nreport: {out}/report/index.html")


def _tables(runs: list[jobs.Job], sampled: dict[str, list[jobs.Job]]) -> str:
    text = []
    back = [j for j in runs if j.name.startswith("back/")]
    for part in ([j for j in runs if j not in back], back):
        if part:
            text.append(tables.table_of_runs([(j.label, j.folder) for j in part]))
    if back:
        folders = {
            "alpha 2": [j.folder.parents[1] / j.needs / "hf" for j in back],
            back[0].label: [j.result for j in back],
        }
        text.append(tables.table_of_distances(folders, "pfjax/toy", jobs.EVAL))
    bounds = [
        f"{row['eval/elbo']:.3f} <= log of the target's sum <= {row['eval/eubo']:.3f}"
        for j in runs
        for row in tables.evaluations(j.folder)[-1:]
        if "eval/elbo" in row
    ]
    if bounds:
        text.append("Bounds of PowerFlow, alpha 4: " + "; ".join(bounds) + "\n")
    text.append("Sampled from the base at alpha 4, without training:\n")
    files = {method: [j.result for j in found] for method, found in sampled.items()}
    text.append(tables.table_of_samples(files, jobs.EVAL))
    return "\n".join(text)
