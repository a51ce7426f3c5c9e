r"""Answers to right or wrong, by math-verify in processes that can be killed.

A worker is `python -m pfjax.evaluation.grading`: it reads one JSON object a line and
answers with one. Some answers send sympy into arithmetic that no alarm can interrupt
(`\boxed{9^{9^{9^9}}}`); then the worker is killed, the answer counts as wrong, and a
new worker starts.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time

DEADLINE_SECONDS = 5.0
# Importing sympy on a busy machine.
START_SECONDS = 60.0


def last_boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}`, braces balanced, or None."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth, begin = 0, start + len("\\boxed")
        for i in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[begin + 1 : i]
        end = start
    return None


class Grader:
    """Compares answers; a context manager that holds one worker process.

    Attributes:
      timeouts: comparisons that were cut off.
    """

    def __init__(self, deadline_seconds: float = DEADLINE_SECONDS):
        self.timeouts = 0
        self._deadline = deadline_seconds
        self._worker: subprocess.Popen | None = None
        self._cache: dict[tuple[str, str], bool] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Grader":  # noqa: PYI034
        return self

    def __exit__(self, *unused) -> None:
        self._stop()

    def is_equal(self, gold: str, answer: str) -> bool:
        """Whether `answer` is the same as `gold`. Not symmetric: gold comes first."""
        if gold.strip() == answer.strip():
            return True
        with self._lock:
            if (gold, answer) not in self._cache:
                self._cache[gold, answer] = self._ask(gold, answer)
            return self._cache[gold, answer]

    def classes(self, answers: list[str | None]) -> list[int]:
        """Equivalence classes, numbered as they appear; -1 for no answer.

        Two answers are one class if each equals the other as gold.
        """
        known: list[str] = []
        out: list[int] = []
        for answer in answers:
            if answer is None:
                out.append(-1)
                continue
            for i, other in enumerate(known):
                if self.is_equal(other, answer) and self.is_equal(answer, other):
                    out.append(i)
                    break
            else:
                out.append(len(known))
                known.append(answer)
        return out

    def _ask(self, gold: str, answer: str) -> bool:
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "pfjax.evaluation.grading"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            if self._read_line(START_SECONDS) is None:
                self._stop()
                raise RuntimeError("the grading process did not start; see above")
        request = json.dumps({"gold": gold, "answer": answer}) + "\n"
        try:
            self._worker.stdin.write(request.encode())
            self._worker.stdin.flush()
            line = self._read_line(self._deadline)
        except BrokenPipeError:  # it has died meanwhile (of memory, say)
            self._stop()
            return self._ask(gold, answer)
        if line is None:
            self.timeouts += 1
            self._stop()
            return False
        return json.loads(line)["is_equal"]

    def _read_line(self, seconds: float) -> bytes | None:
        """One line, or None when time is up or the worker died."""
        pipe, line = self._worker.stdout.fileno(), b""
        end = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(end - time.monotonic(), 0))
            chunk = os.read(pipe, 4096) if ready else b""
            if not chunk:
                return None
            line += chunk
        return line

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            with contextlib.suppress(BrokenPipeError):
                self._worker.stdin.close()
            self._worker.stdout.close()
            self._worker.wait()
            self._worker = None


def _serve() -> None:
    """The worker: reads comparisons from standard input until it closes."""
    import logging

    import math_verify

    # It warns that its own alarms are off; this process is killed instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # An unboxed gold parses to a fragment or nothing (`3\sqrt{13}` -> 3), which
    # gives credit to wrong answers; so both sides are boxed.
    config = [
        math_verify.LatexExtractionConfig(boxed_match_priority=0),
        math_verify.ExprExtractionConfig(),
    ]

    def parse(text: str):
        return math_verify.parse(
            f"\\boxed{{{text}}}", extraction_config=config, parsing_timeout=None
        )

    print("ready", flush=True)
    for line in sys.stdin:
        pair = json.loads(line)
        is_equal = math_verify.verify(
            parse(pair["gold"]),
            parse(pair["answer"]),
            float_rounding=6,
            strict=True,
            timeout_seconds=None,
        )
        print(json.dumps({"is_equal": bool(is_equal)}), flush=True)


if __name__ == "__main__":
    _serve()
