"""Checkpoints of a run, by Orbax.

A checkpoint of step `s` holds what decides the future after `s` updates: the parameters,
log Z', the optimiser's state, the step, the data cursor (random numbers are made from
seed, step, ...), and the responses that are kept to be replayed; which run it is of (config
and base); and a checksum of each array.

Restoring finds, from the latest on, one that is of this run and undamaged, Orbax reading
each shard into place, whatever mesh wrote it; sets aside the damaged ones that were passed
over; and the caller cuts `metrics.jsonl` back to that step.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import UInt32
from orbax.checkpoint import v1 as ocp

from pfjax.infra import distributed, storage
from pfjax.model.transformer import Params
from pfjax.targets import Array
from pfjax.trainer.run_config import OtherRun, check_same


class Checkpoints:
    """The `checkpoints/` of one run; a context manager.

    Args:
      directory: local or `gs://`.
      keep_best: checkpoints kept beside the latest two, those of the best metric.
      best_of: which metric, and how it is measured. What checkpoints have of another is
        dropped, as it cannot be compared; an older pfjax did not say.
    """

    def __init__(self, directory: epath.Path, keep_best: int, best_of: str = ""):
        # Orbax reports every file, and what it then raises as well.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        storage.make_folder(directory)
        self._directory, self._best_of = directory, best_of
        self._remove_unusable_metrics()
        self._metrics = _read_metrics(directory)
        policies = ocp.training.preservation_policies
        latest = policies.LatestN(2)  # one should the other be damaged
        best = _Best(self._metrics, keep_best)
        kept = policies.AnyPreservationPolicy([latest, best])
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(directory),
            preservation_policy=kept,
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None  # the last save, whose thread lives until it is asked

    def __enter__(self) -> "Checkpoints":  # noqa: PYI034
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        try:
            try:
                self._end_saving()
            finally:
                self._checkpointer.close()
        except Exception:
            if kind is None:  # otherwise said already
                raise

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints there are, ascending."""
        return [x.step for x in self._checkpointer.checkpoints]

    def save(
        self,
        step: int,
        state: Any,
        about: dict[str, Any],
        metric: float | None = None,
        replay: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Copies the state and writes it in the background.

        Args:
          step, state: updates done, and arrays.
          about: ready for JSON; `identity` in it says of which run this is.
          metric: the larger, the better; without it, or `rate`, never one of the best.
          replay: more arrays, of any shapes.

        Raises:
          OSError: if this checkpoint or the one before could not be written.
        """
        if step in self.steps:
            return
        about, parts = {**about, "checksums": _checksums(state)}, {"state": state}
        if replay:
            about["replay"], parts["replay"] = _digest(replay), replay
        if metric is not None:
            self._metrics[step] = metric
        with self._said():
            self._end_saving()  # as Orbax would wait for it
            self._saving = self._checkpointer.save_checkpointables_async(
                step,
                {**parts, "about": _sealed(about)},
                # Every one, also while the one before is being written.
                force=True,
                metrics=None if metric is None else self._best(metric),
            )

    def rate(self, step: int, metric: float | None) -> None:
        """Gives a checkpoint, if there is one of the step, a metric that came after it."""
        if (
            metric is None
            or step not in self.steps
            or self._metrics.get(step) == metric
        ):
            return
        self.wait()
        self._metrics[step] = metric
        if distributed.is_first():
            text = json.dumps(self._best(metric))
            storage.write_text(self._directory / f"{step}/{_METRICS}", text)

    def _best(self, metric: float) -> dict[str, Any]:
        return {"best": metric, "of": self._best_of}

    def wait(self) -> None:
        """Returns once what was saved is on disk; raises OSError if it is not."""
        with self._said():
            self._end_saving()
            self._checkpointer.wait()

    def _end_saving(self) -> None:
        """Waits for the last save, and ends its thread and that one's files."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(
        self, abstract_state: Any, identity: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """The latest state that is undamaged, with the shardings of `abstract_state`,
        and what was saved about it, `replay` among it if there was any; None if there is no
        checkpoint.

        Raises:
          OtherRun: if it is not of the run that `identity` names.
          ValueError: if there are checkpoints and all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            _hush_abandoned_reads()
            try:
                found = self._read(step, abstract_state, identity)
            except OtherRun:
                raise
            # Whatever is wrong with files, some library has an exception for it.
            except Exception as error:  # noqa: BLE001
                reason = (str(error) or repr(error)).splitlines()[0][:300]
                damaged[step] = reason
                print(f"checkpoint {step} is damaged and passed over: {reason}")
                continue
            if damaged:
                self._set_aside(damaged)
            return found
        if damaged:
            reasons = "\n  ".join(f"{k}: {v}" for k, v in damaged.items())
            raise ValueError(
                f"no checkpoint in {self._directory} is undamaged:\n  {reasons}\n"
                "nothing was changed; bring one back, or choose another --workdir"
            )
        return None

    def _read(
        self, step: int, abstract_state: Any, identity: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        load = self._checkpointer.load_checkpointables
        about = _opened(load(step, {"about": None})["about"])
        what = f"{self._directory} holds checkpoints of another run"
        check_same(what, about["identity"], identity)
        state = load(step, {"state": abstract_state})["state"]
        _verify(_checksums(state), about["checksums"])
        if "replay" in about:
            replay = load(step, {"replay": None})["replay"]
            _verify({"replay": _digest(replay)}, about)
            about["replay"] = replay
        return state, about

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """So that they count neither as the latest nor as one of the best."""
        if distributed.is_first():
            for step in damaged:
                place = self._directory / f"damaged-{step}"
                if place.exists():
                    place.rmtree()
                (self._directory / str(step)).rename(place)
        multihost_utils.sync_global_devices("pfjax.checkpoint")
        self._checkpointer.reload()

    def _remove_unusable_metrics(self) -> None:
        """Those that are damaged, as Orbax reads them all before anything else and would
        not open; and those of another metric."""
        if distributed.is_first():
            for file in self._directory.glob(f"[0-9]*/{_METRICS}"):
                try:
                    found = json.loads(storage.read_text(file))
                    wrong = "is damaged" if "best" not in found else ""
                    if found.get("of", self._best_of) != self._best_of:
                        wrong = f"is of {found['of']}, not of {self._best_of}"
                # Bytes that are no text are a ValueError.
                except (ValueError, AttributeError):
                    wrong = "is damaged"
                if wrong:
                    print(f"{file} {wrong}: that checkpoint counts without it")
                    file.unlink()
        multihost_utils.sync_global_devices("pfjax.checkpoint")

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """Turns what Orbax raises when it cannot write into an OSError."""
        try:
            yield
        except Exception as error:
            good = [s for s in self.steps if (self._directory / str(s)).exists()]
            whole = [f"that of step {s} is whole" for s in good]
            kept = whole[-1] if whole else "there is none before it"
            lines = str(error).splitlines() or [repr(error)]
            reason = next((x for x in lines if "No space" in x), lines[0])[:500]
            raise OSError(
                f"a checkpoint could not be written to {self._directory}; {kept}. The same "
                f"command continues from there, once there is room.\n{reason}"
            ) from error


_METRICS = "metrics/metrics"  # of a checkpoint, where Orbax has it


class _Best(NamedTuple):
    """A policy of Orbax: keeps those of the best metrics, which may come after a save."""

    metrics: dict[int, float]  # by step
    number: int

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        rated = [x.step for x in checkpoints if x.step in self.metrics]
        rated.sort(key=self.metrics.__getitem__)
        best = rated[max(len(rated) - self.number, 0) :]
        return [x.step in best for x in checkpoints]


def _read_metrics(directory: epath.Path) -> dict[int, float]:
    files = {n: directory / f"{n}/{_METRICS}" for n in saved_steps(directory)}
    there = {n: x for n, x in files.items() if x.exists()}
    return {n: storage.read_json(x)["best"] for n, x in there.items()}


def check_place(folder: epath.Path) -> None:
    """Raises ValueError for a folder that checkpoints can be written to and not read from."""
    if special := set(str(_absolute(folder))) & set("*?["):
        raise ValueError(
            f"{_absolute(folder)} has {' '.join(sorted(special))} in its path, which Orbax, "
            "which reads checkpoints, takes for a pattern: choose another --workdir, or "
            "rename the folder"
        )


def saved_steps(directory: epath.Path) -> list[int]:
    """Of the checkpoints in a folder that a run may be writing to, ascending. This and
    what follows change nothing there."""
    if not directory.is_dir():
        return []
    # What is being written has another name, or in a bucket no mark of success.
    is_whole = lambda x: not storage.is_remote(x) or (x / "commit_success.txt").exists()
    found = (x for x in directory.iterdir() if x.name.isdigit() and is_whole(x))
    return sorted(int(x.name) for x in found)


def best_step(directory: epath.Path) -> int | None:
    """The one of the best metric; None if none has any."""
    found = _read_metrics(directory)
    return max(found, key=found.__getitem__, default=None)


def read_policy(
    directory: epath.Path, step: int, abstract: Params
) -> tuple[Params, dict[str, Any]]:
    """What is trained of the policy at a step, with the shardings of `abstract`, and which
    run it is of; neither log Z' nor the optimiser's state is read.

    Raises:
      ValueError: if it is damaged.
    """
    check_place(directory)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _hush_abandoned_reads()
    load, path = ocp.load_checkpointables, _absolute(directory) / str(step)
    try:
        about = _opened(load(path, {"about": None})["about"])
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            found = load(path, {"state": {"params": {"policy": abstract}}})
        params = found["state"]["params"]["policy"]
        sums = {f".params['policy']{k}": x for k, x in _checksums(params).items()}
        _verify(sums, about["checksums"])
    # Whatever is wrong with files, some library has an exception for it.
    except Exception as error:
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = (str(first) or repr(first)).splitlines()[0][:300]
        raise ValueError(
            f"checkpoint {step} of {directory} is damaged: {reason}"
        ) from error
    return params, about["identity"]


def _absolute(directory: epath.Path) -> epath.Path:
    return directory if storage.is_remote(directory) else directory.absolute()


_READ = "_read_array_index_and_device_put"


def _hush_abandoned_reads() -> None:
    """Where one read of a checkpoint fails, Orbax leaves the others to threads, at once or
    up to the end of the process, where each may print a stack of its own."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == _READ:
        return

    # When it is called, globals may be gone.
    def hook(unraisable, read=_READ, closed="Event loop is closed"):
        is_read = getattr(unraisable.object, "__qualname__", "") == read
        if not is_read and str(unraisable.exc_value) != closed:
            before(unraisable)

    hook.__name__ = _READ
    sys.unraisablehook = hook


def _sealed(about: dict[str, Any]) -> dict[str, str]:
    text = json.dumps(about)
    return {"json": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _opened(sealed: dict[str, str]) -> dict[str, Any]:
    if hashlib.sha256(sealed["json"].encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("what was saved about it has changed")
    return json.loads(sealed["json"])


def _digest(arrays: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        found.update(f"{name} {x.dtype} {x.shape}".encode())
        found.update(np.ascontiguousarray(x))
    return found.hexdigest()


def _verify(found: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in found.items():
        if value != saved[name]:
            raise ValueError(f"{name} is not what was saved")


def _checksums(tree: Any) -> dict[str, int]:
    leaves = jax.tree.leaves_with_path(_checksum_each(tree))
    return {jax.tree_util.keystr(path): int(x) for path, x in leaves}


def checksum(x: Array) -> UInt32[Array, ""]:
    """A sum of the bits of an array: any one changed value changes it. It does not depend on
    how the array is split over devices, and moves only partial sums between them."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    value = x.astype(jnp.uint8) if x.dtype == bool else x
    value = jax.lax.bitcast_convert_type(value, bits).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        index += stride * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Odd weights have inverses modulo 2^32.
    return jnp.sum(value * (2 * index + 1), dtype=jnp.uint32)


_checksum_each = jax.jit(functools.partial(jax.tree.map, checksum))
