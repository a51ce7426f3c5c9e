"""Sets of problems: where they come from and how they are asked.

A set of `BENCHMARKS` is read from the hub, or from a copy in a folder; any other name is a
file or data set. Rows of all are read by `problems.from_row`, as those of training are.
"""

import difflib
import hashlib
import itertools
import logging
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pfjax.infra import dataset_io, storage
from pfjax.tasks.problems import (
    BY_THEMSELVES,
    Fields,
    Problem,
    check_fields,
    from_row,
    id_of,
    text_of,
)

_LOG = logging.getLogger(__name__)


class Benchmark(NamedTuple):
    source: str  # as in `dataset_io.read`; "": none, of creative prompts
    size: int  # items that published scores are over; 0: as many as there are
    problem: Callable[[str, dict[str, Any], int, int], Problem]  # see `from_row`
    aliases: tuple[str, ...] = ()  # names of copies, beside its own
    contents: tuple[str, ...] = ()  # see `recognise`; one per wording in circulation


class Style(NamedTuple):
    """How a question becomes a prompt."""

    template: str  # "{question}" is replaced; no other brace means anything
    is_raw: bool = False  # no chat template is put around it
    stop_strings: tuple[str, ...] = ()  # where a base model runs on to another problem


_NEXT_PROBLEM = ("\nProblem:", "\nQuestion:", "\nHuman:")

STYLES: dict[str, Style] = {
    # As EMPO's training prompts, and those of configs/reasoning.py.
    "boxed": Style(
        "{question} Let's think step by step and output the final answer within "
        "\\boxed{}."
    ),
    # Qwen2.5-Math's, for base models too; tokens end it.
    "qwen25-math-cot": Style(
        "<|im_start|>system\nPlease reason step by step, and put your final answer "
        "within \\boxed{}.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n",
        is_raw=True,
    ),
    # Power sampling's (arXiv 2510.14901), whose release leaves the braces double.
    "power-sampling": Style(
        "Can you solve the following math problem? {question} Please reason step by "
        "step, and put your final answer within \\boxed{{}}.",
        is_raw=True,
        stop_strings=_NEXT_PROBLEM,
    ),
    "minerva": Style(  # without its four examples
        "Problem:\n{question}\n\nSolution:", is_raw=True, stop_strings=_NEXT_PROBLEM
    ),
    "question": Style("{question}"),
}


def read(
    name: str, folder: str = "", seed: int = 0, fields: Fields = BY_THEMSELVES
) -> list[Problem]:
    """The problems of a set.

    Args:
      name: of `BENCHMARKS`, or a source of `dataset_io.read`.
      folder: with local copies of sets, `<name>.<suffix>` or `<name>/test.<suffix>`, the
        suffix one of `dataset_io.FILES`; "" for the hub.
      seed: of the order of choices, where there are any.
      fields: see `from_row`; not for those of `BENCHMARKS`.

    Raises:
      ValueError: if there is no such set, or a row is not of its form (naming it).
    """
    problems = [problem for _, problem in read_rows(name, folder, seed, fields)]
    if name not in BENCHMARKS:
        check_fields(fields, problems)
        stem = pathlib.PurePath(name).stem
        named = next((k for k in BENCHMARKS if _is_named(k, stem)), "")
        _check_content(named, problems)
    return problems


def read_rows(
    name: str, folder: str = "", seed: int = 0, fields: Fields = BY_THEMSELVES
) -> list[tuple[str, Problem]]:
    """As `read`, each problem with where it stands, for messages."""
    known = BENCHMARKS.get(name)
    if known is None:
        is_bare = re.fullmatch(r"[\w-]+", name) and not storage.exists(name)
        if is_bare:
            near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{', '.join(BENCHMARKS)}"
            raise ValueError(
                f"no benchmark {name!r}, file or data set (owner/name) of the hub; {hint}"
            )
        found = enumerate(dataset_io.read(name))
        rows = [
            (where, from_row(where, row, i, 0, fields)) for i, (where, row) in found
        ]
        _check_choices(name, [problem for _, problem in rows])
        return rows
    source = _source_of(name, known, folder)
    out = []
    for i, (where, row) in enumerate(dataset_io.read(source)):
        try:
            out.append((where, known.problem(where, row, i, seed)))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{where} is not of the form of {name}: {error!r} in {sorted(row)}"
            ) from error
        if known.source and out[-1][1].gold is None:
            raise ValueError(f"{where} has no answer, in {sorted(row)}")
    if known.size and len(out) != known.size:
        found = f"{source} has {len(out)} items"
        _LOG.warning(f"{found}, published scores are over {known.size}")
    _check_content(name, [problem for _, problem in out])
    return out


def _source_of(name: str, known: Benchmark, folder: str) -> str:
    """Where a set of `BENCHMARKS` is read from."""
    source = known.source
    if folder:
        stems = [x + y for x in (name, *known.aliases) for y in ("", "/test")]
        files = [stem + suffix for stem in stems for suffix in dataset_io.FILES]
        places = (storage.place(folder) / file for file in files)
        source = next((str(p) for p in places if storage.exists(p)), None)
        if source is None:
            raise ValueError(f"{folder} has none of {files}")
    if not source:
        raise ValueError(
            f"the prompts of {name!r} are on no hub: name a file of yours instead, "
            f"DIR/{name}.jsonl, one object with a `prompt` per line (--data=DIR of "
            "pfjax evaluate)"
        )
    return source


def name_of(source: str) -> str:
    """What a set is called by: `math500`, `problems` for problems.jsonl, `MATH-500` for
    HuggingFaceH4/MATH-500:test.

    >>> name_of("HuggingFaceH4/MATH-500@main:test"), name_of("~/sets/my.jsonl")
    ('MATH-500', 'my')
    """
    if pathlib.PurePath(source).suffix.lower() not in dataset_io.FILES:
        return re.split("[:@]", source)[0].rstrip("/").rpartition("/")[2]
    return pathlib.PurePath(source).stem


def version_of(problems: list[Problem]) -> str:
    """Tells one version of a set from another, by what is asked and graded."""
    return dataset_io.fingerprint([problem[:4] for problem in problems])


def recognise(problems: list[Problem]) -> str | None:
    """The set of `BENCHMARKS` that these questions are, whatever file they came from.

    Compared are the letters and digits of all questions, in any order.
    """
    plain = [re.sub(r"[^a-z0-9]", "", text_of(p).lower()) for p in problems]
    content = hashlib.sha256("\n".join(sorted(plain)).encode()).hexdigest()[:10]
    return next((k for k, b in BENCHMARKS.items() if content in b.contents), None)


def _is_named(benchmark: str, stem: str) -> bool:
    names = (benchmark, *BENCHMARKS[benchmark].aliases)
    return stem.lower() in {name.lower() for name in names}


def _check_content(name: str, problems: list[Problem]) -> None:
    """Warns if a set that is called by the name of a benchmark holds other questions."""
    known, found = BENCHMARKS.get(name), recognise(problems)
    if known and known.contents and found != name:
        what = f"those of {found}" if found else f"no wording of {name} known here"
        _LOG.warning(
            f"the {len(problems)} questions read as {name} are {what}: their scores are "
            f"not comparable with published ones of {name}"
        )


def _check_choices(name: str, problems: list[Problem]) -> None:
    """Warns of choices in a column of their own, which the question does not show."""
    for problem, column in itertools.product(problems, ("choices", "options")):
        texts = problem.columns.get(column)
        if isinstance(texts, dict):  # ARC's, or texts by their letters
            texts = texts.get("text", [*texts.values()])
        is_some = isinstance(texts, list) and all(isinstance(x, str) for x in texts)
        if is_some and not all(x in text_of(problem) for x in texts):
            _LOG.warning(
                f"{name}: the model is not shown the column {column}: put it in the prompt, "
                "with letters, and let the answer be a letter"
            )
            return


def style_of(name: str, chosen: str = "") -> Style:
    """How the problems of a set are asked: in a style of `STYLES`, or by a text with
    {question} in it. Raises ValueError for neither."""
    known = BENCHMARKS.get(name)
    chosen = chosen or ("boxed" if known and known.source else "question")
    if chosen in STYLES:
        return STYLES[chosen]
    if "{question}" not in chosen:
        raise ValueError(
            f"--style={chosen}: neither one of {', '.join(STYLES)} nor a text with "
            "{question} in it"
        )
    return Style(chosen)


def prompt_of(problem: Problem, style: Style) -> str | list[dict[str, str]]:
    """What is put to the model, before its chat template."""
    if not isinstance(problem.question, str):
        return problem.question
    # Not str.format: questions and templates are full of braces.
    return style.template.replace("{question}", problem.question)


def _gpqa(where: str, row: dict[str, Any], number: int, seed: int) -> Problem:
    # The set lists the correct one first.
    keys = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    random.Random(f"{seed} {number}").shuffle(keys)
    choices = [f"{x}. {row[k].strip()}" for x, k in zip("ABCD", keys, strict=True)]
    asked = "The answer is the letter of the right choice."
    question = "\n\n".join([row["Question"].strip(), "\n".join(choices), asked])
    gold = "ABCD"[keys.index("Correct Answer")]
    used = Fields("Question", "Correct Answer")
    return Problem(id_of(row, number), question, gold, None, row, used)


def _creative(where: str, row: dict[str, Any], number: int, _: int) -> Problem:
    problem = from_row(where, row, number)
    return problem._replace(gold=None, fields=Fields(problem.fields.prompt))


BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500:test", 500, from_row, ("MATH-500",), ("a46e75825b",)
    ),
    # The hub's has 674 problems, Qwen's, whose content is known, 675.
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", 674, from_row
    ),
    "aime24": Benchmark(
        "HuggingFaceH4/aime_2024:train",
        30,
        from_row,
        ("aime_2024",),
        ("ace8cbe816", "459531b104", "94d9500cff", "feb3b60293"),
    ),
    "aime25": Benchmark(
        "math-ai/aime25:test", 30, from_row, ("aime_2025",), ("6fc60b2ced",)
    ),
    "amc23": Benchmark("math-ai/amc23:test", 40, from_row, (), ("3cd04b74a4",)),
    "gpqa": Benchmark("Idavidrein/gpqa:gpqa_diamond:train", 198, _gpqa),
    "gsm8k": Benchmark("openai/gsm8k:main:test", 1319, from_row, (), ("f8ecc2cb64",)),
    "minerva": Benchmark(
        "math-ai/minervamath:test",
        272,
        from_row,
        ("minerva_math", "minervamath"),
        ("036f2232fe",),
    ),
    **dict.fromkeys(("poem", "story", "joke"), Benchmark("", 0, _creative)),
}
