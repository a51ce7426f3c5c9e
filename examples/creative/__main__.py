r"""Diversity and quality of responses: python -m examples.creative scores/creative --judge="..."

Scores what `python -m pfjax.evaluate --benchmark=poem,story,joke --out=scores/creative`
sampled: adds the diversity of the responses to each prompt, and with --judge their quality, to
NAME.json of every set there whose prompts have no answers. The judge is a command that reads
requests from its standard input and writes judgements to its output, JSON lines both; the same
command goes on where it was stopped.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from examples.creative import diversity, judge
from pfjax.infra import dataset_io

_EMBEDDER = flags.DEFINE_string(
    "embedder", "auto", "of semantic diversity: a sentence-transformers model or folder, "
    "lexical, or auto: one that is installed, else lexical"
)  # fmt: skip
_JUDGE = flags.DEFINE_string("judge", "", "command that judges the responses")
_RUBRIC = flags.DEFINE_string("rubric", "", "creative or joke; default: as the set")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) < 2:
            raise ValueError("give a folder that was --out of python -m pfjax.evaluate")
        for name in argv[1:]:
            score_folder(
                pathlib.Path(name), _EMBEDDER.value, _JUDGE.value, _RUBRIC.value
            )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def score_folder(
    folder: pathlib.Path, embedder: str, command: str, rubric: str
) -> None:
    """Adds scores to each set without answers, and prints them.

    Raises:
      ValueError: if the folder has no such set, or one was not sampled to its end.
    """
    embed = diversity.load_embedder(embedder)
    num_scored = 0
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        rows = dataset_io.read_jsonl(path.with_suffix(".jsonl"))
        if "scores" not in found or any(r["gold"] is not None for r in rows):
            continue
        num_samples = found["settings"]["samples"]
        if len(rows) != found["settings"]["items"] * num_samples:
            raise ValueError(
                f"{path.with_suffix('.jsonl')} holds {len(rows)} responses, not "
                f"{found['settings']['items']} x {num_samples}: evaluate again"
            )
        values, about = {}, {}
        if num_samples > 1:
            texts = [r["completion"] for r in rows]
            groups = [
                texts[i : i + num_samples] for i in range(0, len(texts), num_samples)
            ]
            values |= diversity.diversity_scores(groups, embed)
            about["embedder"] = embed.name
        if command:
            chosen = rubric or ("joke" if path.stem == "joke" else "creative")
            values |= _quality(path, rows, command, chosen)
            about["judge"] = {"command": command, "rubric": chosen}
        _add(path, found, values, about)
        num_scored += 1
    if not num_scored:
        raise ValueError(
            f"{folder} holds no scores of prompts without answers: run python -m "
            f"pfjax.evaluate --benchmark=poem,story,joke --out={folder} first"
        )


def _quality(
    path: pathlib.Path, rows: list[judge.Row], command: str, rubric: str
) -> dict[str, float]:
    requests = path.with_suffix(".requests.jsonl")
    judgements = path.with_suffix(".judgements.jsonl")
    judge.write_requests(requests, rows, rubric)
    judge.run_command(command, requests, judgements)
    return judge.quality(judge.read_judgements(judgements, requests), rows)


def _add(
    path: pathlib.Path,
    found: dict[str, Any],
    values: dict[str, float],
    about: dict[str, Any],
) -> None:
    found["scores"] |= values
    found["graded"] |= about
    tmp = path.with_suffix(".tmp")
    tmp.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    tmp.replace(path)
    print(f"{path}:")
    for name, value in values.items():
        if not name.endswith("_se"):
            error = values.get(f"{name}_se")
            print(f"  {name:20} {value:9.4f}" + (f" +- {error:.4f}" if error else ""))


if __name__ == "__main__":
    app.run(main)
