"""Completions packed for the page: as many prompts and evaluations as there is room for."""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pfjax.report import runs
from pfjax.report.runs import Key, Problem, Run


class Packed(NamedTuple):
    text: str  # JSON, gzip, base64; "" if there is nothing
    left_out: str  # a sentence, "" if nothing was
    has_math: bool


Evaluation = tuple[int, int, list[Problem]]  # run, step, and what was said


def pack(found: Sequence[Run], room: int) -> Packed:
    """Packs all samples of the runs' completions into `room` bytes.

    First comes what is compared, the first and the last evaluation of each run, of as
    many prompts as fit; then the evaluations between them, run by run.
    """
    ends = {(i, s) for i, r in enumerate(found) for s in _ends(r)}
    between = [(i, s) for i, r in enumerate(found) for s in sorted(r.completions)]
    between = [x for x in between if x not in ends]
    kept = [(i, s, runs.read_problems(found[i], s)) for i, s in sorted(ends)]
    keys = list(dict.fromkeys(p.key for _, _, mine in kept for p in mine))
    if not keys:
        return Packed("", "", False)
    shown = keys
    while len(text := _pack(kept, shown)) > room and shown:
        shown = shown[: int(len(shown) * min(0.95 * room / len(text), 0.95))]
    if not shown:
        return Packed("", "The completions are too long to be shown here.", False)
    num_more, used = 0, len(text)
    for i, step in between:
        more = (i, step, runs.read_problems(found[i], step))
        used += len(_pack([more], shown))  # alone it takes more than among others
        if used > room:
            break
        kept.append(more)
        num_more += 1
    text = _pack(kept, shown) if num_more else text
    left_out = []
    if len(shown) < len(keys):
        left_out.append(f"{len(keys) - len(shown)} of {len(keys)} prompts")
    if num_more < len(between):
        left_out.append(
            f"{len(between) - num_more} of {len(between)} evaluations between first and last"
        )
    said = f"Left out to keep the page small: {' and '.join(left_out)}." * bool(
        left_out
    )
    return Packed(text, said, _has_math(kept))


def _ends(run: Run) -> set[int]:
    return {min(run.completions), max(run.completions)} if run.completions else set()


def _pack(kept: Sequence[Evaluation], shown: Sequence[Key]) -> str:
    number = {key: i for i, key in enumerate(shown)}
    golds: dict[Key, Any] = {}
    evaluations = []
    for run, step, problems in sorted(kept, key=lambda e: e[:2]):
        samples = {}
        for p in problems:
            if p.key in number:
                golds.setdefault(p.key, p.samples[0]["gold"])
                samples[number[p.key]] = [_sample(r) for r in p.samples]
        evaluations.append({"run": run, "step": step, "samples": samples})
    prompts = [{"text": whole(k[1]), "gold": golds.get(k), "set": k[2]} for k in shown]
    out = json.dumps({"prompts": prompts, "evaluations": evaluations})
    return base64.b64encode(gzip.compress(out.encode(), mtime=0)).decode()


def _sample(row: dict[str, Any]) -> list[Any]:
    text = whole(row["completion"])
    return [text, row["tokens"], row["terminated"], row["answer"], row["correct"]]


def whole(text: str) -> str:
    """A text cut within a character holds half of one, which no page can show."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _has_math(kept: Sequence[Evaluation]) -> bool:
    texts = (
        text
        for _, _, problems in kept
        for p in problems
        for text in (p.key[1], *(r["completion"] for r in p.samples))
    )
    return any("\\" in text or "$" in text for text in texts)
