"""The objective of a run: one of pfjax's by name, or one of a person's own by its file."""

import dataclasses
import functools
import os
import traceback
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import FrozenConfigDict

from pfjax import objectives
from pfjax.batch import TrajectoryStats
from pfjax.infra import storage
from pfjax.objectives import Objective, ObjectiveConfig
from pfjax.targets import Target
from pfjax.tasks import reward_worker
from pfjax.tasks.reward_functions import LOCAL
from pfjax.trainer import schedules


def of_config(c: FrozenConfigDict, given: Any = None) -> ObjectiveConfig:
    """The objective of a run, that of its end where it has schedules.

    Args:
      given: what `objective=python:NAME` stands for, an `Objective` or its loss.

    Raises:
      ValueError: if one of a person's own cannot be loaded or is none.
    """
    names = {field.name for field in dataclasses.fields(ObjectiveConfig)}
    same = {name: c[name] for name in names & set(c)}
    found = schedules.parse(c.schedules)
    same["residual_clip"] = c.residual_clip or None
    same |= {k: schedules.value(found, k, c.num_steps, c[k]) for k in ("alpha", "beta")}
    out = ObjectiveConfig(c.objective, kl=c.reward_kl, **same)
    if ":" not in c.objective:
        return out
    own = given if c.objective.startswith(LOCAL) else _loaded(c.objective)
    if own is None:
        raise ValueError(
            f"--config.objective={c.objective} is an object of Python: call pfjax.fine_tune "
            "with it, or name its file, FILE.py:NAME"
        )
    if not isinstance(own, Objective) and not callable(own):
        raise _error(c.objective, f"is neither an Objective nor a loss but {own!r:.80}")
    own = own if isinstance(own, Objective) else Objective(own)
    out = ObjectiveConfig(c.objective, kl=c.reward_kl, own=own, **same)
    _check(out)
    return out


def code(spec: str) -> list[epath.Path]:
    """The file that an objective is in, if its name is of one."""
    where = spec.rpartition(":")[0]
    return [storage.place(where)] if where.endswith(".py") else []


def _loaded(spec: str) -> Any:
    there = [path for path in code(spec) if storage.exists(path)]
    return _load(spec, "".join(map(storage.read_text, there)))


@functools.lru_cache(maxsize=16)
def _load(spec: str, text: str) -> Any:
    """What a name means; again where the text of its file has changed."""
    try:
        files, name = code(spec), spec.rpartition(":")[2]
        return reward_worker.find(
            f"{storage.local_copy(files[0])}:{name}" if files else spec
        )
    except Exception as error:  # whatever a file of one's own may raise
        raise _error(spec, error) from error


def _check(c: ObjectiveConfig) -> None:
    """Raises ValueError unless loss and residual are values per trajectory that can be
    differentiated; nothing is computed."""
    if c.kind.log_z not in ("any", "group", "none"):
        raise _error(c.name, f"log_z={c.kind.log_z!r} is none of any, group, none")
    num = 3
    of_each = jax.ShapeDtypeStruct((num,), jnp.float32)
    y = TrajectoryStats(*[of_each] * len(TrajectoryStats._fields))
    y = y._replace(loss=None, residual=None, alpha=None)
    if not c.eta_cutoff:
        y = y._replace(log_p_rare=None)
    try:
        target = c.kind.target(c)
        if isinstance(target, Target):
            out = jax.eval_shape(lambda y: objectives.add_loss(y, c), y)
    except Exception as error:  # whatever a file of one's own may raise
        raise _error(c.name, error) from error
    if not isinstance(target, Target):
        raise _error(c.name, f"target gives {target!r:.80}, not a Target")
    for name in ("residual", "loss"):
        value = getattr(out, name)
        shape = getattr(value, "shape", None)
        if shape != (num,) or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype} {shape}" if shape is not None else f"{value!r:.80}"
            raise _error(
                c.name, f"{name} of {num} trajectories is {got}, not {num} floats"
            )
    others = jax.tree.map(lambda x: jnp.zeros(x.shape), y)
    total = lambda log_pf: objectives.add_loss(
        others._replace(log_pf=log_pf), c
    ).loss.sum()
    try:
        jax.eval_shape(jax.grad(total), of_each)
    except Exception as error:
        raise _error(c.name, error) from error


def _error(spec: str, what: Exception | str) -> ValueError:
    """In one line, with the line of the file where it was raised."""
    if isinstance(what, Exception):
        name = os.path.basename(spec.rpartition(":")[0])
        frames = traceback.extract_tb(what.__traceback__)
        lines = [x.lineno for x in frames if os.path.basename(x.filename) == name]
        at = f" at {name}:{lines[-1]}" if lines else ""
        said = (str(what).strip().splitlines() or [""])[0]
        is_ours = isinstance(what, ValueError) and not lines
        what = said if is_ours else f"{type(what).__name__}{at}: {said}"
    return ValueError(f"--config.objective={spec}: {what}")
