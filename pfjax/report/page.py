"""One page of HTML from the parts of a report: no scripts, nothing fetched.

Whatever a model, a config or a person wrote is escaped here and nowhere else.
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from pfjax.report.outcomes import Moved, Value
from pfjax.report.runs import Problem

_LONG = 600  # characters of a text, past which it is folded


class Picture(NamedTuple):
    name: str
    title: str
    caption: str
    wide: str  # SVG
    narrow: str  # SVG for phones


class Column(NamedTuple):
    """Of the table of numbers; a pair of values (first, last) or None a group."""

    title: str
    explained: str
    values: list[tuple[Value, Value] | None]
    places: int = 3  # decimals of numbers below 100


class Member(NamedTuple):
    """A group, as tables name it."""

    name: str
    mark: str  # "s0": the variable of its colour in pictures; or its number there
    seeds: str  # "seeds 0, 1"
    first: int  # steps
    last: int


def document(
    title: str,
    lead: str,
    command: str,
    about: Sequence[str],
    sections: Sequence[tuple[str, str, str]],
) -> str:
    """The page.

    Args:
      title, lead, command: text.
      about: lines of text about when and with what it was made.
      sections: anchor, heading, and HTML of this module's functions.
    """
    links = "\n".join(
        f'<a href="#{a}">{escape(heading)}</a>' for a, heading, _ in sections
    )
    body = "\n".join(
        f'<section id="{a}">\n<h2>{escape(heading)}</h2>\n{content}\n</section>'
        for a, heading, content in sections
    )
    lines = "<br>\n".join(escape(x) for x in about)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        f'<pre class="command">{escape(command)}</pre>\n<p class="note">{lines}</p>\n'
        f"<nav>\n{links}\n</nav>\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def numbers(members: Sequence[Member], columns: Sequence[Column]) -> str:
    """First and last values of every group."""
    head = "".join(
        f'<th scope="col" title="{escape(c.explained)}">{escape(c.title)}</th>'
        for c in columns
    )
    rows = []
    for i, member in enumerate(members):
        cells = "".join(
            f'<td data-label="{escape(c.title)}">{_cell(c.values[i], c.places)}</td>'
            for c in columns
        )
        steps = f"step {member.first}"
        if member.last != member.first:
            steps += f' <span class="arrow">→</span> {member.last}'
        rows.append(
            f"<tr>{_name(member, f'{escape(member.seeds)} · {steps}')}{cells}</tr>"
        )
    explained = "".join(
        f"<dt>{escape(c.title)}</dt><dd>{escape(c.explained)}</dd>" for c in columns
    )
    return (
        f"{_table('numbers', head, rows)}\n"
        "<details><summary>What the columns say</summary>"
        f"<dl>{explained}</dl></details>"
    )


def _cell(pair: tuple[Value, Value] | None, places: int) -> str:
    if pair is None:
        return '<span class="none">—</span>'
    first, last = (show_value(v, places) for v in pair)
    return (
        f'<span class="first">{first}</span>'
        f'<span class="last"><span class="arrow">→</span> {last}</span>'
    )


def show_value(value: Value, places: int) -> str:
    """`0.990 ±.004`"""
    if abs(value.mean) >= 100:
        places = max(places - 2, 0)
    text = f"{value.mean:.{places}f}"
    text = text.lstrip("-") if not float(text) else text.replace("-", "−")
    if value.spread is not None:
        spread = f"{value.spread:.{places}f}"
        text += f'<span class="spread"> ±{spread.removeprefix("0")}</span>'
    return text


def _name(member: Member, below: str = "") -> str:
    below = f'<span class="below">{below}</span>' if below else ""
    mark = f'<span class="mark">{member.mark}</span>'
    if member.mark.startswith("s"):
        mark = f'<span class="mark" style="color: var(--{member.mark})">●</span>'
    return (
        f'<th scope="row">{mark}<span class="who">{escape(member.name)}{below}</span>'
        "</th>"
    )


def _table(kind: str, head: str, rows: Sequence[str]) -> str:
    return (
        f'<div class="table"><table class="{kind}">\n<thead><tr><th scope="col">group'
        f"</th>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def pictures(drawn: Sequence[Picture], is_large: bool) -> str:
    figures = "\n".join(
        f'<figure id="{p.name}">\n<figcaption><h3>{escape(p.title)}</h3>'
        f"<p>{escape(p.caption)}</p></figcaption>\n"
        f'<div class="wide">{p.wide}</div>\n<div class="narrow">{p.narrow}</div>\n'
        "</figure>"
        for p in drawn
    )
    return f'<div class="pictures{" large" * is_large}">\n{figures}\n</div>'


def moved(members: Sequence[Member], counts: Sequence[Moved | None]) -> str:
    """How many problems changed sides, a row a group."""
    titles = (
        "wrong → right", "right → wrong", "stayed right", "stayed wrong",
        "share rose", "share fell", "share stayed",
    )  # fmt: skip
    head = "".join(f'<th scope="col">{t}</th>' for t in titles)
    rows = []
    for member, found in zip(members, counts, strict=True):
        values = ["—"] * len(titles) if found is None else [f"{x:.3g}" for x in found]
        cells = "".join(
            f'<td data-label="{t}">{v}</td>'
            for t, v in zip(titles, values, strict=True)
        )
        rows.append(f"<tr>{_name(member)}{cells}</tr>")
    return _table("moved", head, rows)


def settings(
    members: Sequence[Member], shared: dict[str, str], differ: dict[str, list[str]]
) -> str:
    """What differs between groups, the usual values pale; and, folded, what does not."""
    out = ""
    if differ:
        head = "".join(f'<th scope="col">{escape(k)}</th>' for k in differ)
        rows = []
        for i, member in enumerate(members):
            cells = "".join(
                f'<td data-label="{escape(k)}" class="{_kind(v, i)}">{escape(v[i])}</td>'
                for k, v in differ.items()
            )
            rows.append(f"<tr>{_name(member)}{cells}</tr>")
        out = _table("settings", head, rows)
    pairs = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in shared.items()
    )
    return (
        f"{out}\n<details><summary>Settings that all groups share ({len(shared)})"
        f'</summary><dl class="shared">{pairs}</dl></details>'
    )


def _kind(values: Sequence[str], i: int) -> str:
    commonest = max(values, key=values.count)
    is_usual = values[i] == commonest and values.count(commonest) > 1
    return "usual" if is_usual else "own"


def samples(
    member: Member, shown: Sequence[tuple[Problem, Problem]], is_open: bool
) -> str:
    """Responses to some prompts, before and after."""
    blocks = "\n".join(_problem(member, *pair) for pair in shown)
    return (
        f'<details class="group"{" open" * is_open}><summary>{escape(member.name)}: '
        f"{len(shown)} prompts</summary>\n{blocks}\n</details>"
    )


def _problem(member: Member, before: Problem, after: Problem) -> str:
    gold = before.samples[0]["gold"]
    facts = ""
    if before.share_right is not None:
        n = len(before.samples), len(after.samples)
        right = round(before.share_right * n[0]), round(after.share_right * n[1])
        facts = (
            f'<p class="facts">right answer {escape(str(gold))} · right in '
            f"{right[0]} of {n[0]} samples "
            f'<span class="arrow">→</span> {right[1]} of {n[1]}</p>'
        )
    sides = _side(f"before (step {member.first})", before) + _side(
        f"after (step {member.last})", after
    )
    return (
        f'<article>\n<div class="prompt">{_text(before.key[1])}</div>{facts}\n'
        f'<div class="pair">{sides}</div>\n</article>'
    )


def typical(problem: Problem) -> dict:
    """The first sample whose verdict is that of most samples; of a tie, the first."""
    if problem.share_right is None or problem.share_right == 0.5:
        return problem.samples[0]
    verdict = problem.share_right > 0.5
    return next(r for r in problem.samples if r["correct"] == verdict)


def _side(when: str, problem: Problem) -> str:
    row = typical(problem)
    verdict = ""
    if row["correct"] is not None:
        kind, sign = ("right", "✓") if row["correct"] else ("wrong", "✗")
        why = ", no answer" * (row["answer"] is None)
        verdict = f'<span class="{kind}">{sign} {kind}{why}</span> · '
    cut = "" if row["terminated"] else ", cut"
    return (
        f'<div class="side"><p class="when"><b>{when}</b> {verdict}sample '
        f"{row['sample']}, {row['tokens']} tokens{cut}</p>{_text(row['completion'])}</div>"
    )


def _text(text: str) -> str:
    """As it stands, wrapped; folded when long."""
    text = text.replace("\0", "\ufffd")
    if not text.strip():
        return '<pre class="none">(empty)</pre>'
    # A line break right after <pre> is dropped by browsers: one more keeps the text's.
    whole = f"<pre>\n{escape(text)}</pre>"
    if len(text) <= _LONG and text.count("\n") < 15:
        return whole
    start = " ".join(text[:160].split())
    return (
        f'<details class="long"><summary>{escape(start)} …</summary>{whole}</details>'
    )


_STYLE = """\
:root {
  color-scheme: light dark;
  --paper: #fefefe; --ink: #24292f; --muted: #5b6570; --grid: #e3e6ea; --rest: #b9c0c8;
  --card: #f6f7f9; --right: #1a6b3c; --wrong: #a8321e;
  --s0: #1141ad; --s1: #c76a00; --s2: #429882; --s3: #63123b; --s4: #a473ee; --s5: #72510d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e7eb; --muted: #a3acb8; --grid: #2c323a; --rest: #59626e;
    --card: #1d2127; --right: #6fd39a; --wrong: #ff9d88;
    --s0: #88b0fe; --s1: #d9822b; --s2: #85ffde; --s3: #fe6c91; --s4: #a06bdb; --s5: #f6c343;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 1200px;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: break-word;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 3.2rem 0 .8rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .5rem 0; max-width: 46rem; }
pre {
  margin: 0; white-space: pre-wrap;
  font: 13px/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.lead { font-size: 1.1rem; }
.note, .facts, .when, .below, figcaption p { color: var(--muted); font-size: .875rem; }
.command { background: var(--card); padding: .6rem .8rem; border-radius: 6px; margin: 1rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: 1.2rem; font-size: .9rem; }
a { color: var(--s0); text-underline-offset: .2em; }
summary { cursor: pointer; }
details > summary { color: var(--ink); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; line-height: 1.35; }
th, td { padding: .5rem .35rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; }
thead th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; min-width: 11rem; font-weight: 600; }
.below { display: block; font-weight: 400; font-size: .8rem; }
tbody th { padding-left: 0; }
.mark { float: left; width: 1.5rem; color: var(--muted); font-weight: 400; }
.who { display: block; overflow: hidden; overflow-wrap: break-word; }
.settings td { overflow-wrap: anywhere; min-width: 5rem; }
.first, .last { display: block; white-space: nowrap; }
.first, .none, .usual, .arrow { color: var(--muted); }
.spread { color: var(--muted); font-size: .72rem; }
.last .arrow { display: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem;
  font-size: .875rem; margin: .8rem 0; }
dt { font-weight: 500; }
dd { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2.5rem 2.2rem; }
.pictures.large { grid-template-columns: minmax(0, 1fr); }
figure { margin: 0; min-width: 0; }
figcaption p { margin: .1rem 0 .8rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.narrow { display: none; }
details.group { border-top: 1px solid var(--grid); padding: .7rem 0; }
details.group > summary { font-weight: 600; }
article { margin: 1.2rem 0 1.8rem; }
.prompt pre { font-weight: 600; }
.facts { margin: .2rem 0 .6rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
.side { background: var(--card); border-radius: 6px; padding: .6rem .8rem; min-width: 0; }
.when { margin: 0 0 .4rem; }
.when b { color: var(--ink); font-weight: 600; margin-right: .4rem; }
.right { color: var(--right); font-weight: 600; }
.wrong { color: var(--wrong); font-weight: 600; }
.long > summary { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.long[open] > summary { color: var(--muted); margin-bottom: .4rem; }
@media (max-width: 1000px) { .pictures { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 700px) {
  body { padding: 1.5rem .75rem 3rem; }
  h1 { font-size: 1.5rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .narrow svg { max-width: 440px !important; }
  .pair { grid-template-columns: minmax(0, 1fr); gap: .6rem; }
  table, tbody, tr, th, td { display: block; width: 100%; }
  thead { display: none; }
  tr { padding: .6rem 0; border-bottom: 1px solid var(--grid); }
  th, td { border: 0; padding: .1rem 0; }
  td { display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-label); color: var(--muted); text-align: left; }
  td > .first { margin-left: auto; }
  td { gap: .4rem; }
  .last .arrow { display: inline; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print { details > * { display: block; } }
"""
