"""README of an exported model."""

import json
import pathlib
import re
import shlex
from typing import Any

from ml_collections import FrozenConfigDict

from pfjax.infra import dataset_io, storage
from pfjax.model import hub, tokenizer
from pfjax.trainer import evaluations, run_config, schedules

_TEMPLATE = pathlib.Path(__file__).with_name("model_card.md.jinja")
_SCORES = ("avg", "maj", "pass")  # of evaluations, as others know them


def model_card(
    config: FrozenConfigDict, history: list[dict[str, Any]], name: str
) -> str:
    """What the model is, how it is used, how it was made, what was measured.

    Args:
      config: of the run.
      history: rows of its `metrics.jsonl` up to the step that is exported.
      name: the folder or hub id by which the model is loaded.
    """
    import huggingface_hub

    source = hub.resolve(config.model)
    steps = history[-1]["step"] if history else 0
    evaluated = evaluations.evaluated(history)
    found = schedules.parse(config.schedules)
    value = lambda name: schedules.value(found, name, steps, config[name])
    results = _results(config, evaluated[-1] if evaluated else {})
    data = huggingface_hub.ModelCardData(
        **_license(source),
        base_model=hub_id(config.model),
        datasets=hub_id(config.data.train.partition(":")[0]),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pfjax", "powerflow"],
        metrics=["accuracy"] if results else None,
        model_name=pathlib.PurePath(name).name,
        eval_results=results or None,
    )
    tok = tokenizer.load(source, config.data.chat_template_kwargs, config.data.clock)
    is_chat = getattr(tok, "chat_template", None) is not None
    told = json.loads(config.data.chat_template_kwargs or "{}") if is_chat else {}
    card = huggingface_hub.ModelCard.from_template(
        data,
        template_str=_TEMPLATE.read_text("utf-8"),
        name=name,
        base=hub_id(config.model) or pathlib.PurePath(config.model).name,
        c=config,
        end={name: value(name) for name in ("alpha", "beta")},
        is_chat=is_chat,
        template_kwargs=told,
        steps=steps,
        rows=evaluated[:1] + evaluated[1:][-1:],
        metrics=[k for k in (evaluated or [{}])[-1] if _is_shown(k)],
        prompt=json.dumps("..." + config.data.suffix),
        command=command(config),
    )
    return str(card)


def _is_shown(key: str) -> bool:
    return key.startswith("eval/") and not key.endswith(("_se", "/grader_timeouts"))


def command(config: FrozenConfigDict) -> str:
    """The command that trains with a config, but for the folder."""
    changed = run_config.changed(config)
    args = [shlex.quote(f"--config.{k}={v}") for k, v in changed.items()]
    return " \\\n  ".join(["pfjax train --config=default --workdir=RUN", *args])


def hub_id(name: str) -> str | None:
    """A name on the hub, without its revision; None for what lies on this machine."""
    name = name.partition("@")[0]
    is_file = name.endswith(dataset_io.FILES) or storage.exists(name)
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("pfjax/")
    return name if is_id and not is_file else None


def _license(source: pathlib.Path) -> dict[str, str]:
    """That of the base, if its card says it."""
    import huggingface_hub

    if not (source / "README.md").is_file():
        return {}
    card = huggingface_hub.ModelCard.load(
        source / "README.md", ignore_metadata_errors=True
    )
    names = ("license", "license_name", "license_link")
    return {k: card.data.get(k) for k in names if card.data.get(k)}


def _results(config: FrozenConfigDict, row: dict[str, Any]) -> list[Any]:
    """The scores of an evaluation, as the hub lists them."""
    import huggingface_hub

    out = []
    for key, value in row.items():
        group, _, rest = key.partition("/")
        of_set, _, metric = rest.rpartition("/")
        if group == "eval" and re.fullmatch(rf"({'|'.join(_SCORES)})@\d+", metric):
            held_out = config.data.eval
            dataset = of_set or hub_id(held_out.partition(":")[0])
            result = huggingface_hub.EvalResult(
                task_type="text-generation",
                dataset_type=dataset or "held-out",
                dataset_name=dataset or pathlib.PurePath(held_out).stem,
                metric_type="accuracy",
                metric_name=metric,
                metric_value=round(value, 4),
            )
            out.append(result)
    return out
