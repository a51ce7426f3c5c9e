"""What a run is given: prompts to train on, sets of prompts to evaluate, and samples of the
target. Mistakes in them are said before anything heavy starts."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from pfjax.infra import dataset_io, storage
from pfjax.model import hf_config, hub, tokenizer
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import check_tokens
from pfjax.tasks import benchmarks, data, samples
from pfjax.tasks.problems import Fields, check_fields
from pfjax.tasks.rewards import Reward
from pfjax.trainer import config_checks, metrics, objective, run_config, settings


class Inputs(NamedTuple):
    train: data.PromptSet
    held_out: dict[str, data.PromptSet]  # sets of evaluations, by name

    def longest_of_any(self) -> int:
        """Tokens of the longest prompt."""
        return max(x.longest() for x in (self.train, *self.held_out.values()))

    def golds(self, with_train: bool) -> list[str | None]:
        """What responses to held-out prompts are graded by, and those to train on."""
        sets = [*self.held_out.values(), *([self.train] if with_train else [])]
        return [problem.gold for of_set in sets for problem in of_set.problems]


def load(
    config: FrozenConfigDict, tok: Any, model: ModelConfig, reward_source: str
) -> Inputs:
    """Reads all prompts, for a reward of these terms.

    Raises:
      ValueError: for a mistake in a file or in what is said of it, and for answers or a
        metric that are needed and will not be there.
    """
    c = config.data
    sources = _sets(c.eval)
    fields = Fields(c.prompt_field, c.answer_field)
    args = (tok, c.max_prompt_tokens, c.suffix, model, fields)
    train = data.load_prompts(c.train, *args)
    held_out = {name: data.load_prompts(x, *args) for name, x in sources.items()}
    for of_set in held_out.values():
        data.warn_of_overlap(train, of_set)
    problems = [p for of_set in (train, *held_out.values()) for p in of_set.problems]
    try:
        check_fields(fields, problems)
    except ValueError as error:
        raise ValueError(f"--config.data.{error}") from None
    golds = [p.gold for p in train.problems]
    config_checks.check_answers(config, golds, reward_source)
    _check_best_metric(config, held_out)
    return Inputs(train, held_out)


def _sets(text: str) -> dict[str, str]:
    """The sets of `data.eval`, by name."""
    sources = [x.strip() for x in text.split(",") if x.strip()]
    names = {benchmarks.name_of(x): x for x in sources}
    if len(names) < len(sources):
        raise ValueError(
            f"--config.data.eval={text}: sets need different names to tell their metrics "
            f"apart, these are called {', '.join(map(benchmarks.name_of, sources))}"
        )
    return names


def _check_best_metric(
    config: FrozenConfigDict, sets: dict[str, data.PromptSet]
) -> None:
    """Raises ValueError if no metric of the run can have the name."""
    name = config.best_metric
    if name == settings.SETTINGS["best_metric"].default:
        return  # without an evaluation no checkpoint is the best
    is_graded = lambda of_set: any(p.gold is not None for p in of_set.problems)
    graded = [k for k, of_set in sets.items() if is_graded(of_set)]
    has_target = bool(config.data.target)
    known = metrics.names([*sets], graded, config.eval_samples, has_target)
    known += [metrics.without_k(x) for x in known]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        if name.startswith("eval/") and not graded:
            what = "answers in" if sets else "any"
            hint = f" without {what} --config.data.eval" + hint
        raise ValueError(f"--config.best_metric={name}: no such metric{hint}")


def other_base(
    config: FrozenConfigDict, inputs: Inputs, tok: Any
) -> ModelConfig | None:
    """The frozen base's config, where the policy starts from another checkpoint.

    Raises:
      ValueError: if its tokens mean something else than the policy's.
    """
    if not config.base:
        return None
    source = hub.resolve(config.base)
    vocabulary, own = tokenizer.load(source).get_vocab(), tok.get_vocab()
    if different := sorted(k for k, _ in own.items() ^ vocabulary.items()):
        raise ValueError(
            f"--config.base={config.base} has another tokenizer than {config.model}: "
            f"{len(different)} tokens differ, such as {different[0]!r}"
        )
    model = hf_config.read(source)
    check_tokens(model, inputs.train.tokens)
    return model


def fingerprints(
    config: FrozenConfigDict,
    inputs: Inputs,
    tok: Any,
    target: samples.TargetSamples | None,
    responses: Mapping[tuple[int, ...], list[np.ndarray]],
    reward: Reward,
    own_psi: Reward,
) -> dict[str, str]:
    """Of what the model is given and of what its tokens mean: a file, a chat template or a
    tokenizer may change under a config that does not. Of a reward's functions too, of all
    columns that they may read, and of an objective's file."""
    of = lambda s: [s.tokens, [p.gold for p in s.problems]]
    found = {"prompts": of(inputs.train), "tokens": sorted(tok.get_vocab().items())}
    if inputs.held_out:
        held_out = [of(of_set) for of_set in inputs.held_out.values()]
        found[run_config.EVAL_PROMPTS] = held_out if len(held_out) > 1 else held_out[0]
    if target:
        found["samples of the target"] = [*target[:3], *map(repr, target.problems)]
    if responses:
        found["responses to learn from"] = [
            [*p, [y.tolist() for y in of]] for p, of in sorted(responses.items())
        ]
    # Columns are of any type, not of JSON's alone.
    if reward.functions or own_psi.functions:
        rows = [repr(dict(p.columns)) for p in inputs.train.problems]
        found["columns of the prompts"] = rows
        if files := reward.files():
            found[run_config.REWARD_CODE] = [*map(storage.read_text, files)]
    code = (*objective.code(config.objective), *own_psi.files())
    found |= {f"code of {x}": storage.read_text(x) for x in code}
    out = {name: dataset_io.fingerprint(x) for name, x in found.items()}
    if config.lora.init_from:
        folder = hub.resolve_adapter(config.lora.init_from)
        out["adapter"] = hub.fingerprint(folder, hub.ADAPTER_CONFIG)
    for folder in reward.models():
        out[f"reward model {folder}"] = hub.fingerprint(storage.local_copy(folder))
    if config.base:
        out["checkpoint of the base"] = hub.fingerprint(hub.resolve(config.base))
    return out


def describe(inputs: Inputs, tok: Any) -> str:
    """What each set was read as, with its first prompt, for the start of the log."""
    said = [f"data.train {data.describe(inputs.train, tok)}"]
    for of_set in inputs.held_out.values():
        answered = sum(p.gold is not None for p in of_set.problems)
        said.append(f"data.eval {data.describe(of_set, tok)}")
        if answered < len(of_set.problems):
            left = "the others are not graded" if answered else "nothing is graded"
            said[-1] += f"\n  {answered} of {len(of_set.problems)} have answers: {left}"
    return "\n".join(said if inputs.held_out else [*said, "no evaluation (data.eval)"])
