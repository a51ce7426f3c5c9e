"""Sets of problems: where they come from, how they are asked, what is right.

A set of `BENCHMARKS` is read from the hub, or from a file of the same form,
`<folder>/<name>.jsonl` or `.parquet`. Any other name is a file or data set as in
training, see `from_row`.
"""

import hashlib
import json
import logging
import pathlib
import random
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
    problem: Callable[[dict[str, Any]], Problem]


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
      folder: with local copies of sets; "" for the hub.
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
        return [from_row(where, row, i) for i, (where, row) in found]
    source = known.source
    if folder:
        files = [pathlib.Path(folder).expanduser() / f"{name}{x}" for x in _SUFFIXES]
        source = next((str(p) for p in files if p.is_file()), None)
        if source is None:
            raise ValueError(f"{folder} has none of {[p.name for p in files]}")
    if not source:
        raise ValueError(
            f"the prompts of {name!r} are on no hub: give --data=DIR, a folder with "
            f"{name}.jsonl, one object with a `prompt` a line"
        )
    problems = []
    for i, (where, row) in enumerate(dataset_io.read(source)):
        try:
            problems.append(known.problem({"_row": i, "_seed": seed, **row}))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{where} is not of the form of {name}: {error!r} in {sorted(row)}"
            ) from error
    if not problems:
        raise ValueError(f"{source} is empty")
    if known.size and len(problems) != known.size:
        found = f"{source} has {len(problems)} items"
        _LOG.warning(f"{found}, published scores are over {known.size}")
    return problems


def fingerprint(problems: list[Problem]) -> str:
    """Tells one version of a set from another: of ids, questions and golds."""
    text = json.dumps(problems, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_of(problem: Problem, style: Style) -> str | list[dict[str, str]]:
    """What is put to the model, before its chat template."""
    if not isinstance(problem.question, str):
        return problem.question
    # Not str.format: questions and templates are full of braces.
    return style.template.replace("{question}", problem.question)


def from_row(where: str, row: dict[str, Any], number: int = 0) -> Problem:
    """A row of a prompt file, as in training, verl's and TRL's.

    It has `prompt`, `problem` or `question`: a string, or messages; and perhaps
    `answer` or `reward_model.ground_truth`, for evaluation and objectives that grade.

    Raises:
      ValueError: if it has no prompt, or one that is neither text nor messages.
    """
    field = next((f for f in _QUESTIONS if row.get(f)), None)
    if field is None:
        got = f"expected one of {_QUESTIONS}, got {sorted(row)}"
        raise ValueError(f"{where}: no prompt; {got}")
    question = row[field]
    is_message = lambda m: isinstance(m, dict) and {"role", "content"} <= set(m)
    is_messages = isinstance(question, list) and all(map(is_message, question))
    if not (isinstance(question, str) or is_messages):
        raise ValueError(
            f"{where}: {field} must be a string or a list of messages with 'role' and "
            f"'content', got {question!r}"
        )
    gold = row.get("answer")
    if gold is None:
        gold = (row.get("reward_model") or {}).get("ground_truth")
    if isinstance(gold, list):  # EMPO's files
        gold = gold[0] if gold else None
    name = _id({"_row": number, **row}, "id", "unique_id")
    return Problem(name, question, None if gold is None else str(gold))


def text_of(problem: Problem) -> str:
    """The question for people: text, or the last of its messages."""
    asked = problem.question
    return asked if isinstance(asked, str) else asked[-1]["content"]


def _id(row: dict[str, Any], *fields: str) -> str:
    return str(next((row[f] for f in fields if row.get(f) is not None), row["_row"]))


def _question(row: dict[str, Any]) -> str:
    return row["problem"] if "problem" in row else row["question"]


def _answered(row: dict[str, Any]) -> Problem:
    """MATH-500, AIME, AMC."""
    answer = row["answer"]
    if isinstance(answer, float) and answer.is_integer():  # 27.0 in copies of AMC
        answer = int(answer)
    return Problem(_id(row, "unique_id", "id"), _question(row), str(answer))


def _olympiad(row: dict[str, Any]) -> Problem:
    # A list of one element, itself comma-joined where there are several answers.
    answer, error = row["final_answer"], row.get("error")
    gold = ",".join(answer) if isinstance(answer, list) else str(answer)
    tolerance = float(error) if error else None
    gold = gold.replace("$", "").strip()
    return Problem(_id(row, "id"), row["question"], gold, tolerance)


def _gsm8k(row: dict[str, Any]) -> Problem:
    gold = row["answer"].split("####")[1].strip().replace(",", "")
    return Problem(_id(row, "id"), row["question"], gold)


def _minerva(row: dict[str, Any]) -> Problem:
    gold = row.get("answer") or grading.last_boxed(row["solution"])
    if gold is None:
        raise KeyError("no \\boxed{} in solution")
    return Problem(_id(row, "id"), _question(row), str(gold))


def _gpqa(row: dict[str, Any]) -> Problem:
    # The set lists the right one first.
    keys = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    random.Random(f"{row['_seed']} {row['_row']}").shuffle(keys)
    choices = [f"{x}. {row[k].strip()}" for x, k in zip("ABCD", keys, strict=True)]
    asked = "The answer is the letter of the right choice."
    question = "\n\n".join([row["Question"].strip(), "\n".join(choices), asked])
    gold = "ABCD"[keys.index("Correct Answer")]
    return Problem(_id(row, "Record ID", "id"), question, gold)


_creative = lambda row: Problem(_id(row, "id"), row["prompt"], None)
_QUESTIONS = ("prompt", "problem", "question")
_SUFFIXES = (".jsonl", ".json", ".parquet")

BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark("HuggingFaceH4/MATH-500:test", 500, _answered),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench:OE_TO_maths_en_COMP:train", 674, _olympiad
    ),
    "aime24": Benchmark("HuggingFaceH4/aime_2024:train", 30, _answered),
    "aime25": Benchmark("math-ai/aime25:test", 30, _answered),
    "amc23": Benchmark("math-ai/amc23:test", 40, _answered),
    "gpqa": Benchmark("Idavidrein/gpqa:gpqa_diamond:train", 198, _gpqa),
    "gsm8k": Benchmark("openai/gsm8k:main:test", 1319, _gsm8k),
    "minerva": Benchmark("math-ai/minervamath:test", 272, _minerva),
    **dict.fromkeys(("poem", "story", "joke"), Benchmark("", 0, _creative)),
}
