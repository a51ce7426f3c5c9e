"""Writes the page of a report: what `template.html` shows, and the pictures beside it."""

import base64
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from pfjax.infra import storage
from pfjax.report import charts, outcomes, runs
from pfjax.report.runs import Group

_TEMPLATE = pathlib.Path(__file__).with_name("template.html")


def write(paths: Sequence[str], out: str, command: str = "") -> str:
    """Writes index.html and a PNG per picture; returns a line that says so.

    Args:
      paths: folders of runs, see `runs.load`.
      out: folder, local or `gs://`.
      command: what made the page, for its head.
    """
    found, skipped = runs.load(paths)
    groups = runs.group(found)
    folder = storage.place(out)
    folder.mkdir(parents=True, exist_ok=True)
    pictures, missing = charts.draw(groups)
    for p in pictures:
        (folder / f"{p.name}.png").write_bytes(charts.save(p.figure, "png"))
    svgs = [base64.b64encode(charts.save(p.figure, "svg")) for p in pictures]
    shared, differ = runs.settings(groups)
    most = (2, 1) if len(groups) > charts.MOST_IN_ONE else (4, 2)
    samples = [(g, outcomes.telling(g, *most), outcomes.changes(g)) for g in groups]
    # Whatever a model, a config or a person wrote is escaped.
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["number"] = _number
    text = env.from_string(_TEMPLATE.read_text()).render(
        runs=found,
        versions={", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in found},
        sizes={(len(p), len(p[0].samples)) for g in groups for p in g.first if p},
        command=command,
        skipped=skipped,
        groups=groups,
        columns=_columns(groups),
        pictures=zip(pictures, svgs, strict=True),
        missing=missing,
        samples=[x for x in samples if x[1]],
        shared=shared,
        differ=differ,
    )
    text = text.replace("\0", "\ufffd")
    # A text cut within a character holds half of one, which UTF-8 has no bytes for.
    (folder / "index.html").write_bytes(text.encode("utf-8", "replace"))
    return f"{folder / 'index.html'}: {len(found)} run(s) in {len(groups)} group(s)"


def _number(x: float, places: int) -> str:
    text = f"{x:.{max(places - 2, 0) if abs(x) >= 100 else places}f}"
    return text.lstrip("-") if not float(text) else text.replace("-", "−")


def _columns(groups: Sequence[Group]) -> list[dict[str, Any]]:
    columns = []
    for m in outcomes.METRICS:
        for key in outcomes.keys_of(groups, m.key):
            name = m.key.removeprefix("eval/")
            title = key.removeprefix("eval/").replace(name, m.column)  # math500/avg@8
            curves = [outcomes.curve(g, key) for g in groups]
            if any(curves):
                columns.append({"title": title, "curves": curves, "metric": m})
    return columns
