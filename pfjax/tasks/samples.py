"""The file that `pfjax sample` writes: one line per response, and what training reads of it."""

import collections
import json
import logging
import shlex
from typing import Any, NamedTuple

import numpy as np

from pfjax.infra import dataset_io
from pfjax.model import tokenizer
from pfjax.sampler import smc
from pfjax.sampler.scheduler import Finished
from pfjax.targets import Target
from pfjax.tasks import reward_functions
from pfjax.tasks.data import PromptSet
from pfjax.tasks.problems import Problem, text_of

_LOG = logging.getLogger(__name__)


def line(
    tok: Any,
    prompts: PromptSet,
    response: Finished,
    target: Target | None = None,
    log_z: float = 0.0,
    reward: str = "",
    found: smc.Diagnostics | None = None,
) -> str:
    """A response as one line of JSON.

    Args:
      target, log_z, reward: that it is a sample of; the reward by its terms.
      found: by sequential Monte Carlo, of all prompts.
    """
    q, tokens = response.prompt, response.tokens.tolist()
    problem = prompts.problems[q]
    row = {
        "prompt_id": q,
        "sample": response.sample,
        "prompt": text_of(problem),
        "completion": tokenizer.decode(tok, tokens),
        "tokens": len(tokens),
        "finished": response.is_stopped,
        "log_prob": float(response.log_probs.sum(dtype="float64")),
        # What `load_responses` reads.
        "prompt_tokens": prompts.tokens[q],
        "completion_tokens": tokens,
    }
    if target:  # and `load_target`
        row |= {"alpha": target.alpha, "log_z": log_z}
        if target.eta_cutoff:
            row["eta_cutoff"] = target.eta_cutoff
    if found:
        row["ancestors"] = int(found.ancestors[q])
        row["min_ess"] = float(found.min_ess[q])
        row["final_ess"] = float(found.final_ess[q])
    if reward:
        row |= {"reward": reward, "beta": target.beta}
        row["problem"] = {
            "question": problem.question,
            "gold": problem.gold,
            "columns": dict(problem.columns),
        }
    return json.dumps(row, ensure_ascii=False, default=reward_functions.plain) + "\n"


class TargetSamples(NamedTuple):
    """S responses to P prompts, prompt by prompt, as many to each."""

    prompts: list[list[int]]
    responses: list[list[int]]
    log_z: float  # lambda, nats per token, that they were drawn with
    problems: tuple[Problem, ...] = ()  # of the prompts, where there is a reward


def load_target(source: str, target: Target, reward: str = "") -> TargetSamples:
    """Reads what `python -m pfjax.sample --method=smc` (or `mh`) wrote.

    Args:
      reward: its terms, if the target has one.

    Raises:
      ValueError: if the samples are none of the target (but for its format term), or of
        several kinds.
    """
    if type(target) is not Target:
        raise ValueError(
            f"--config.data.target={source}: the target of this objective is your own, "
            "which no such samples know"
        )
    if target.has_reward and target.is_reward_per_token:
        raise ValueError(
            f"--config.data.target={source}: the target of this objective has a reward per "
            "token, and samples are drawn by one per response"
        )
    found = dataset_io.read(source)
    log_z = found[0][1].get("log_z") if found else None
    _check_rows(found, log_z, target, reward)
    by_prompt = collections.defaultdict(list)
    for _, row in found:
        by_prompt[row["prompt_id"]].append(row)
    groups = [by_prompt[q] for q in sorted(by_prompt)]
    if len({len(g) for g in groups}) != 1:
        raise ValueError(f"{source}: every prompt needs as many samples as the others")
    if log_z and not target.is_length_aware:
        raise ValueError(
            f"{source}: drawn with log_z={log_z}, but the target of this objective is of "
            "whole sequences: draw with --log_z=0"
        )
    _warn_of_degenerate(source, groups)
    return TargetSamples(
        prompts=[g[0]["prompt_tokens"] for g in groups],
        responses=[r["completion_tokens"] for g in groups for r in g],
        log_z=log_z,
        problems=tuple(
            Problem(str(q), **g[0]["problem"]) for q, g in enumerate(groups) if reward
        ),
    )


def _check_rows(
    found: list[tuple[str, dict]], log_z: float | None, target: Target, reward: str
) -> None:
    """Raises ValueError for samples of another target than the run's."""
    # What rows lack that were drawn without a reward, and before there were rare tokens.
    untold = {"beta": 0.0, "reward": "", "eta_cutoff": 0.0}
    wanted = {"alpha": target.alpha, "log_z": log_z, **untold}
    command = f"--method=smc --alpha={target.alpha:g} --log_z=..."
    if target.eta_cutoff:
        wanted |= {"eta_cutoff": target.eta_cutoff}
        command += f" --eta_cutoff={target.eta_cutoff:g}"
    if target.has_reward:
        wanted |= {"beta": target.beta, "reward": reward}
        command += f" --reward={shlex.quote(reward)} --beta={target.beta:g}"
    for where, row in found:
        for name, want in wanted.items():
            value = row.get(name, untold.get(name))
            if value is None or value != want:
                raise ValueError(
                    f"{where}: {name} is {value!r}, expected {want!r}; samples of the "
                    f"target come from python -m pfjax.sample {command}"
                )
        if reward and "problem" not in row:
            raise ValueError(
                f"{where}: there is no 'problem', of which a reward could be"
            )


def _warn_of_degenerate(source: str, groups: list[list[dict]]) -> None:
    """Says if samples by particles descend from too few of them."""
    bad = [
        g for g in groups if smc.is_degenerate(g[0].get("ancestors", len(g)), len(g))
    ]
    if bad:
        _LOG.warning(
            f"{source}: samples of {len(bad)} of {len(groups)} prompts are degenerate (of "
            f"prompt {bad[0][0]['prompt_id']}, {len(bad[0])} of {bad[0][0]['ancestors']} "
            "ancestors), and what is measured by them is biased: draw with more --particles"
        )


def load_responses(
    source: str, prompts: list[list[int]], max_new_tokens: int
) -> dict[tuple[int, ...], list[np.ndarray]]:
    """Responses to each of `prompts`, as `pfjax sample` wrote them; none of no file.

    Raises:
      ValueError: if a prompt has none, or a response is empty or too long.
    """
    if not source:
        return {}
    out: dict[tuple[int, ...], list[np.ndarray]] = collections.defaultdict(list)
    for where, row in dataset_io.read(source):
        try:
            prompt, response = row["prompt_tokens"], row["completion_tokens"]
        except KeyError as error:
            raise ValueError(
                f"{where}: no {error}; responses to learn from are those that pfjax sample "
                "--out=FILE.jsonl writes"
            ) from None
        if not 0 < len(response) <= max_new_tokens:
            raise ValueError(
                f"{where}: a response of {len(response)} tokens, where max_new_tokens is "
                f"{max_new_tokens}"
            )
        out[tuple(prompt)].append(np.array(response, np.int32))
    if missing := [p for p in prompts if tuple(p) not in out]:
        raise ValueError(
            f"--config.behavior.file={source} has no response to {len(missing)} of "
            f"{len(prompts)} training prompts; the first is {missing[0][:20]}"
        )
    return dict(out)
