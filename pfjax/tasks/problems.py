"""A problem, made of a row in any of the forms that prompt files have."""

import ast
import contextlib
import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pfjax.infra import dataset_io
from pfjax.tasks import grading


class Fields(NamedTuple):
    """Columns of a row; "" for those that are found by themselves."""

    prompt: str = ""
    answer: str = ""


BY_THEMSELVES = Fields()


class Problem(NamedTuple):
    id: str  # of the set, or the number of the row
    question: str | list[dict[str, str]]  # messages are asked as they are
    gold: str | None  # what a correct answer equals; None: not graded
    tolerance: float | None = None  # absolute, of a numeric answer
    columns: Mapping[str, Any] = types.MappingProxyType({})  # the row, for rewards
    fields: Fields = BY_THEMSELVES  # what question and gold came from


def from_row(
    where: str,
    row: dict[str, Any],
    number: int = 0,
    _: int = 0,
    fields: Fields = BY_THEMSELVES,
) -> Problem:
    """A row of a prompt file: of the sets' own forms, verl's, TRL's, Qwen's.

    It has `prompt`, `problem` or `question`, a string or messages; and perhaps an answer,
    for evaluation and objectives that grade: the first that there is of `answer`,
    `final_answer`, `ground_truth`, `reward_model.ground_truth`, and what a `solution` ends
    with (see `gold_of`).

    Args:
      where: named in errors.
      number: of the row, its id where it has none.
      fields: columns that come before those, in rows that have them.

    Raises:
      ValueError: if it has no prompt, one that is empty or neither text nor messages, or
        an answer of several parts.
    """
    field, question = _question(where, row, fields.prompt)
    final, tolerance = row.get("final_answer"), None
    if final and row.get("error"):  # OlympiadBench
        # In other files it may be no number.
        with contextlib.suppress(ValueError, TypeError):
            tolerance = float(row["error"])
    if isinstance(final, list):  # there, one string per answer or all in one
        final = ",".join(map(str, final)).replace("$", "")
    nested = row.get("reward_model")
    nested = nested.get("ground_truth") if isinstance(nested, dict) else None
    values = {
        "answer": row.get("answer"),
        "final_answer": final,
        "ground_truth": row.get("ground_truth"),
        "reward_model.ground_truth": nested,
    }
    is_named = fields.answer != "" and fields.answer in row  # pandas names indices ""
    if is_named:
        values = {fields.answer: row[fields.answer]}
    golds = ((name, gold_of(where, x)) for name, x in values.items())
    answer, gold = next(((n, g) for n, g in golds if g is not None), ("", None))
    if gold is None and not is_named:
        gold = _marked(str(row.get("solution") or ""))
        answer = "solution" if gold is not None else ""
    used = Fields(field, answer)
    return Problem(id_of(row, number), question, gold, tolerance, row, used)


def _question(
    where: str, row: dict[str, Any], named: str
) -> tuple[str, str | list[dict[str, Any]]]:
    """The column of a prompt, and what it holds."""
    names = [named] if named and named in row else [f for f in _QUESTIONS if f in row]
    if not names:
        wanted = f"no column {named}; " if named else ""
        is_csv = ".csv:" in where
        hint = "; a CSV file begins with the names of its columns" if is_csv else ""
        raise ValueError(
            f"{where}: no prompt; {wanted}expected one of {_QUESTIONS}, got "
            f"{_nearest_first(named, row)}; prompt_field names another{hint}"
        )
    field = next((f for f in names if row[f]), names[0])
    question = row[field]
    if question is None or question == [] or not str(question).strip():
        raise ValueError(f"{where}: an empty prompt ({field}): fill it or drop the row")
    if ".csv:" in where and isinstance(question, str) and _MESSAGES.match(question):
        with contextlib.suppress(ValueError, SyntaxError):
            question = _literal(question)
    if isinstance(question, list):
        return field, _messages(where, field, question)
    if not isinstance(question, str):
        got = f"{_NO_PROMPT}, got {dataset_io.brief(question)}"
        raise ValueError(f"{where}: {field} {got}")  # noqa: TRY004
    return field, question


_QUESTIONS = ("prompt", "problem", "question")
# Messages as JSON and Python print them.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")


def _literal(text: str) -> Any:
    """What JSON, or Python, reads of a text."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text.strip())


_NO_PROMPT = "must be a string or a list of messages with 'role' and 'content'"


def _messages(where: str, field: str, messages: list) -> list[dict[str, Any]]:
    """Messages of text that end where the response begins."""
    out = [_message(where, field, m) for m in messages]
    if out[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: {field} ends with a message of the assistant: leave that one out, "
            "the model is to answer what is before it"
        )
    if not out[-1]["content"].strip():
        raise ValueError(
            f"{where}: an empty prompt ({field}): its last message is empty"
        )
    return out


def _message(where: str, field: str, m: Any) -> dict[str, Any]:
    """A message of text; parts of text are joined, as templates of text models do not."""
    content = m.get("content") if isinstance(m, dict) and "role" in m else None
    if isinstance(content, list) and all(isinstance(x, dict) for x in content):
        parts = [x.get("text") for x in content]
        if not all(isinstance(x, str) for x in parts):
            kinds = {str(x.get("type")) for x in content} - {"text"}
            raise ValueError(
                f"{where}: {field} has parts that are no text ({', '.join(kinds)}): models "
                "here read text alone, leave such rows out"
            )
        content = "".join(parts)
    if content is None and isinstance(m, dict) and {"role", "content"} <= set(m):
        raise ValueError(
            f"{where}: {field} has a message of the {m['role']} without text (its content is "
            "null): models here read text alone, leave such rows out"
        )
    if not isinstance(content, str):
        got = f"{_NO_PROMPT}, got {dataset_io.brief(m)}"
        raise ValueError(f"{where}: {field} {got}")  # noqa: TRY004
    return {**m, "content": content}


def gold_of(where: str, value: Any) -> str | None:
    """What a correct answer equals; None where there is none.

    Of a list, which holds several ways to write one answer (Minerva's, EMPO's), the first
    counts, and of an object its one value; both may be text as Python prints them. Of a
    worked solution the answer that it marks counts. Words around an answer (`Answer: 5`)
    and the decimals of a whole number (`27.0`) are dropped.

    Raises:
      ValueError: for an object of several values, and bytes that are no text.
    """
    if isinstance(value, str) and _CONTAINER.match(value):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    while isinstance(value, list | dict):
        if isinstance(value, dict) and len(value) > 1:
            got = dataset_io.brief(value)
            raise ValueError(f"{where}: an answer must be one string, got {got}")
        values = [*value.values()] if isinstance(value, dict) else value
        value = values[0] if values else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: an answer of bytes that are no UTF-8"
            ) from error
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
    r"<answer>(.*)</answer>|\**(?:the )?(?:final |correct )?answer\**(?: is:?|:)\**\s*(.+?)\.?"
    r"|\*\*([^*]+)\*\*|\\\[(.*)\\\]",
    re.IGNORECASE | re.DOTALL,
)


# One number with commas between thousands.
_GROUPED = re.compile(r"[^\d(\[{]*\d{1,3}(,\d{3})+(\.\d+)?[^\d)\]},]*")


def _marked(text: str) -> str | None:
    r"""The answer that a worked solution marks: behind GSM8K's `####`, in `\boxed{}`."""
    if "####" in text:
        answer = text.rpartition("####")[2].strip().partition("\n")[0].strip()
        if _GROUPED.fullmatch(answer):
            answer = answer.replace(",", "")
        return answer or None
    answer = grading.last_boxed(text)
    return answer and " ".join(answer.split())


def text_of(problem: Problem) -> str:
    """The question for people: text, or the last of its messages."""
    asked = problem.question
    return asked if isinstance(asked, str) else asked[-1]["content"]


def id_of(row: dict[str, Any], number: int) -> str:
    names = ("unique_id", "id", "Record ID")
    return str(next((row[x] for x in names if row.get(x) is not None), number))


def check_fields(fields: Fields, problems: list[Problem]) -> None:
    """Raises ValueError for a named column that no row has."""
    columns = list(dict.fromkeys(k for p in problems for k in p.columns))
    for kind, name in fields._asdict().items():
        if name and name not in columns:
            shown = _nearest_first(name, columns)
            raise ValueError(f"{kind}_field={name}: no such column, there are {shown}")


def _nearest_first(name: str, columns: Iterable[str]) -> str:
    """The names of columns, those that are like `name` first."""
    likeness = lambda x: difflib.SequenceMatcher(None, name, x).ratio()
    return dataset_io.brief(sorted(columns, key=likeness, reverse=True), 160)
