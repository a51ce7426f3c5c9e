"""What a response is worth: psi(y), and rewards by name or by functions of one's own.

Rewards are float32 `[S]`, the samples of a prompt side by side.
"""

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from pfjax.batch import Rollout, RolloutBatch
from pfjax.infra import distributed, storage
from pfjax.model import scoring, tokenizer
from pfjax.tasks import judge, ready_rewards, reward_functions
from pfjax.tasks.data import PromptSet
from pfjax.tasks.grading import Grader, last_boxed
from pfjax.tasks.problems import Problem
from pfjax.tasks.reward_functions import LocalFunction, RewardFunction, Term

# Of the answers in boxes, see `of_answers`.
OF_ANSWERS = ("accuracy", "majority", "cluster")
# Of the policy as it is, known when an update is prepared; and of nothing at all.
NOT_OF_RESPONSE = (*scoring.TOKEN_REWARDS, "random")
# "format" is 1 with a closed box, else 0; "length" the number of tokens; "random" 1 in half
# of all cases, whatever the response.
REWARDS = (*OF_ANSWERS, *NOT_OF_RESPONSE, "format", "length")
# Functions that come with pfjax.
_READY = {"compiles_python": "pfjax.tasks.ready_rewards:compiles_python"}
_COINS = 1  # of a step's random numbers, those of "random"
# What checks the argument of those that have one.
_WITH_ARGUMENT = {
    "regex": ready_rewards.regex,
    "judge": judge.read,
    "reward_model": ready_rewards.check_reward_model,
}


@contextlib.contextmanager
def _of_setting(name: str) -> Iterator[None]:
    """Puts the name of another setting in the place of `reward` in errors."""
    try:
        yield
    except ValueError as error:
        said = re.sub(r"^(--config\.)?reward\b", rf"\1{name}", str(error))
        raise ValueError(said) from error


def check_format_term(text: str) -> None:
    """As `check`, of terms in the place of a format term."""
    with _of_setting("format_term"):
        check(text)
        if found := not_of_response(text):
            raise ValueError(
                f"--config.reward={text}: {found} does not tell the form of a response"
            )


def check(text: str) -> None:
    """Raises ValueError for terms of a reward that there are not."""
    terms = reward_functions.parse(text)
    known = (*REWARDS, *_READY)
    for term in terms:
        if not term.is_function and term.name not in known:
            near = difflib.get_close_matches(term.name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"--config.reward={text}: there is no reward {term.name!r}{hint} "
                f"({', '.join(known)}, {', '.join(f'{x}:...' for x in _WITH_ARGUMENT)}, "
                "or a function FILE.py:NAME)"
            )
        file = reward_functions.source(term.name) if term.is_function else ""
        if file.endswith(".py") and not storage.exists(file):
            raise ValueError(f"--config.reward={text}: there is no file {file}")
        kind, given = reward_functions.argument(term.name)
        if term.is_function and kind in _WITH_ARGUMENT:
            try:
                _WITH_ARGUMENT[kind](given)
            except ValueError as error:
                raise ValueError(f"--config.reward={text}: {error}") from None
    if len(terms) > 1 and (term := token_term(text)):
        raise ValueError(f"--config.reward={text}: {term.name} stands alone")


def has_majority(text: str) -> bool:
    """Whether a term is of the answer that most samples give."""
    return any(term.name == "majority" for term in reward_functions.parse(text))


def token_term(text: str) -> Term | None:
    """The term that is of the policy's distributions of tokens, if there is one."""
    terms = reward_functions.parse(text)
    return next((t for t in terms if t.name in scoring.TOKEN_REWARDS), None)


def not_of_response(text: str) -> str:
    """The name of a term that says nothing of a response by itself, "" if all do."""
    names = (t.name for t in reward_functions.parse(text))
    return next((x for x in names if x in NOT_OF_RESPONSE), "")


def needs_answers(text: str) -> bool:
    """Whether a reward reads the answers of prompts."""
    return any(term.name == "accuracy" for term in reward_functions.parse(text))


class Reward(contextlib.AbstractContextManager):
    """The reward of a run: a weighted sum of terms, and the processes of its functions.

    Args:
      text: the terms, see `reward_functions.parse`; "" for no reward.
      seconds, num_workers: see `RewardFunction`.
      local: what a term "python:NAME" calls, in this process.
      setting: that has the terms: "reward", or "format_term" where the values are psi.
      seed: of the run, for "random".
    """

    def __init__(
        self,
        text: str,
        seconds: float = 10.0,
        num_workers: int = 1,
        local: Callable | None = None,
        setting: str = "reward",
        seed: int = 0,
    ):
        terms, self.setting, self.seed = reward_functions.parse(text), setting, seed
        self.terms = [t._replace(name=_READY.get(t.name, t.name)) for t in terms]
        limits = seconds, num_workers
        names = [t.name for t in self.terms if t.is_function]
        self.functions = {name: _function(name, local, *limits) for name in names}

    def __exit__(self, *unused) -> None:
        for function in self.functions.values():
            function.__exit__()

    def start(self) -> None:
        """Loads the functions; raises ValueError for what cannot be loaded."""
        with _of_setting(self.setting):
            for function in self.functions.values():
                function.check()

    def files(self) -> list[epath.Path]:
        """Files that functions are in, or are described in, as far as they are named."""
        found = (reward_functions.source(name) for name in self.functions)
        return [storage.place(x) for x in found if x.endswith((".py", ".toml"))]

    def models(self) -> list[epath.Path]:
        """Folders of reward models."""
        parts = map(reward_functions.argument, self.functions)
        return [storage.place(x) for kind, x in parts if kind == "reward_model"]

    @property
    def failures(self) -> int:
        """Responses whose reward a function has failed to give."""
        return sum(f.failures for f in self.functions.values())

    def values(
        self,
        problems: Sequence[Problem],
        texts: list[str],
        responses: list[np.ndarray],
        grader: Grader,
        step: int = 0,
        votes: list[str] | None = None,
    ) -> np.ndarray:
        """The reward of each response, float32 `[S]`; 0 where only tokens tell.

        Args:
          problems: P, each of which has S / P responses, side by side.
          texts, responses: S, as text and token ids.
          grader: tells which answers are the same.
          step: of training, for functions that take `state` and for "random".
          votes: texts of a teacher, prompt by prompt, whose majority it is; None: the
            responses' own.

        Raises:
          ValueError: if a function failed for all, or returned what is no reward.
        """
        out = np.zeros(len(texts))
        args = (problems, texts, responses, grader, step, votes)
        with _of_setting(self.setting):
            for term in self.terms:
                values = term.weight * self._of_term(term, *args)
                # What failed must not be better than what did not: a verifier gives 0 or
                # -1, and a weight may turn the best into the worst.
                worst = np.nanmin(values, initial=0.0)
                out += np.where(np.isnan(values), worst, values)
        return out.astype(np.float32)

    def _of_term(
        self,
        term: Term,
        problems: Sequence[Problem],
        texts: list[str],
        responses: list[np.ndarray],
        grader: Grader,
        step: int,
        votes: list[str] | None,
    ) -> np.ndarray:
        """Its values, NaN where a function failed."""
        samples = len(texts) // max(len(problems), 1)
        if term.is_function:
            groups = [
                _arguments(
                    problem,
                    texts[i * samples : (i + 1) * samples],
                    responses[i * samples : (i + 1) * samples],
                    step,
                )
                for i, problem in enumerate(problems)
            ]
            return np.array(self.functions[term.name](groups), np.float64).ravel()
        if term.name in OF_ANSWERS:
            answers = [last_boxed(text) for text in texts]
            golds = [problem.gold for problem in problems]
            voting = None if votes is None else [last_boxed(x) for x in votes]
            return of_answers(term.name, answers, golds, samples, grader, voting)
        if term.name == "format":
            return format_term(texts, -1.0) + 1.0
        if term.name == "length":
            return np.array([len(y) for y in responses], np.float64)
        if term.name == "random":
            rng = np.random.default_rng((self.seed, step, _COINS))
            return rng.integers(2, size=len(texts)).astype(np.float64)
        return np.zeros(len(texts))


def _function(
    name: str, local: Callable | None, seconds: float, num_workers: int
) -> LocalFunction | RewardFunction | judge.Judge:
    kind, given = reward_functions.argument(name)
    if kind == "judge":
        return judge.Judge(name, given, seconds)
    if f"{kind}:" != reward_functions.LOCAL:
        return RewardFunction(name, seconds, num_workers)
    if local is None:
        raise ValueError(
            f"--config.reward={name} is a function of Python: call pfjax.fine_tune with it, "
            "or name its file, FILE.py:NAME"
        )
    return LocalFunction(name, local)


def _arguments(
    problem: Problem, texts: list[str], responses: list[np.ndarray], step: int
) -> dict[str, list]:
    """Keyword arguments of a reward function for the samples of a prompt, as TRL's: chats
    where the prompt is one."""
    n, question = len(texts), problem.question
    is_chat = not isinstance(question, str)
    chat = lambda text: [{"role": "assistant", "content": text}]
    columns = {k: [v] * n for k, v in problem.columns.items() if k != "prompt"}
    return columns | {
        "prompts": [question] * n,
        "completions": [chat(x) if is_chat else x for x in texts],
        "completion_ids": [y.tolist() for y in responses],
        "answer": columns.get("answer", [problem.gold] * n),
        "state": [{"step": step}] * n,
    }


def compute_rewards(
    indices: list[int],
    rollout: Rollout,
    grader: Grader,
    step: int = 0,
    votes: Rollout | None = None,
    *,
    tok: Any,
    prompts: PromptSet,
    reward: Reward,
    format_penalty: float,
    own_psi: Reward,
) -> RolloutBatch:
    """Puts the responses of a step into text and computes what they are worth.

    Args:
      indices: of the P prompts in `prompts`.
      rollout: G responses to each.
      grader, tok: compare answers, and make text of tokens.
      step: of training.
      votes: responses of a teacher to each prompt, see `Reward.values`.
      reward: of the run.
      format_penalty: psi of a response without a box.
      own_psi: psi of all responses in its place, if it has terms.
    """
    responses, texts = _in_text(rollout, tok)
    psi, values = format_term(texts, format_penalty), np.zeros(len(texts), np.float32)
    problems = [prompts.problems[i] for i in indices]
    args = (problems, texts, responses, grader, step)
    if distributed.is_first():
        psi = own_psi.values(*args) if own_psi.terms else psi
        if reward.terms:
            voting = _in_text(votes, tok)[1] if votes else None
            values = reward.values(*args, voting)
    if reward.terms or own_psi.terms:
        # What runs out of time may do so on one host alone.
        psi, values = distributed.from_first(np.stack([psi, values]))
    return RolloutBatch(
        prompts=[prompts.tokens[i] for i in indices],
        rollout=rollout,
        responses=responses,
        texts=texts,
        psi=psi,
        reward=values,
    )


def _in_text(rollout: Rollout, tok: Any) -> tuple[list[np.ndarray], list[str]]:
    """The S responses, cut to their lengths, as token ids and as text."""
    rows = rollout.tokens.reshape(-1, rollout.tokens.shape[-1])
    responses = [y[:n] for y, n in zip(rows, rollout.lengths.ravel(), strict=True)]
    return responses, [tokenizer.decode(tok, y.tolist()) for y in responses]


def format_term(responses: list[str], unboxed: float) -> np.ndarray:
    r"""`unboxed` for a response without a closed `\boxed{...}`, else 0; float32 [S].

    References:
      PowerFlow, arXiv 2603.18363, Eq. 10 (there -0.5).
    """
    has_box = [last_boxed(text) is not None for text in responses]
    return np.where(has_box, 0.0, unboxed).astype(np.float32)


def of_answers(
    name: str,
    answers: list[str | None],
    golds: list[str | None],
    samples_per_prompt: int,
    grader: Grader,
    votes: list[str | None] | None = None,
) -> np.ndarray:
    """The reward `name` of each answer, `[S]`.

    - `accuracy`: 1 if it equals the prompt's gold answer.
    - `majority`: 1 if it is of the class that most samples of the prompt are of, the
      first of those that tie (TTRL, arXiv 2504.16084, voting over classes of equal
      answers rather than strings); or most of the `votes`, if given (Co-rewarding-II,
      arXiv 2508.00410).
    - `cluster`: the fraction of the prompt's samples that are of its class; without an
      answer a sample is a class of its own (EMPO, arXiv 2504.05812).

    Args:
      answers: `[S]` what is in the box of each response, None without one.
      golds: `[P]`; read by `accuracy` alone.
      votes: answers of a teacher, as many to each prompt; read by `majority` alone.
    """
    out, samples = [], samples_per_prompt
    is_voted = name == "majority" and votes is not None
    for q, gold in enumerate(golds):
        own = answers[q * samples : (q + 1) * samples]
        if name == "accuracy":
            out += [a is not None and grader.is_equal(gold, a) for a in own]
            continue
        cast = votes[q * samples : (q + 1) * samples] if is_voted else []
        classes = np.array(grader.classes(cast + own))
        counted, classes = classes[: len(cast) or None], classes[len(cast) :]
        counts = np.bincount(counted[counted >= 0], minlength=len(cast + own))
        if name == "majority":
            out += [*((classes == counts.argmax()) & (counts.max() > 0))]
        else:
            out += [*(np.where(classes >= 0, counts[classes], 1) / len(own))]
    return np.array(out, np.float32)


def advantages(
    reward: np.ndarray, samples_per_prompt: int, how: str = "group"
) -> np.ndarray:
    """What a policy gradient takes for the rewards of a step, float32 `[S]`.

    - `group`: less the mean of the prompt's samples, over their standard deviation
      (unbiased, as in TRL and verl); 0 where all are equal.
    - `group_mean`: less that mean (Dr. GRPO, arXiv 2503.20783).
    - `batch`: less that mean, over the standard deviation of these differences in the
      whole step (REINFORCE++ with a baseline, arXiv 2501.03262).
    - `none`: the rewards themselves.
    """
    groups = reward.reshape(-1, samples_per_prompt).astype(np.float64)
    if how == "none":
        return reward.astype(np.float32)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if how == "group":
        centred /= groups.std(axis=1, keepdims=True, ddof=1) + 1e-6
    elif how == "batch":
        centred /= centred.std(ddof=1) + 1e-6
    return centred.ravel().astype(np.float32)
