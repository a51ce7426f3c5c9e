"""The two files that an evaluation leaves for each set: responses, and scores with every
setting that moves them. Sampling that was stopped goes on, and grading can be repeated."""

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from pfjax.evaluation.scores import Row, Settings, in_order
from pfjax.infra import dataset_io, storage, uploads
from pfjax.tasks import benchmarks
from pfjax.tasks.benchmarks import Style
from pfjax.tasks.problems import Problem

# Sampling may go on with these changed: they do not touch what is drawn, but by rounding.
_MAY_CHANGE = ("model", "mesh", "device", "jax")


class Record:
    """`NAME.jsonl`, the responses to a set (`path`), and `NAME.json` in a folder."""

    def __init__(self, folder: epath.Path, name: str):
        self.name, self._kept = name, []
        self.path = folder / f"{pathlib.PurePath(name).stem}.jsonl"
        self._scores = self.path.with_suffix(".json")

    def begin(self, settings: dict[str, Any]) -> frozenset[int]:
        """Leaves what shall stay of the responses, and their settings.

        Returns:
          Numbers of the prompts whose responses are all there.

        Raises:
          ValueError: if responses there were drawn with other settings.
        """
        settings = json.loads(json.dumps(settings))
        found = dataset_io.read_jsonl(self.path)
        if found and not self._scores.exists():
            raise ValueError(
                f"{self.path} holds responses, but {self._scores.name}, which tells how "
                "they were drawn, is not there: choose another --out"
            )
        old = self._read()["settings"] if found else settings
        changed = [
            f"{k}: {old.get(k)!r} -> {settings.get(k)!r}"
            for k in sorted(old.keys() | settings.keys())
            if k not in _MAY_CHANGE and old.get(k) != settings.get(k)
        ]
        if changed:
            raise ValueError(
                "\n  ".join([f"{self.path} was drawn with other settings:", *changed])
                + "\nchoose another --out, or the settings of before to go on"
            )
        have = collections.Counter(r["prompt_id"] for r in found)
        done = frozenset(q for q, n in have.items() if n == settings["samples"])
        # Of prompts begun, all is drawn anew; a line cut short by a kill goes.
        self._kept = [r for r in found if r["prompt_id"] in done]
        dataset_io.write_jsonl(self.path, self._kept)
        self._write({"set": self.name, "settings": settings})
        return done

    @contextlib.contextmanager
    def adding(self) -> Iterator[Callable[[list[Row]], None]]:
        """What adds rows to the responses, after `begin`."""
        with uploads.growing(self.path, dataset_io.as_jsonl(self._kept)) as add:
            yield lambda new: add(dataset_io.as_jsonl(new))

    def rows(self, problems: list[Problem]) -> list[Row]:
        """The responses to all problems, in order.

        Raises:
          ValueError: if some are missing, or were given to another version of the set.
        """
        found = sorted(dataset_io.read_jsonl(self.path), key=in_order)
        if not found:
            raise ValueError(
                f"{self.path} holds no responses: evaluate without --regrade"
            )
        settings = self._read()["settings"]
        version, k = benchmarks.version_of(problems), settings["samples"]
        if settings["version"] != version:
            raise ValueError(
                f"{self.path} holds responses to version {settings['version']} of "
                f"{self.name}, this is {version}"
            )
        if len(found) != len(problems) * k:
            raise ValueError(
                f"{self.path} holds {len(found)} of {len(problems)} x {k} responses: "
                "the same command without --regrade draws the others"
            )
        return found

    def score(self, graded: list[Row], scores: dict[str, Any]) -> None:
        """Writes what `graded` has in addition, and scores beside the settings."""
        dataset_io.write_jsonl(self.path, graded)
        self._write(self._read() | scores)

    def _read(self) -> dict[str, Any]:
        return storage.read_json(self._scores)

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        storage.write_text(self._scores, text)


def clock_of(folder: epath.Path, names: Iterable[str]) -> str:
    """The time that prompts of the first of these sets were told; "" for none."""
    scores = [(folder / pathlib.PurePath(n).stem).with_suffix(".json") for n in names]
    there = (storage.read_json(x) for x in scores if storage.exists(x))
    found = (content["settings"] for content in there)
    return next((settings.get("clock", "") for settings in found), "")


def describe(
    name: str,
    problems: list[Problem],
    style: Style,
    settings: Settings,
    tok: Any,
    prompts: list[list[int]],
) -> dict[str, Any]:
    """What is stored of a set, of how it is sampled, and of its prompts as token ids."""
    known = benchmarks.BENCHMARKS.get(name)
    return {
        "source": known.source if known else name,
        "items": len(problems),
        "version": benchmarks.version_of(problems),
        "recognised": benchmarks.recognise(problems),
        "template": style.template,
        "chat_template": not style.is_raw,
        "samples": settings.samples_per_prompt,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        **dataclasses.asdict(settings.token_filters),
        "stop_ids": settings.stop_ids,
        "stop_strings": settings.stop_strings,
        "seed": settings.seed,
        "first_prompt": tok.decode(prompts[0]),
        "prompts": dataset_io.fingerprint(prompts),
    }
