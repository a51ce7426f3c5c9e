"""Sets of problems: where they come from, how they are asked, what is right.

A set of `BENCHMARKS` is read from the hub, or from a copy in a folder; any other name is a
file or data set. Rows of all are read by `from_row`, as those of training are.
"""

import ast
import contextlib
import hashlib
import logging
import math
import pathlib
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pfjax.infra import dataset_io
from pfjax.tasks import grading

_LOG = logging.getLogger(__name__)


class Problem(NamedTuple):
    id: str  # of the set, or the number of the row
    question: str | list[dict[str, str]]  # messages are asked as they are
    gold: str | None  # what a right answer equals; None: not graded
    tolerance: float | None = None  # absolute, of a numeric answer


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


def read(name: str, folder: str = "", seed: int = 0) -> list[Problem]:
    """The problems of a set.

    Args:
      name: of `BENCHMARKS`, or a source of `dataset_io.read`.
      folder: with local copies of sets, `<name>.<suffix>` or `<name>/test.<suffix>`, the
        suffix one of `dataset_io.FILES`; "" for the hub.
      seed: of the order of choices, where there are any.

    Raises:
      ValueError: if there is no such set, or a row is not of its form (naming it).
    """
    known = BENCHMARKS.get(name)
    if known is None:
        if "/" not in name and not pathlib.Path(name).suffix:
            raise ValueError(
                f"no benchmark {name!r}: neither a file nor one of "
                f"{', '.join(BENCHMARKS)}"
            )
        found = enumerate(dataset_io.read(name))
        problems = [from_row(where, row, i) for i, (where, row) in found]
        stem = pathlib.Path(name).stem
        _check_content(
            next((k for k in BENCHMARKS if _is_named(k, stem)), ""), problems
        )
        return problems
    source = known.source
    if folder:
        stems = [x + y for x in (name, *known.aliases) for y in ("", "/test")]
        files = [stem + suffix for stem in stems for suffix in dataset_io.FILES]
        places = [pathlib.Path(folder).expanduser() / file for file in files]
        source = next((str(p) for p in places if p.is_file()), None)
        if source is None:
            raise ValueError(f"{folder} has none of {files}")
    if not source:
        raise ValueError(
            f"the prompts of {name!r} are on no hub: give --data=DIR, a folder with "
            f"{name}.jsonl, one object with a `prompt` a line"
        )
    problems = []
    for i, (where, row) in enumerate(dataset_io.read(source)):
        try:
            problems.append(known.problem(where, row, i, seed))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{where} is not of the form of {name}: {error!r} in {sorted(row)}"
            ) from error
        if known.source and problems[-1].gold is None:
            raise ValueError(f"{where} has no answer, in {sorted(row)}")
    if not problems:
        raise ValueError(f"{source} is empty")
    if known.size and len(problems) != known.size:
        found = f"{source} has {len(problems)} items"
        _LOG.warning(f"{found}, published scores are over {known.size}")
    _check_content(name, problems)
    return problems


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


def prompt_of(problem: Problem, style: Style) -> str | list[dict[str, str]]:
    """What is put to the model, before its chat template."""
    if not isinstance(problem.question, str):
        return problem.question
    # Not str.format: questions and templates are full of braces.
    return style.template.replace("{question}", problem.question)


def from_row(where: str, row: dict[str, Any], number: int = 0, _: int = 0) -> Problem:
    """A row of a prompt file: of the sets' own forms, verl's, TRL's, Qwen's.

    It has `prompt`, `problem` or `question`, a string or messages; and perhaps an answer,
    for evaluation and objectives that grade: the first that there is of `answer`,
    `final_answer`, `ground_truth`, `reward_model.ground_truth`, and what a `solution` ends
    with (see `gold_of`).

    Args:
      where: named in errors.
      number: of the row, its id where it has none.

    Raises:
      ValueError: if it has no prompt, one that is neither text nor messages, or an
        answer of several parts.
    """
    field = next((f for f in _QUESTIONS if row.get(f)), None)
    if field is None:
        got = f"expected one of {_QUESTIONS}, got {sorted(row)}"
        raise ValueError(f"{where}: no prompt; {got}")
    question = row[field]
    if isinstance(question, list):
        question = [_message(where, field, m) for m in question]
    elif not isinstance(question, str):
        raise ValueError(f"{where}: {field} {_NO_PROMPT}, got {question!r}")  # noqa: TRY004
    final, tolerance = row.get("final_answer"), None
    if final and row.get("error"):  # OlympiadBench
        tolerance = float(row["error"])
    if isinstance(final, list):  # there, one string per answer or all in one
        final = ",".join(map(str, final)).replace("$", "")
    nested = row.get("reward_model")
    nested = nested.get("ground_truth") if isinstance(nested, dict) else None
    values = (row.get("answer"), final, row.get("ground_truth"), nested)
    golds = (gold_of(where, x) for x in values)
    gold = next((g for g in golds if g is not None), None)
    if gold is None:
        gold = _marked(str(row.get("solution") or ""))
    return Problem(_id(row, number), question, gold, tolerance)


_NO_PROMPT = "must be a string or a list of messages with 'role' and 'content'"


def _message(where: str, field: str, m: Any) -> dict[str, Any]:
    """A message of text; parts of text are joined, as templates of text models do not."""
    content = m.get("content") if isinstance(m, dict) and "role" in m else None
    if isinstance(content, list) and all(isinstance(x, dict) for x in content):
        parts = [x.get("text") for x in content]
        content = "".join(parts) if all(isinstance(x, str) for x in parts) else None
    if not isinstance(content, str):
        raise ValueError(f"{where}: {field} {_NO_PROMPT}, got {m!r}")  # noqa: TRY004
    return {**m, "content": content}


def gold_of(where: str, value: Any) -> str | None:
    """What a right answer equals; None where there is none.

    Of a list the first counts (EMPO's files), of an object its one value, as text of
    Python too, and of a worked solution the answer that it marks; words around an answer
    (`Answer: 5`) are dropped; a number has no decimal point that says nothing.

    Raises:
      ValueError: for an object of several values.
    """
    if isinstance(value, str) and _CONTAINER.match(value):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    while isinstance(value, list | dict):
        if isinstance(value, dict) and len(value) > 1:
            raise ValueError(f"{where}: an answer must be one string, got {value!r}")
        values = [*value.values()] if isinstance(value, dict) else value
        value = values[0] if values else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():  # 27.0 in copies of AMC
        value = int(value)
    text = str(value).strip()
    if re.search(r"####|\\boxed", text):
        return _marked(text)
    while match := _AROUND.fullmatch(text):
        text = next(x for x in match.groups() if x is not None).strip()
    return None if text in _MISSING else text


# How Python, JSON and pandas write that there is nothing.
_MISSING = ("", "None", "null", "nan", "NaN", "N/A", "<NA>", "[]", "{}")
# A list or an object as Python and JSON print it: it begins with a quote, unlike intervals.
_CONTAINER = re.compile(r"""\s*[\[{]\s*["']""")
_AROUND = re.compile(
    r"<answer>(.*)</answer>|\**(?:the )?(?:final )?answer\**(?: is:?|:)\**\s*(.+?)\.?"
    r"|\*\*([^*]+)\*\*|\\\[(.*)\\\]",
    re.IGNORECASE | re.DOTALL,
)


def _marked(text: str) -> str | None:
    r"""The answer that a worked solution marks: behind GSM8K's `####`, in `\boxed{}`."""
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "") or None
    answer = grading.last_boxed(text)
    return answer and " ".join(answer.split())


def text_of(problem: Problem) -> str:
    """The question for people: text, or the last of its messages."""
    asked = problem.question
    return asked if isinstance(asked, str) else asked[-1]["content"]


def _id(row: dict[str, Any], number: int) -> str:
    names = ("unique_id", "id", "Record ID")
    return str(next((row[x] for x in names if row.get(x) is not None), number))


def _gpqa(where: str, row: dict[str, Any], number: int, seed: int) -> Problem:
    # The set lists the right one first.
    keys = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    random.Random(f"{seed} {number}").shuffle(keys)
    choices = [f"{x}. {row[k].strip()}" for x, k in zip("ABCD", keys, strict=True)]
    asked = "The answer is the letter of the right choice."
    question = "\n\n".join([row["Question"].strip(), "\n".join(choices), asked])
    gold = "ABCD"[keys.index("Correct Answer")]
    return Problem(_id(row, number), question, gold)


def _creative(where: str, row: dict[str, Any], number: int, _: int) -> Problem:
    return from_row(where, row, number)._replace(gold=None)


_QUESTIONS = ("prompt", "problem", "question")

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
