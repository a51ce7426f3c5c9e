"""The host's part of a rollout.

Samples wait in queues, one per part of the batch; a slot whose sample has ended takes the
next one on the device. The host looks every few steps, one look behind the devices: it
deals the next prompts to the parts that will need them first and prefills them, widens
the caches when the longest sample needs it, and takes slots away when no sample waits for
one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pfjax.batch import Rollout
from pfjax.infra import shard_map, sharding
from pfjax.packing import pack_prompts
from pfjax.sampler import buffers, decode, limits, resize, slots
from pfjax.sampler.buffers import Queue, Results, SamplerState, Settings, Slots
from pfjax.sampler.options import StopConditions
from pfjax.targets import Array

# Prompt tokens that one prefill runs at most.
PREFILL_TOKENS = 4096


class Finished(NamedTuple):
    """One response, as `on_finish` receives it."""

    prompt: int  # index into the prompts given
    sample: int
    tokens: np.ndarray  # int32 [n]
    log_probs: np.ndarray  # float32 [n]
    is_stopped: bool  # by a stop token or string, rather than cut


class Scheduler:
    """One rollout: its device buffers, and what the host knows of them.

    D parts in all. Sample j of a prompt is number e * g + j of its part's queue, e being the
    prompt's entry there and g how many samples of each are drawn. Entries are taken in order;
    a `Stream` gives them back.
    """

    def __init__(
        self,
        settings: Settings,
        state: SamplerState | None,
        prompts: list[list[int]],
        prompt_ids: list[int] | None,
        max_new_tokens: int,
        stop: StopConditions,
        on_finish: Callable[[list[Finished]], None] | None,
        samples: range,
        room: int | None = None,  # for so many prompts at once; None: all
        alpha: Sequence[float] | np.ndarray | None = None,  # of each prompt
    ):
        plan, most = settings.plan, settings.samples_per_prompt
        d, room = plan.dp_size, len(prompts) if room is None else room
        per_part = slots.prompts_per_part(plan, room, most)
        self.plan, self.settings, self.state = plan, settings, state
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.stop, self.on_finish, self.samples = stop, on_finish, samples
        ids = range(len(prompts)) if prompt_ids is None else prompt_ids
        self.ids = np.array([*ids], np.int32)
        # Of each prompt, and of those in prefix slots, for a policy for every alpha.
        self.alpha = np.array([] if alpha is None else alpha, np.float32)
        self.has_alpha = bool(settings.config.alpha_range)
        self.prefix_alpha = np.ones((d, plan.prefix_slots), np.float32)
        self.queue_alpha = np.ones((d, per_part), np.float32)
        self.num_dealt = 0  # of the prompts, in their order
        self.dealt: list[list[int]] = [[] for _ in range(d)]  # to each part
        self.entry: dict[int, tuple[int, int]] = {}  # part and entry of a prompt
        self.vacant = [[*range(per_part)] for _ in range(d)]  # entries of each part
        self.order = np.zeros((d, per_part), np.int32)  # entries as they are begun
        self.prompt_id = np.zeros((d, per_part), np.int32)
        self.last_token = np.zeros((d, per_part), np.int32)
        self.prefix_slot = np.zeros((d, per_part), np.int32)
        self.prompt_length = np.zeros((d, plan.prefix_slots), np.int32)
        self.limit = max_new_tokens
        # Room for all G, so that any number of them runs the same programs.
        self.cut = np.zeros((d, per_part * most), np.int32)  # length; 0 for not cut
        self.known = np.zeros_like(self.cut)  # tokens seen of each sample
        self.length = np.zeros_like(self.cut)  # of those seen to have ended
        self.is_reported = np.zeros(self.cut.shape, bool)
        # A look costs about a millisecond; a sample that has ended idles half of this.
        self.steps = min(max(max_new_tokens // 64, 8), 64)
        self.sizes = resize.Sizes(plan.slots, plan.widths[0], most)
        # The slots as last seen: nothing has begun.
        self.sample = np.full((d, plan.slots), self.cut.shape[1])
        self.drawn = np.zeros((d, plan.slots), np.int32)
        self.begun = np.zeros(d, np.int32)
        self.on_device = buffers.start(
            self._queue(), s=settings, width=plan.widths[0], new=max_new_tokens
        )

    def to_end(self) -> Rollout:
        """Draws all samples."""
        self._draw_until(lambda: not (self._is_waiting() or self._is_busy().any()))
        return self._collect()

    def _draw_until(
        self, is_enough: Callable[[], bool]
    ) -> tuple[Slots, Results] | None:
        """Goes on until what the host has seen is enough; returns what it has not seen."""
        before = None
        while not is_enough():
            self._admit()
            self._resize()
            now = self._decode()
            # The devices are at work on `now` while the host looks at what was before.
            if before is not None:
                self._look(*before)
            before = now
        return before

    def _is_busy(self) -> np.ndarray:
        return self.sample < self.cut.shape[1]

    def _is_waiting(self) -> bool:
        """Whether samples are left that have not begun."""
        is_left = self.num_dealt < len(self.prompts)
        return is_left or bool((self.begun < self._num_ready()).any())

    def _num_ready(self) -> np.ndarray:
        """Samples of each part whose prompts have been prefilled."""
        return np.array([len(x) for x in self.dealt], np.int32) * len(self.samples)

    def _queue(self) -> Queue:
        d, g = self.prefix_slot.shape[0], len(self.samples)
        return Queue(
            # Copies: they change while devices read them.
            order=self.order.flatten(),
            prompt_id=self.prompt_id.flatten(),
            last_token=self.last_token.flatten(),
            prefix_slot=self.prefix_slot.flatten(),
            ready=self._num_ready(),
            per_prompt=np.full(d, g, np.int32),
            first=np.full(d, self.samples.start, np.int32),
            limit=np.full(d, self.limit, np.int32),
            steps=np.full(d, self.steps, np.int32),
            is_cut=(self.cut > 0).ravel(),
            alpha=self.queue_alpha.flatten() if self.has_alpha else None,
        )

    def _decode(self) -> tuple[Slots, Results]:
        prompts, *before = self.on_device
        args = (self.state, prompts, self._queue(), *before)
        grid = {"samples_per_prefix": self.sizes.samples_per_prefix}
        of_slots, cache, results = decode.decode(*args, s=self.settings, **grid)
        self.on_device = (prompts, of_slots, cache, results)
        return of_slots, results

    def _look(self, of_slots: Slots, results: Results) -> None:
        """Waits for what the devices computed, and works on it."""
        small = (of_slots.sample, of_slots.drawn, of_slots.begun, results.length)
        sample, drawn, self.begun, length = sharding.fetch(small)
        by_part = (x.reshape(self.plan.dp_size, -1) for x in (sample, drawn, length))
        self.sample, self.drawn, self.length = by_part
        part, slot = np.nonzero(self._is_busy())
        before, self.known = self.known, np.maximum(self.known, self.length)
        self.known[part, self.sample[part, slot]] = self.drawn[part, slot]
        if self.stop.stop_strings:
            self._cut_at_strings(before, results)
        if self.stop.max_total_tokens is not None:
            known = np.where(self.cut > 0, self.cut, self.known)
            budget = self.stop.max_total_tokens
            self.limit = limits.common_length(known, self.limit, budget)
        elif self.on_finish is not None:
            length = np.where(self.cut > 0, self.cut, self.length)
            at = self._not_reported(length)
            # Choices, the most by far, are fetched once, at the end.
            rows = self._rows(results._replace(choices=None), *at)
            is_stopped = rows.is_stopped | (self.cut[at] > 0)
            self._report(at, rows._replace(length=length[at], is_stopped=is_stopped))

    def _admit(self) -> None:
        """Deals the next prompts, each to the part that has the least to do, when enough
        prefix slots are free to be worth it."""
        g, d, waiting = len(self.samples), self.plan.dp_size, range(len(self.prompts))
        waiting = waiting[self.num_dealt :]
        free = [self._free_prefix_slots(part) for part in range(d)]
        # Samples beyond those for which a slot is idle.
        ahead = self._num_ready() - self.begun - (~self._is_busy()).sum(axis=1)
        # One part takes all it has room for. Several keep two rounds of their slots: what
        # is dealt late goes to those whose responses turn out to end early.
        enough = 2 * self.sizes.slots if d > 1 else np.inf
        chosen: list[list[tuple[int, int]]] = [[] for _ in range(d)]
        for q in waiting:
            room = [
                part
                for part in range(d)
                if len(chosen[part]) < len(free[part]) and ahead[part] < enough
            ]
            if not room:
                break
            part = min(room, key=lambda part: (ahead[part], part))
            chosen[part].append((q, free[part][len(chosen[part])]))
            ahead[part] += g
        num = [len(pairs) for pairs in chosen]
        is_worth_it = max(num) >= max(self.plan.prefix_slots // 4, 1)
        if waiting and (is_worth_it or sum(num) == len(waiting)):
            self._prefill(chosen)

    def _free_prefix_slots(self, part: int) -> list[int]:
        """Those that a part may fill: no more than it has room for prompts."""
        g, order = len(self.samples), self.order[part]
        waiting = np.arange(self.begun[part] // g, len(self.dealt[part])) % len(order)
        drawn_from = self.sample[part][self._is_busy()[part]] // g
        in_use = np.concatenate([order[waiting], drawn_from])
        taken = set(self.prefix_slot[part, in_use].tolist())
        free = [x for x in range(self.plan.prefix_slots) if x not in taken]
        return free[: len(self.vacant[part])]

    def _prefill(self, chosen: list[list[tuple[int, int]]]) -> None:
        """Fills prefix slots: for each part of the batch, numbers of prompts and of slots."""
        width = self.plan.prompt_width
        packed = []
        for part, pairs in enumerate(chosen):
            prompts = [self.prompts[q][:-1] for q, _ in pairs]
            places = np.array([-1, *(x for _, x in pairs)], np.int32)
            rows = pack_prompts(prompts, width)
            packed.append((*rows, places[rows[-1]]))
            for (q, prefix_slot), prompt in zip(pairs, prompts, strict=True):
                at = self.entry[q] = part, self.vacant[part].pop(0)
                turn = len(self.dealt[part]) % self.order.shape[1]
                self.order[part, turn] = at[1]
                self.prompt_id[at] = self.ids[q]
                self.last_token[at] = self.prompts[q][-1]
                self.prefix_slot[at] = prefix_slot
                self.prompt_length[part, prefix_slot] = len(prompt)
                if self.has_alpha:
                    self.queue_alpha[at] = self.alpha[q]
                    self.prefix_alpha[part, prefix_slot] = self.alpha[q]
                self.dealt[part].append(q)
            self.num_dealt += len(pairs)
        num_rows = max(len(tokens) for tokens, *_ in packed)
        # Powers of two: few programs.
        batch = min(1 << (num_rows - 1).bit_length(), max(PREFILL_TOKENS // width, 1))
        num_rows = -(-num_rows // batch) * batch
        shape = (len(packed), num_rows, width)
        args = [np.full(shape, padding, np.int32) for padding in (0, 0, 0, -1)]
        for part, rows in enumerate(packed):
            for whole, x in zip(args, rows, strict=True):
                whole[part, : len(x)] = x
        for i in range(0, num_rows, batch):
            prompts = decode.prefill(
                self.state,
                self.on_device[0],
                *(x[:, i : i + batch].reshape(-1, width) for x in args),
                self.prompt_length.flatten(),
                self.prefix_alpha.flatten() if self.has_alpha else None,
                s=self.settings,
            )
            self.on_device = (prompts, *self.on_device[1:])

    def _resize(self) -> None:
        """Takes slots away when no sample waits for one; widens the caches in time."""
        now, is_busy = self.sizes, self._is_busy()
        size, _, samples_per_prefix = now
        if not self._is_waiting():
            busy = is_busy.sum(axis=1).max()
            size = min(x for x in self.plan.ladder if busy <= x <= size)
        # What is in flight, and what is dispatched next.
        longest = int((self.drawn * is_busy).max()) + 2 * self.steps
        longest = min(longest, self.max_new_tokens)
        width = next(x for x in self.plan.widths if x >= longest)
        if size == now.slots:
            width = max(width, now.width)
        if (size, width) == now[:2]:
            return
        prompts, *_, results = self.on_device
        if size < now.slots:
            # As soon as there are no more slots than prefix slots, one prompt each.
            private_prefix = size <= len(prompts.length) // self.plan.dp_size
            samples_per_prefix = 1 if private_prefix else min(samples_per_prefix, size)
        self.sizes = resize.Sizes(size, width, samples_per_prefix)
        resized = resize.resize(
            *self.on_device[:3], s=self.settings, before=now, after=self.sizes
        )
        self.on_device = (*resized, results)

    def _cut_at_strings(self, checked: np.ndarray, results: Results) -> None:
        new = np.nonzero((self.known > checked) & (self.cut == 0))
        how = (self.stop.stop_strings, self.stop.decode_text)
        tokens = self._rows(results.tokens, *new)
        for part, n, row in zip(*new, tokens, strict=True):
            known = row[: self.known[part, n]].tolist()
            num_checked = int(checked[part, n])
            self.cut[part, n] = limits.stop_string_end(known, num_checked, *how)

    def _ended(self, results: Results) -> Results:
        """On the host, `[D, N, ...]`, with what the host has cut."""
        split = lambda x: x.reshape(*self.cut.shape, *x.shape[1:])
        ended, is_cut = jax.tree.map(split, sharding.fetch(results)), self.cut > 0
        return ended._replace(
            length=np.where(is_cut, self.cut, ended.length),
            is_stopped=ended.is_stopped | is_cut,
        )

    def _rows(self, x: Any, part: np.ndarray, n: np.ndarray) -> Any:
        """On the host, of these samples alone: all together are too many for each look."""
        num = np.bincount(part, minlength=self.plan.dp_size)
        # Of each within its part; as `np.nonzero` has them, they stand part by part.
        place = np.arange(len(part)) - np.repeat(np.cumsum(num) - num, num)
        # Powers of two: few programs.
        width = 1 << max(int(num.max()) - 1, 0).bit_length()
        at = np.zeros((len(num), width), np.int32)
        at[part, place] = n
        split = lambda x: x.reshape(*at.shape, *x.shape[1:])[part, place]
        return jax.tree.map(split, sharding.fetch(_taken(x, at.ravel())))

    def _not_reported(self, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Parts and numbers of the responses that have ended since the last time."""
        return np.nonzero((length > 0) & ~self.is_reported)

    def _report(self, at: tuple[np.ndarray, np.ndarray], ended: Results) -> None:
        """Passes on responses."""
        g = len(self.samples)
        finished = [
            Finished(
                prompt=self.dealt[part][int(n) // g],
                sample=self.samples[int(n) % g],
                tokens=ended.tokens[i, :upto],
                log_probs=ended.log_probs[i, :upto],
                is_stopped=bool(ended.is_stopped[i]),
            )
            for i, (part, n, upto) in enumerate(zip(*at, ended.length, strict=True))
        ]
        if finished:
            self.on_finish(finished)
        self.is_reported[at] = True

    def _collect(self) -> Rollout:
        _, of_slots, _, results = self.on_device
        ended = self._ended(results)
        # The budget's length cuts some on the devices, and some that ended past it.
        length = np.where(ended.length > 0, ended.length, self.limit)
        is_stopped = ended.is_stopped & (length <= self.limit)
        # Samples of prompts that only fill up the last part never began.
        is_real = np.arange(length.shape[1]) < self._num_ready()[:, None]
        length = np.where(is_real, np.minimum(length, self.limit), 0)
        ended = ended._replace(length=length, is_stopped=is_stopped)
        if self.on_finish is not None:
            at = self._not_reported(ended.length)
            rows = jax.tree.map(lambda x: x[at], ended._replace(choices=None))
            self._report(at, rows)

        slot_steps = int(sharding.fetch(of_slots.slot_steps).sum())
        return self._as_rollout(ended, range(len(self.prompts)), slot_steps)

    def _as_rollout(
        self, ended: Results, numbers: Sequence[int], slot_steps: int
    ) -> Rollout:
        """The samples of these prompts."""
        g = len(self.samples)

        def by_prompt(x: np.ndarray) -> np.ndarray:
            at = (self.entry[q] for q in numbers)
            return np.stack([x[part, e * g : (e + 1) * g] for part, e in at])

        return Rollout(
            tokens=by_prompt(ended.tokens),
            lengths=by_prompt(ended.length),
            log_probs=by_prompt(ended.log_probs),
            finished=by_prompt(ended.is_stopped),
            slot_steps=slot_steps,
            choices=jax.tree.map(by_prompt, ended.choices),
            alpha=self.alpha[[*numbers]] if self.has_alpha else None,
        )


@jax.jit
def _taken(x: Any, at: Array) -> Any:
    """Rows of arrays, in each part of the batch its own."""
    take = lambda x, at: jax.tree.map(lambda x: x[at], x)
    return shard_map.over_batch(take, 0)(x, at)
