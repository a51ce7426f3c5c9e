r"""Whether answers are correct, by a process that can be killed.

Some answers send sympy into arithmetic that no alarm can interrupt
(`\boxed{9^{9^{9^9}}}`). The kernel ends the process that compares, `pfjax.tasks.equality`,
after some seconds of its own processor time, so that no verdict depends on how busy a
machine is; the answer counts as incorrect, and a new process starts.
"""

import contextlib
import functools
import json
import re
import select
import subprocess
from importlib import metadata
from typing import Literal

from pfjax.tasks import processes

# Golds that a check at the start looks at: a few seconds.
_CHECKED = 1000
DEADLINE_SECONDS = 2.0  # of the worker's processor time, for one comparison
# Of wall time, where something hangs: nothing is said of how long it takes.
_PATIENCE = 600.0
_MANY_WORDS = 20  # golds of the sets have up to 12
_REMEMBERED = 2**20  # verdicts, and answers that could be compared: some 300 MB
_LONGEST = 2000  # characters of an answer; golds of the sets have up to 210
# Counts changes of the rules of `pfjax.tasks.equality`: scores of different numbers do not compare.
RULES_VERSION = 3

# Not imported: sympy is slow to.
_WORKER = "pfjax.tasks.equality"
# A command is skipped with the character after its backslash: `\{` is no brace.
# Pairs of backslashes are skipped at once: a run of them is read once, not from each of it.
_BRACES = re.compile(r"(?P<box>\\++boxed\s*\{)|(?:\\\\)++|\\.|[{}]", re.DOTALL)


def boxed(text: str, policy: Literal["last", "first"] = "last") -> str | None:
    r"""What stands in the last or first closed `\boxed{...}`; None where nothing does.

    Braces are balanced. Of adjacent boxes (`\boxed{5} or \boxed{4}`) one is taken too:
    given both, math-verify would grade the set of them. `\fbox`, `\boxed 5` and a box
    that the text ends in are no answers.
    """
    open_braces: list[re.Match] = []
    found: dict[int, slice] = {}  # texts of boxes in boxes would be long together
    for brace in _BRACES.finditer(text):
        if brace["box"] or brace[0] == "{":
            open_braces.append(brace)
        elif brace[0] == "}" and open_braces and (opened := open_braces.pop())["box"]:
            found[opened.start()] = slice(opened.end(), brace.start())
    pick = max if policy == "last" else min
    text = text[found[pick(found)]] if found else ""
    return text if text.strip() else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}`, or None."""
    return boxed(text)


def _is_text(gold: str) -> bool:
    """Whether it is of several lines or many words: a solution, not an answer."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)
    return "\n" in gold or len(words) >= _MANY_WORDS


class Grader(contextlib.AbstractContextManager):
    """Compares answers; a context manager that holds one worker process. `timeouts` is the
    number of comparisons that were cut off."""

    def __init__(self, deadline_seconds: float = DEADLINE_SECONDS):
        self.timeouts = 0
        self._deadline = deadline_seconds
        self._worker: subprocess.Popen | None = None
        # Started once one was killed, as others will be.
        self._spare: subprocess.Popen | None = None
        self._endless: set[str] = set()  # cannot even be compared with 0
        self._fine: set[str] = set()  # has been compared, so is never one of these
        self._judge_once = functools.lru_cache(_REMEMBERED)(self._judge)

    def __exit__(self, *unused) -> None:
        self._stop()
        self._worker, self._spare = self._spare, None
        self._stop()

    def describe(self) -> dict[str, str | float]:
        """What to store with a score: two that differ here do not compare."""
        return {
            "grader": "math-verify",
            "version": metadata.version("math-verify"),
            "sympy": metadata.version("sympy"),
            "rules": RULES_VERSION,
            "deadline_seconds": self._deadline,
        }

    def check_golds(self, golds: list[str | None]) -> None:
        """Grades each known gold against itself, as if the strings differed: the first
        1,000 of those that differ.

        Raises:
          ValueError: naming the golds that no answer would equal.
        """
        known = [*dict.fromkeys(g for g in golds if g is not None)][:_CHECKED]
        wrong = [g for g in known if _is_text(g) or not self._ask(g, g)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(known)} gold answers are not equal to themselves: "
                f"{wrong[:20]}; correct them (LaTeX, as inside a box, without a solution) "
                "or leave their prompts out"
            )

    def is_equal(self, gold: str, answer: str, tolerance: float | None = None) -> bool:
        """Whether `answer` is the same as `gold`. Not symmetric: gold comes first.

        Args:
          gold: several values stand in one list (`1,2`); their order is free.
          tolerance: how far a number, or each of a list, may be off (the field `error`
            of OlympiadBench); absolute.
        """
        same = gold.strip() == answer.strip()
        if not same and max(len(gold), len(answer)) > _LONGEST:
            return False
        return same or self._judge_once(gold, answer, tolerance)

    def classes(self, answers: list[str | None]) -> list[int]:
        """Equivalence classes, numbered as they appear; -1 for no or an empty answer.

        Two answers are one class if each equals the other as gold.
        """
        known: list[str] = []
        out: list[int] = []
        for answer in answers:
            if answer is None or not answer.strip():
                out.append(-1)
                continue
            same = (
                self.is_equal(x, answer) and self.is_equal(answer, x) for x in known
            )
            out.append(next((i for i, x in enumerate(same) if x), len(known)))
            if out[-1] == len(known):
                known.append(answer)
        return out

    def _judge(self, gold: str, answer: str, tolerance: float | None) -> bool:
        if {gold, answer} & self._endless:
            return False
        verdict = self._ask(gold, answer, tolerance)
        if verdict is None:
            self.timeouts += 1
            # Whose fault? It would else cost a deadline and a worker against every
            # other answer of its prompt.
            for text in {answer, gold} - self._fine:
                if self._ask(text, "0") is None:
                    self._endless.add(text)
        return bool(verdict)

    def _ask(
        self, gold: str, answer: str, tolerance: float | None = None
    ) -> bool | None:
        """The worker's verdict; None if it ran out of time or memory, or died."""
        if self._worker is None:
            self._worker, self._spare = self._spare or self._start(), None
            if not self._read_line():
                if self._stop() == processes.TOLD_TO_END:
                    return self._ask(gold, answer, tolerance)
                raise RuntimeError("the grading process did not start; see above")
        request = json.dumps([gold, answer, tolerance])
        try:
            print(request, file=self._worker.stdin, flush=True)
        except BrokenPipeError:  # it has died meanwhile
            self._stop()
            return self._ask(gold, answer, tolerance)
        if line := self._read_line():
            if len(self._fine) >= _REMEMBERED:
                self._fine.clear()
            self._fine |= {gold, answer}
            return json.loads(line)
        if self._stop() == processes.TOLD_TO_END:
            return self._ask(gold, answer, tolerance)
        self._spare = self._spare or self._start()
        return None

    def _start(self) -> subprocess.Popen:
        command = processes.command(_WORKER, str(self._deadline))
        return processes.start(command, text=True)

    def _read_line(self) -> str:
        """A line, which the worker writes whole; "" when it died."""
        out = self._worker.stdout
        return out.readline() if select.select([out], [], [], _PATIENCE)[0] else ""

    def _stop(self) -> int | None:
        """Kills the worker, if there is one, and returns how it ended."""
        worker, self._worker = self._worker, None
        return processes.end(worker)
