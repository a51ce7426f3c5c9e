"""Responses that are drawn while the policy learns, or go on while it does.

Round n draws what step n trains on. On devices of its own, which `mesh.rollout` sets apart, it
runs beside step n - 1, by the weights that this step starts from. On the learner's devices it
comes before step n, as without staleness. Either way it ends as soon as enough prompts are
complete: the responses of others go on in later rounds, under newer weights.

No token is drawn by weights of more than `max_staleness` steps before those it trains. So only
so many prompts are begun: all that were by weights of v steps, and before, can be trained on by
step v + 1 + max_staleness; and a round waits for responses that could not be later.

Which weights draw what follows from the config alone, never from how fast anything is, so that
a run has the same bits each time. A run that was killed too: no prompt is begun that could not
be trained on before the next checkpoint, where nothing is in flight then, and all begins anew.
What a preemption saves between two checkpoints lacks what is in flight; its prompts are begun
again.

References:
  Bartoldson et al., arXiv 2503.18929 (trajectory balance beside its sampler).
  Fu et al., arXiv 2505.24298 (the bound on what is begun).
"""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pfjax.batch import Rollout
from pfjax.infra import distributed, numerics, sharding
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Params
from pfjax.sampler import unstack
from pfjax.sampler.stream import Stream

# Steps that rounds run ahead on devices of their own. One overlaps the two; more would only
# make what they draw older.
AHEAD = 1
# That the end of a run waits for its actor, which may wait for a process that has failed.
_STOP_SECONDS = 60


class Cursor(NamedTuple):
    """Which prompts of the endless order have been trained on: those before `end` that are
    not `skipped`."""

    end: int = 0
    skipped: tuple[int, ...] = ()

    def after(self, ids: list[int]) -> "Cursor":
        """With these too."""
        end = max(self.end, *(i + 1 for i in ids))
        skipped = {*self.skipped, *range(self.end, end)} - {*ids}
        return Cursor(end, tuple(sorted(skipped)))


class Drawn(NamedTuple):
    """What a step trains on, and how long that took the devices of an actor."""

    ids: list[int]  # of the prompts, their places in the endless order
    indices: list[int]  # into the set of prompts
    rollout: Rollout
    votes: Rollout | None = None  # of the averaged policy, if there is one
    seconds: float = 0.0
    idle_seconds: float = 0.0  # since they ended what they drew before


class Actor:
    """What draws the responses of a run; a context manager, which ends what it is at.

    Args:
      mesh: of the devices that draw.
      make_streams: new ones, with this mesh the current one: of the policy, and of the base
        where that draws some of the responses.
      send, send_base: put what is trained of the policy, and the base, where they are read;
        see `sender`.
      join: what was drawn to prompts of these indices and ids with what else the step has.
      indices_of: of prompts by their places in the endless order.
      prompts: by these indices.
      prompts_per_step, num_steps, checkpoint_every, max_staleness: of the run.
      eval_every: of the run, which saves before it evaluates; 0 if it never does.
      ahead: steps that rounds run ahead of training; at most `max_staleness`.
    """

    def __init__(
        self,
        mesh: Mesh,
        make_streams: Callable[[], list[Stream]],
        send: Callable[[Params], Params],
        send_base: Callable[[], Params],
        join: Callable[[list[Rollout], list[int], list[int], int], Rollout],
        indices_of: Callable[[list[int]], list[int]],
        prompts: list[list[int]],
        *,
        prompts_per_step: int,
        num_steps: int,
        checkpoint_every: int,
        eval_every: int = 0,
        max_staleness: int,
        ahead: int,
    ):
        self._mesh, self._make_streams, self._join = mesh, make_streams, join
        self._send, self._send_base = send, send_base
        self._indices_of, self._prompts = indices_of, prompts
        self._num, self._num_steps = prompts_per_step, num_steps
        self._saved_every = [n for n in (checkpoint_every, eval_every) if n]
        self._max_staleness, self._ahead = max_staleness, ahead
        self._rounds: dict[int, concurrent.futures.Future[Drawn]] = {}
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon: one that waits for a process that is gone keeps no program from ending.
        self._worker = threading.Thread(
            target=self._work, name="pfjax-actor", daemon=True
        )
        self._streams: list[Stream] = []
        self._end = -1  # step of the next checkpoint
        self._is_stopped = False
        # On CPUs XLA runs programs of several devices of a process one after the other: two
        # processes that start those of two threads in other orders would wait for each other.
        is_cpu = mesh.devices.flat[0].platform == "cpu"
        gangs = len(mesh.local_devices) > 1 and jax.process_count() > 1
        self._is_in_turn = is_cpu and gangs
        self._ended = time.perf_counter()  # the last round

    def __enter__(self) -> "Actor":  # noqa: PYI034
        self._worker.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends what it is at; in all processes before the same token, if all call it."""
        self._is_stopped = True
        self._asked.put(None)
        self._worker.join(_STOP_SECONDS)

    def _work(self) -> None:
        """What the thread does: rounds, in the order in which they were asked for."""
        while asked := self._asked.get():
            done, args = asked
            try:
                done.set_result(self._round(*args))
            except BaseException as error:  # noqa: BLE001 whoever waits is told
                done.set_exception(error)

    def draw(self, params: Params, cursor: Cursor, step: int) -> Drawn:
        """The responses that a step trains on.

        Args:
          params: what is trained of the policy, before the step's updates.
          cursor: of the steps before.
        """
        if step > self._end:
            self._begin(cursor, step)
        last = min(step + self._ahead, self._end)
        new = [n for n in range(step, last + 1) if n not in self._rounds]
        if new:
            weights = self._send(params)
            for n in new:
                self._rounds[n] = concurrent.futures.Future()
                self._asked.put((self._rounds[n], (weights, step - 1, n)))
            if self._is_in_turn:
                concurrent.futures.wait([self._rounds[n] for n in new])
        return self._rounds.pop(step).result()

    def _begin(self, cursor: Cursor, step: int) -> None:
        saved = (-(-step // every) * every for every in self._saved_every)
        self._end = min(*saved, self._num_steps)
        self._streams = []  # before others take their memory
        with jax.set_mesh(self._mesh):
            self._streams = self._make_streams()
        self._ids: list[int] = []  # of the stream's prompts
        self._again, self._next = [*cursor.skipped], cursor.end

    @numerics.as_promised()  # threads begin with the settings of the process
    def _round(self, weights: Params, before: int, step: int) -> Drawn:
        """What step `step` trains on, drawn on by the weights after `before` steps."""
        self._check_stopped()
        begin = time.perf_counter()
        idle, (stream, *of_base) = begin - self._ended, self._streams
        stream.set_weights(weights, before)
        last = min(before + 1 + self._max_staleness, self._end)
        number = (last - (step - 1)) * self._num - len(stream.held)
        new = [self._next_id() for _ in range(number)]
        self._ids += new
        prompts = [self._prompts[i] for i in self._indices_of(new)]
        for s in self._streams:
            s.add(prompts, new, is_last=last == self._end)
        with jax.set_mesh(self._mesh):
            stream.draw_until(lambda: self._is_enough(stream, step))
            chosen = sorted(self._oldest_complete(stream))
            drawn = [stream.take(chosen), *(self._of_base(s, chosen) for s in of_base)]
        ids = [self._ids[q] for q in chosen]
        indices = self._indices_of(ids)
        rollout = self._join(drawn, indices, ids, step)
        self._ended = time.perf_counter()
        seconds = {"seconds": self._ended - begin, "idle_seconds": idle}
        return Drawn(ids, indices, rollout, **seconds)

    def _oldest_complete(self, stream: Stream) -> list[int]:
        age = lambda q: (stream.oldest(q), q)
        return sorted(stream.complete(), key=age)[: self._num]

    def _is_enough(self, stream: Stream, step: int) -> bool:
        """Whether a step's prompts are complete and all others can still be trained on in
        time: so many per step, those first that have to be."""
        self._check_stopped()
        chosen = self._oldest_complete(stream)
        if len(chosen) < self._num:
            return False
        others = set(stream.held) - set(chosen)
        last = sorted(stream.oldest(q) + 1 + self._max_staleness for q in others)
        return all(n >= step + 1 + i // self._num for i, n in enumerate(last))

    def _of_base(self, stream: Stream, chosen: list[int]) -> Rollout:
        """What the base says to the same prompts; those to others go on."""

        def is_enough() -> bool:
            self._check_stopped()
            return set(chosen) <= set(stream.complete())

        stream.set_weights(self._send_base(), 0)
        stream.draw_until(is_enough)
        return stream.take(chosen)

    def _check_stopped(self) -> None:
        """Raises CancelledError if it is to stop in any process; all ask as often."""
        with jax.set_mesh(self._mesh):
            (is_stopped,) = distributed.any_of((self._is_stopped,))
        if is_stopped:
            raise concurrent.futures.CancelledError

    def _next_id(self) -> int:
        if self._again:
            return self._again.pop(0)
        self._next += 1
        return self._next - 1


def sender(
    model: ModelConfig, frozen: Params, learner: Mesh, actor: Mesh
) -> Callable[[Params], Params]:
    """What puts the trained parameters of a policy where a stream reads them.

    Layer by layer they are put together on the learner's devices, in the type of the
    computation, and copied to the actor's, if these are others: each from one of its own
    process. With adapters the frozen weights are sent once.

    Args:
      frozen: of the policy's parameters; empty without adapters.
      learner: its devices as rollouts group them, with the actor's "tensor".

    Raises:
      ValueError: if a process draws by a part of the weights that it does not learn.
    """
    if lacking := _parts(actor) - _parts(learner):
        process, part = min(lacking)
        raise ValueError(
            f"--config.mesh.rollout: process {process} draws by part {part} of the weights, "
            "which it does not learn. Set --config.rollout_tensor to a number that divides "
            "the devices of a process that draw, and those that learn"
        )

    def place(f: Callable[..., Params], *args: Any, **static: Any) -> Params:
        out = f(*args, **static)
        return out if learner == actor else jax.tree.map(to_actor, out)

    def to_actor(x: jax.Array) -> jax.Array:
        spec = getattr(x.sharding, "spec", PartitionSpec())
        return sharding.copied(x, NamedSharding(actor, spec))

    def send(params: Params) -> Params:
        with jax.set_mesh(learner):
            return unstack.weights(model, params, run=place)

    if not frozen:
        return send
    fixed = send(frozen)

    def send_adapters(params: Params) -> Params:
        pairs = zip(fixed["layers"], send(params)["layers"], strict=True)
        return {**fixed, "layers": [{**x, **y} for x, y in pairs]}

    return send_adapters


def _parts(mesh: Mesh) -> set[tuple[int, int]]:
    """Which process has which part of the weights, along "tensor", the last axis."""
    found = np.ndenumerate(mesh.devices)
    return {(device.process_index, place[-1]) for place, device in found}
