"""Writes the page of a report: `page.html` with its styles, scripts and data inside."""

import base64
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from pfjax.infra import storage
from pfjax.report import charts, outcomes, runs, samples
from pfjax.report.runs import Group

_HERE = pathlib.Path(__file__).parent
_ROOM_FOR_SAMPLES = 2_200_000  # bytes, of a page below 3 MB
_TILES = ("avg", "maj", "quality", "length", "distinct", "residual", "tokens/s", "time")


def write(paths: Sequence[str], out: str, command: str = "") -> str:
    """Writes index.html; returns a line that says so.

    Args:
      paths: folders of runs, see `runs.load`.
      out: folder, local or `gs://`.
      command: what made the page, for its end.
    """
    folder = storage.place(out)
    storage.check_writable(folder)
    found = runs.load(paths)
    text = render(found, command)
    storage.write_text(folder / "index.html", text)
    groups = len(runs.group(found))
    return f"{folder / 'index.html'}: {len(found)} run(s) in {groups} group(s)"


def render(found: Sequence[runs.Run], command: str = "", version: str = "") -> str:
    """The page of runs; one with a version asks its server for a newer one."""
    groups = runs.group(found)
    ordered = [run for g in groups for run in g.runs]
    drawn, missing = charts.draw(groups)
    packed = samples.pack(ordered, _ROOM_FOR_SAMPLES)
    columns = _columns(groups)
    shared, differ = runs.settings(groups)
    models = {str(run.config.get("model")) for run in found}
    has_math = packed.has_math
    scripts = ["vendor/uPlot.iife.min.js"] + ["vendor/katex.min.js"] * has_math
    scripts += ["charts.js", "table.js"]
    scripts += ["math.js", "browser.js"] * bool(packed.text)
    scripts += ["watch.js"] * bool(version)
    env = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = env.from_string((_HERE / "page.html").read_text("utf-8")).render(
        title="What training changed"
        + (f" in {min(models)}" if len(models) == 1 else ""),
        about=_about(groups),
        tiles=[_tile(c) for name in _TILES for c in columns if _is(c, name)],
        groups=groups,
        has_seeds=len(found) > len(groups),
        charts=drawn,
        missing=missing,
        columns=columns,
        samples=packed.text,
        left_out=packed.left_out,
        has_math=has_math,
        shared=shared,
        differ=differ,
        command=command,
        versions={", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in found},
        styles=_styles(has_math),
        scripts=[(_HERE / name).read_text("utf-8") for name in scripts],
        data={
            "groups": [{"name": g.name} for g in groups],
            "runs": [_name(g, run) for g in groups for run in g.runs],
            "charts": drawn,
            "version": version,
        },
    )
    return samples.whole(text)


def _styles(has_math: bool) -> str:
    vendor = _HERE / "vendor"
    styles = [(vendor / "uPlot.min.css").read_text("utf-8")]
    if has_math:
        styles.append(
            re.sub(
                r"@font-face\{.*?\}",
                _font,
                (vendor / "katex.min.css").read_text("utf-8"),
            )
        )
    return "\n".join([*styles, (_HERE / "page.css").read_text("utf-8")])


def _font(rule: re.Match) -> str:
    """A font with its bytes; nothing for those that mathematics rarely needs."""
    name = re.search(r"fonts/(\S+?\.woff2)", rule[0])[1]
    path = _HERE / "vendor" / name
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    source = f'src:url(data:font/woff2;base64,{data}) format("woff2")}}'
    return re.sub(r"src:.*", lambda _: source, rule[0])


def _about(groups: Sequence[Group]) -> str:
    number = sum(len(g.runs) for g in groups)
    text = f"{number} training run{'s' * (number > 1)} of pfjax"
    if number > len(groups):
        text += f" in {len(groups)} group{'s' * (len(groups) > 1)} that differ in more"
        text += " than the seed; numbers are means over seeds"
    sizes = {(len(p), len(p[0].samples)) for g in groups for p in g.last if p}
    if len(sizes) == 1:
        text += ", evaluated on {} held-out prompts with {} samples each".format(
            *min(sizes)
        )
    text += f". The first is {groups[0].name}." if len(groups) > 1 else "."
    return text


def _name(group: Group, run: runs.Run) -> str:
    seed = f", seed {run.config.get('seed')}" if len(group.runs) > 1 else ""
    return f"{group.name}{seed} ({run.folder.name})"


def _is(column: dict[str, Any], name: str) -> bool:
    return column["title"].partition("@")[0] == name and bool(
        column["cells"][0]["value"]
    )


def _tile(column: dict[str, Any]) -> dict[str, Any]:
    """What the first group came to."""
    cell = column["cells"][0]
    return {"name": column["title"], "about": column["about"], **cell}


def _columns(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The table of runs, column by column."""
    columns = []
    for m in outcomes.METRICS:
        for key in outcomes.keys_of(groups, m.key):
            curves = [outcomes.curve(g, key) for g in groups]
            if not any(curves):
                continue
            if not m.key.startswith("eval/"):
                smooth = lambda c: outcomes.smooth(c, outcomes.window(len(c.x)))
                curves = [c and smooth(c) for c in curves]
            name = m.key.removeprefix("eval/")
            title = key.removeprefix("eval/").replace(name, m.column)  # math500/avg@8
            last = [c and c.mean[-1] for c in curves]
            known = [round(v, m.places) for v in last if v is not None]
            best = {"greatest": max, "least": min}.get(m.best, lambda _: None)(known)
            if len(known) < 2 or len(set(known)) < 2:
                best = None
            cells = [_cell(c, m.places, best) for c in curves]
            columns.append(
                {"title": title, "about": m.description(key).about, "cells": cells}
            )
    return columns + _costs(groups)


_NOTHING = {"value": "", "text": "—", "spread": "", "change": "", "is_best": False}


def _cell(c: outcomes.Curve | None, places: int, best: float | None) -> dict[str, Any]:
    if c is None:
        return _NOTHING
    last, change = float(c.mean[-1]), float(c.mean[-1] - c.mean[0])
    return {
        "value": f"{last:.6g}",
        "text": _number(last, places),
        "spread": "" if c.spread is None else f"±{_number(c.spread[-1], places)}",
        "change": _number(change, places, "+") if len(c.x) > 1 else "",
        "is_best": best is not None and round(last, places) == best,
    }


def _costs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Throughput, hours and devices: what a run of each group took."""
    about = {
        "tokens/s": "response tokens per second of a step, median over steps",
        "time": "of steps and evaluations, per run",
        "devices": "how many, and of which kind",
    }
    fact = lambda value, text: _NOTHING | {"value": value, "text": text}
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in about}
    for g in groups:
        speeds = [v for run in g.runs if (v := _median_speed(run)) is not None]
        speed, hours = (
            np.mean(speeds or [0.0]),
            np.mean([_hours(run) for run in g.runs]),
        )
        known = fact(f"{speed:.6g}", f"{speed:,.0f}")
        cells["tokens/s"].append(known if speeds else _NOTHING)
        text = f"{hours:.1f} h" if hours >= 0.1 else f"{hours * 60:.1f} min"
        cells["time"].append(fact(f"{hours:.6g}", text) if hours else _NOTHING)
        devices = " / ".join(dict.fromkeys(_devices(run) for run in g.runs))
        cells["devices"].append(fact(devices, devices))
    return [{"title": k, "about": about[k], "cells": v} for k, v in cells.items()]


def _median_speed(run: runs.Run) -> float | None:
    speeds = [r["perf/tokens_per_s"] for r in run.rows if "perf/tokens_per_s" in r]
    return float(np.median(speeds)) if speeds else None


def _hours(run: runs.Run) -> float:
    last = {r["step"]: r for r in run.rows}.values()
    seconds = (r.get("time/step", 0) + r.get("time/eval", 0) for r in last)
    return sum(seconds) / 3600


def _devices(run: runs.Run) -> str:
    kind, number = run.versions.get("backend", "—"), run.versions.get("devices")
    return f"{number} x {kind}" if number else kind


def _number(x: float, places: int, sign: str = "") -> str:
    text = f"{x:{sign}.{max(places - 2, 0) if abs(x) >= 100 else places}f}"
    return text.lstrip("+-") if not float(text) else text.replace("-", "−")
