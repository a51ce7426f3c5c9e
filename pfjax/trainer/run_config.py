"""The config of a run: completed at its start, kept in `config.json`, and compared with that
of the run that a folder holds already."""

import importlib.metadata
import json
import logging
import operator
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

import pfjax
from pfjax.infra import distributed, storage
from pfjax.model import hub, lora, tokenizer
from pfjax.trainer import settings

_LOG = logging.getLogger(__name__)
WEIGHTS = "weights of the model"  # in an identity: their fingerprint
# In an identity; may change as `data.eval` may, and as a mistake in a reward has to.
EVAL_PROMPTS, REWARD_CODE = "prompts of the evaluation", "code of the reward"
CHANGES = {
    EVAL_PROMPTS: "the prompts of evaluations are others than before: scores up to step "
    "{step} are not of the same problems",
    REWARD_CODE: "the code of the reward is another than before: rewards up to step {step} "
    "are of the old",
}


def with_values(c: FrozenConfigDict, values: Mapping[str, Any]) -> FrozenConfigDict:
    """The config with other values, by dotted name. It stays as it was: a `ConfigDict` of
    it alone would share its groups."""
    out = ConfigDict(c.to_dict()).lock()
    out.update_from_flattened_dict(values)
    return FrozenConfigDict(out)


def with_adapter(c: FrozenConfigDict) -> FrozenConfigDict:
    """The config with rank, alpha and targets of the adapter that it starts from, if any.

    Raises:
      ValueError: if one of them was set to something else; defaults count as not set.
    """
    if not c.lora.init_from:
        return c
    adapter = lora.read_peft(hub.resolve_adapter(c.lora.init_from))
    if not lora.is_for(adapter, c.model):
        _LOG.warning(
            f"the adapter {c.lora.init_from} was made for {adapter.base}, and is added to "
            f"--config.model={c.model}: beside other weights it means nothing"
        )
    names = ",".join(lora.target_names(adapter.targets))
    found = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": names}
    for name, value in found.items():
        given, default = c.lora[name], settings.SETTINGS[f"lora.{name}"].default
        is_same = given in (default, value)
        if name == "targets" and not is_same:
            is_same = lora.projections(given) == adapter.targets
        if not is_same:
            raise ValueError(
                f"--config.lora.{name}={given}, but the adapter {c.lora.init_from} has "
                f"{name} {value}: leave the setting out, it comes from the adapter"
            )
    return with_values(c, {f"lora.{name}": x for name, x in found.items()})


class OtherRun(ValueError):
    """A folder belongs to another model or config."""


def check_workdir(c: FrozenConfigDict, folder: epath.Path) -> None:
    """Raises ValueError for what a run must not write over.

    That is a run with another config (OtherRun), one that has ended and lost its
    checkpoints, and files of the same names that are of no run, such as a model's.
    """
    old = _config_in(folder)
    if old is None:
        return
    if not _has_checkpoints(folder):
        if storage.exists(folder / "hf"):
            raise ValueError(
                f"{folder} holds a run that wrote a model (hf/), and no checkpoint to "
                "continue from: it would start over and write over its metrics; choose "
                "another --workdir, or remove hf/ to start over"
            )
        return  # nothing that would be continued
    said = f"{folder} holds a run with another config"
    check_same(said, identity(old), identity(json.loads(c.to_json())))


def _has_checkpoints(folder: epath.Path) -> bool:
    return any((folder / "checkpoints").glob("[0-9]*"))


def _config_in(folder: epath.Path) -> dict[str, Any] | None:
    """The values of the run that a folder holds, None if it holds none.

    Raises:
      ValueError: if it holds files of the same names that are of no run.
    """
    path, rows = folder / "config.json", folder / "metrics.jsonl"
    if not path.exists():
        # A run writes its config first; if that is lost, its checkpoints know who it is.
        if rows.exists() and not _has_checkpoints(folder):
            raise ValueError(
                f"{rows} would be written over, and there is no config.json of the run that "
                "it is of: choose another --workdir, or bring the file back"
            )
        return None
    found = storage.read_json(path)
    config = found.get("config") if isinstance(found, dict) else None
    if not isinstance(config, dict):
        raise ValueError(  # noqa: TRY004
            f"{path} would be written over, and is not of a run (perhaps of a model): choose "
            "another --workdir"
        )
    return config


def with_clock(c: FrozenConfigDict, folder: epath.Path) -> FrozenConfigDict:
    """The config with the time that the chat template of its model is told, if it asks:
    that of a run found in the folder, else now. All processes have to call it."""
    if c.data.clock or not tokenizer.asks_for_time(c.model):
        return c
    old = _config_in(folder) or {}
    clock = old.get("data", {}).get("clock", "") or tokenizer.now()
    return with_values(c, {"data.clock": distributed.text_from_first(clock)})


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a `config.json`, by name, that a continued run must not change."""
    flat = traverse_util.flatten_dict(config, sep=".")
    free = {name for name, setting in settings.SETTINGS.items() if setting.may_change}
    out = {name: value for name, value in flat.items() if name not in free}
    if out.get("optim.schedule", "constant") != "constant":
        out["optim.schedule"] += f" over num_steps={flat['num_steps']}"
    return out


def check_same(what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises OtherRun with what differs between two identities."""
    if different := differences(old, new):
        shown = "\n  ".join(different)
        raise OtherRun(
            f"{what}:\n  {shown}\n"
            "choose another --workdir, or restore these values to continue it"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name: old -> new` of what differs; a setting that is absent has its default, and of
    other things an older run may know less. Where a file is does not count: identities have
    fingerprints of what is in it."""
    default = {k: s.default for k, s in settings.SETTINGS.items()}
    free = {*CHANGES, *(k for k, s in settings.SETTINGS.items() if s.may_change)}
    both = (old, new)
    named = [_without_folders(x) for x in both]
    names = sorted((named[0].keys() | (named[1].keys() & default.keys())) - free)
    value = lambda values, k: values.get(k, default.get(k, "(absent)"))
    different = [k for k in names if value(named[0], k) != value(named[1], k)]
    # Keys of code are without their folders.
    shown = [n | x for n, x in zip(named, both, strict=True)]
    return [f"{k}: {value(shown[0], k)} -> {value(shown[1], k)}" for k in different]


_PLACES = {"model", "base", "lora.init_from", "data.train", "data.target"}
_PLACES |= {"behavior.file"}
_WITH_FILES = {"reward", "format_term", "objective"}  # among other words


def _without_folders(values: dict[str, Any]) -> dict[str, Any]:
    """An identity in which files go by their names alone."""
    name_of = lambda x: pathlib.PurePath(x).name
    in_text = lambda x: re.sub(r"[^\s,*:]*/(?=[^/\s,*:]+\.(py|toml)\b)", "", x)
    out = {in_text(k) if k.startswith("code of ") else k: x for k, x in values.items()}
    out |= {k: name_of(out[k]) for k in _PLACES & out.keys()}
    return out | {k: in_text(out[k]) for k in _WITH_FILES & out.keys()}


def read_config(folder: epath.Path) -> FrozenConfigDict:
    """The config of a run; a setting that it did not know has its default.

    Raises:
      ValueError: if the folder holds no run, or one of another version of pfjax.
    """
    path = folder / "config.json"
    content = storage.read_json(path) if storage.exists(path) else None
    is_of_run = isinstance(content, dict) and isinstance(content.get("config"), dict)
    if not is_of_run:
        raise ValueError(f"{folder} holds no run: it has no config.json of one")
    out = settings.default_config()
    old = traverse_util.flatten_dict(content["config"], sep=".")
    if unknown := sorted(old.keys() - settings.SETTINGS.keys()):
        version = content.get("versions", {}).get("pfjax", "another version")
        raise ValueError(
            f"{path} has settings that pfjax {_version()} does not know: "
            f"{', '.join(unknown)}; they are of pfjax {version}"
        )
    for name, value in old.items():
        is_tuple = isinstance(settings.SETTINGS[name].default, tuple)
        out.update_from_flattened_dict({name: tuple(value) if is_tuple else value})
    return FrozenConfigDict(out)


def changed(c: FrozenConfigDict) -> dict[str, Any]:
    """The settings that have other values than their defaults, by name."""
    values = {name: operator.attrgetter(name)(c) for name in settings.SETTINGS}
    return {k: v for k, v in values.items() if v != settings.SETTINGS[k].default}


def _version() -> str:
    return pfjax.__version__  # known without being installed


def write_config(c: FrozenConfigDict, folder: epath.Path) -> None:
    """Writes `config.json`: every value, and the versions that computed with it."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers")
    versions = {
        "pfjax": _version(),
        **{p: importlib.metadata.version(p) for p in packages},
        "backend": jax.devices()[0].device_kind,
        "devices": str(jax.device_count()),
    }
    out = {"config": json.loads(c.to_json()), "versions": versions}
    storage.write_text(folder / "config.json", json.dumps(out, indent=2) + "\n")
