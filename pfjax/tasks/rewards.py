"""What a response is worth, judged by its text: psi(y), and the rewards of the baselines.

Rewards are float32 `[S]`, the samples of a prompt side by side.
"""

from typing import Any

import numpy as np

from pfjax.batch import Rollout, RolloutBatch
from pfjax.infra import distributed
from pfjax.model import tokenizer
from pfjax.tasks.data import PromptSet
from pfjax.tasks.grading import Grader, last_boxed

# Rewards that `of_answers` knows; "self_certainty", which is of tokens, comes from
# `log_probs.self_certainty`.
OF_ANSWERS = ("correct", "majority", "cluster")


def compute_rewards(
    indices: list[int],
    rollout: Rollout,
    grader: Grader,
    *,
    tok: Any,
    prompts: PromptSet,
    reward: str,
    format_penalty: float,
) -> RolloutBatch:
    """Puts the responses of a step into text and computes what they are worth.

    Args:
      indices: of the P prompts in `prompts`.
      rollout: G responses to each.
      grader, tok: compare answers, and make text of tokens.
      reward: a name in `OF_ANSWERS`; others leave zeros.
      format_penalty: psi of a response without a box.
    """
    rows = rollout.tokens.reshape(-1, rollout.tokens.shape[-1])
    responses = [y[:n] for y, n in zip(rows, rollout.lengths.ravel(), strict=True)]
    texts = [tokenizer.decode(tok, y.tolist()) for y in responses]
    values = np.zeros(len(texts), np.float32)
    if reward in OF_ANSWERS:
        answers = [last_boxed(text) for text in texts]
        golds = [prompts.problems[i].gold for i in indices]
        values = of_answers(reward, answers, golds, rollout.tokens.shape[1], grader)
        # A grader that runs out of time may do so on one host alone.
        values = distributed.from_first(values)
    return RolloutBatch(
        prompts=[prompts.tokens[i] for i in indices],
        rollout=rollout,
        responses=responses,
        texts=texts,
        psi=format_term(texts, format_penalty),
        reward=values,
    )


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
) -> np.ndarray:
    """The reward `name` of each answer, `[S]`.

    - `correct`: 1 if it equals the prompt's gold answer.
    - `majority`: 1 if it is of the class that most samples of the prompt are of, the
      first of those that tie (TTRL, arXiv 2504.16084, voting over classes of equal
      answers rather than strings).
    - `cluster`: the fraction of the prompt's samples that are of its class; without an
      answer a sample is a class of its own (EMPO, arXiv 2504.05812).

    Args:
      answers: `[S]` what is in the box of each response, None without one.
      golds: `[P]`; read by `correct` alone.
    """
    out = []
    for q, gold in enumerate(golds):
        own = answers[q * samples_per_prompt : (q + 1) * samples_per_prompt]
        if name == "correct":
            out += [a is not None and grader.is_equal(gold, a) for a in own]
            continue
        classes = np.array(grader.classes(own))
        votes = np.bincount(classes[classes >= 0], minlength=1)
        if name == "majority":
            out += [*((classes == votes.argmax()) & (votes.max() > 0))]
        else:
            out += [*(np.where(classes >= 0, votes[classes], 1) / len(own))]
    return np.array(out, np.float32)


def group_normalized(reward: np.ndarray, samples_per_prompt: int) -> np.ndarray:
    """Less the mean of its prompt's samples, over their standard deviation (unbiased,
    as in TRL and verl); 0 where all are equal. float32 `[S]`."""
    groups = reward.reshape(-1, samples_per_prompt).astype(np.float64)
    spread = groups.std(axis=1, keepdims=True, ddof=1)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (spread + 1e-6)).ravel().astype(np.float32)
