r"""What runs changed, on one page: python -m pfjax.report runs/a runs/b --out=report

A RUN is a run's folder, or a folder with runs somewhere below. Runs that differ in the
seed alone are drawn as one, with a band from the least to the greatest. A file
`label.txt` in a run's folder names its group. The page, index.html, needs no network;
its pictures lie beside it as PNG.
"""

import functools
import shlex
import sys
from typing import NamedTuple

from absl import app, flags, logging

_OUT = flags.DEFINE_string("out", "report", "folder to write")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) < 2:
            raise ValueError("give at least one run: a folder that was a --workdir")
        command = f"python -m pfjax.report {shlex.join(sys.argv[1:])}"
        _report(argv[1:], _OUT.value, command)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


class _Measure(NamedTuple):
    key: str  # of evaluations, by its name up to the "@"; or of training steps
    title: str
    explained: str
    places: int = 3


# Columns of the table of numbers; those that no run knows are left out.
_MEASURES = (
    _Measure("avg", "avg", "share of samples that are right, mean over problems"),
    _Measure("maj", "maj", "share of problems whose commonest answer is right"),
    _Measure("pass", "pass", "share of problems with a right one among the samples"),
    _Measure("quality", "quality", "mean judgement of the responses"),
    _Measure("semantic_diversity", "semantic diversity",
             "mean distance between the responses to a prompt"),
    _Measure("length_mean", "length", "mean tokens of a response", 1),
    _Measure("truncated", "truncated", "share of responses cut at max_new_tokens"),
    _Measure("boxed_frac", "boxed", "share of responses with a boxed answer"),
    _Measure("distinct", "distinct", "share of a prompt's responses that differ"),
    _Measure("entropy", "entropy", "of a token, in nats; the first and last step's "
             "training samples"),
    _Measure("kl/policy_base_per_token", "KL to base", "in nats a token; the first and "
             "last step's training samples"),
    _Measure("tb/residual_std_within_prompt", "residual std", "standard deviation of the "
             "residual among a prompt's samples, in nats a token (of tb_traj, rl_traj and "
             "subtb: a response); 0 at the optimum; the first and last step"),
)  # fmt: skip


def _report(paths: list[str], out: str, command: str) -> None:
    from pfjax.infra import storage
    from pfjax.report import charts, outcomes, page, pictures, runs

    found, skipped = runs.load(paths)
    groups = runs.group(found)
    large = pictures.is_large(groups)
    members = [
        page.Member(
            g.name,
            str(i + 1) if large else f"s{i}",
            "seed" + "s" * (len(g.runs) > 1) + " "
            + ", ".join(str(r.config.get("seed", "?")) for r in g.runs),
            g.evaluated[0],
            g.evaluated[-1],
        )
        for i, g in enumerate(groups)
    ]  # fmt: skip
    folder = storage.place(out)
    folder.mkdir(parents=True, exist_ok=True)
    render = functools.partial(
        _render, folder=folder, width=charts.FULL if large else charts.WIDE
    )
    shown = []
    for drawings, missing in (pictures.over_steps(groups), pictures.of_samples(groups)):
        notes = "".join(page.note(m) for m in missing)
        shown.append(page.pictures([render(d) for d in drawings], large) + notes)
    shared, differ = runs.settings(groups)
    counts = [outcomes.moved(g) for g in groups]
    sections = [
        ("numbers", "First and last evaluation", _numbers(groups, members)),
        ("steps", "Over the steps of training", shown[0]),
        ("more", "More samples, more variety", shown[1]),
        ("samples", "Before and after", _samples(groups, members)),
    ]
    if any(counts):
        explained = (
            "Problems by the majority of their samples' answers (a tie counts as right), "
            "and by the share of right samples; first against last evaluation, means over "
            "seeds."
        )
        sections.append(
            ("moved", "Which problems changed",
             page.note(explained) + page.moved(members, counts))
        )  # fmt: skip
    sections.append(("settings", "Settings", page.settings(members, shared, differ)))
    models = {str(r.config["model"]) for r in found}
    of_model = f" in {models.pop()}" if len(models) == 1 else ""
    text = page.document(
        f"What training changed{of_model}",
        _lead(groups),
        command,
        [*_about(found), *_remarks(groups, skipped)],
        sections,
    )
    # A text cut within a character holds half of one, which UTF-8 has no bytes for.
    (folder / "index.html").write_bytes(text.encode("utf-8", "replace"))
    print(f"{folder / 'index.html'}: {len(found)} run(s) in {len(groups)} group(s)")


def _lead(groups) -> str:
    problems = {len(p) for g in groups for p in g.first if p}
    samples = {len(p[0].samples) for g in groups for p in g.first if p}
    number = sum(len(g.runs) for g in groups)
    asked = ""
    if len(problems) == len(samples) == 1:
        asked = (
            f", on {problems.pop()} held-out prompts with {samples.pop()} samples each"
        )
    starts = {g.evaluated[0] for g in groups}
    before = "before training (step 0)" if starts == {0} else "early in training"
    runs_text = "A training run" if number == 1 else f"{number} training runs"
    text = f"{runs_text} of pfjax, evaluated {before} and on the way{asked}."
    if number > len(groups):
        text += (
            " Runs that differ in the seed alone are one group; its numbers are means "
            "over them."
        )
    return text


def _about(found) -> list[str]:
    begun = sorted({r.begun for r in found if r.begun})
    when = f"Begun {begun[0]}" if begun else ""
    if len(begun) > 1:
        when += f" to {begun[-1]}"
    names = dict.fromkeys(name for r in found for name in r.versions)
    versions = ", ".join(
        f"{name} " + "/".join(sorted({str(r.versions.get(name, "?")) for r in found}))
        for name in names
    )
    return [f"{when}. {versions}" if when else versions]


def _remarks(groups, skipped: list[str]) -> list[str]:
    """What a reader has to know of runs that stopped or have only begun."""
    out = []
    if skipped:
        out.append(f"Left out, as not evaluated yet: {', '.join(skipped)}.")
    for g in groups:
        last = max(r["step"] for run in g.runs for r in run.rows)
        if len(g.evaluated) == 1:
            out.append(f"{g.name}: only one evaluation so far, at {g.evaluated[0]}.")
        elif last > g.evaluated[-1] and len(g.runs) > 1:
            out.append(
                f"{g.name}: up to step {g.evaluated[-1]}, the last that all of its seeds "
                "were evaluated at."
            )
    return out


def _numbers(groups, members) -> str:
    from pfjax.report import outcomes, page

    columns = []
    for measure in _MEASURES:
        keys = outcomes.keys_of(groups, measure.key)
        for key in keys or [measure.key]:
            values = [outcomes.first_and_last(g, key) for g in groups]
            # avg@8 of math500; length
            head = key.removeprefix("eval/").replace(measure.key, measure.title)
            if any(values):
                columns.append(
                    page.Column(head, measure.explained, values, measure.places)
                )
    text = "Each cell: the first value, and below it the last."
    if any(len(g.runs) > 1 for g in groups):
        text += " ± is the standard deviation over a group's seeds."
    return page.note(text) + page.numbers(members, columns)


def _samples(groups, members) -> str:
    from pfjax.report import outcomes, page, pictures

    changed, unchanged = (4, 2) if not pictures.is_large(groups) else (2, 1)
    shown = [outcomes.telling(g, changed, unchanged) for g in groups]
    if not any(shown):
        return page.note("No samples: the runs' folders hold no completions of both.")
    text = (
        "Prompts whose share of right samples changed the most, then some where it did "
        "not; of each the first sample with the commoner verdict, of the group's first "
        "seed."
    )
    if not any(p.share_right is not None for s in shown for pair in s for p in pair):
        text = "The first prompts, and the first sample of each; answers are not known."
    filled = [(m, s) for m, s in zip(members, shown, strict=True) if s]
    empty = [m.name for m, s in zip(members, shown, strict=True) if not s]
    if empty:
        text += f" Without completions of both evaluations: {'; '.join(empty)}."
    return page.note(text) + "\n".join(
        page.samples(m, s, is_open=i == 0) for i, (m, s) in enumerate(filled)
    )


def _render(drawing, folder, width: float):
    """Draws for screens and phones, and writes the PNG."""
    from pfjax.report import charts, page

    wide = drawing.draw(width)
    alt = f"{drawing.title}. {drawing.caption}"
    picture = page.Picture(
        drawing.name,
        drawing.title,
        drawing.caption,
        charts.to_svg(wide, f"{drawing.name}-wide", alt),
        charts.to_svg(drawing.draw(charts.NARROW), f"{drawing.name}-narrow", alt),
    )
    png = charts.to_png(wide, drawing.title, drawing.caption)
    (folder / f"{drawing.name}.png").write_bytes(png)
    return picture


if __name__ == "__main__":
    app.run(main)
