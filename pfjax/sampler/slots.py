"""How many samples are decoded at once, and in which shapes."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from pfjax.infra import distributed, sharding
from pfjax.model import decode_attention, delta, transformer
from pfjax.model.config import ModelConfig
from pfjax.model.transformer import Policy
from pfjax.sampler import windows

# Fraction of the free memory that a rollout may take; activations need some.
_FRACTION = 0.85
# Logits, their noise, and their sum, float32.
_LOGITS_BYTES = 12
# While a cache grows the old one, half as wide, is still there.
_GROWTH = 1.5
_SMALLEST = 4
# Of what is drawn, on one device, before more prompts are begun.
_RESULT_BYTES = 2**30
# Narrowest cache that is worth a program of its own.
_NARROWEST = 128


class NoRoom(ValueError):
    """Not even one sample fits in the memory of a device."""


def bytes_per_token(config: ModelConfig, cache_dtype: str, tensor: int = 1) -> int:
    """Bytes that the keys and values of one token take in one layer, on one device.

    Args:
      tensor: devices that key/value heads are split over, where they divide.
    """
    k = config.num_kv_heads
    k = k // tensor if k % tensor == 0 else k
    return 2 * k * config.head_dim * np.dtype(cache_dtype).itemsize


def _state_bytes(config: ModelConfig, tensor: int) -> int:
    """Bytes of the states that a sequence has in all layers, on one device."""
    num = sum(kind.window is None for kind in config.layer_kinds)
    return num and num * delta.state_bytes(config.delta, config.dtype, tensor)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the copy of the weights that a rollout reads."""
    shapes = jax.tree.leaves(transformer.abstract_params(config))
    return sum(x.size for x in shapes) * np.dtype(config.dtype).itemsize


def num_prefix_slots(slots: int, num_prompts: int, samples_per_prompt: int) -> int:
    """Prompts kept at once: four times what the slots need, for the stragglers."""
    return min(num_prompts, 4 * math.ceil(slots / samples_per_prompt))


def ladder(slots: int, backend: str) -> list[int]:
    """Numbers of slots a rollout may have, falling; each costs a program.

    Three an octave in the plain form, where an idle slot costs what a busy one does. A
    kernel reads next to nothing for it: one every two octaves.
    """
    factors, octaves = ((2, 3, 5), 1) if backend == "xla" else ((1,), 2)
    sizes = {m << e for m in factors for e in range(0, 31, octaves)}
    return [slots, *sorted((x for x in sizes if _SMALLEST <= x < slots), reverse=True)]


def response_widths(max_new_tokens: int, backend: str) -> list[int]:
    """Widths a response cache may have, growing to that of the longest response.

    They double in the plain form, which reads all of the width. For a kernel they
    only save memory: each is four times the one before.
    """
    multiple = decode_attention.WIDTH_MULTIPLE[backend]
    longest = math.ceil(max_new_tokens / multiple) * multiple
    octaves = 1 if backend == "xla" else 2
    short = [_NARROWEST << e for e in range(0, 31, octaves)]
    return [*(x for x in short if x < longest), longest]


def _free_host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            values = dict(line.split(":") for line in f)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_bytes(device: jax.Device) -> int:
    """Memory that is free on a device, or on the host it shares with its like.

    The least of all processes, which must agree.
    """
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
    else:
        free = _free_host_bytes() // jax.local_device_count()
    return int(distributed.of_all(np.array(free, np.float64)).min())


def check_prompts(
    config: ModelConfig, prompts: list[list[int]], max_new_tokens: int
) -> Int[np.ndarray, "p"]:
    """Lengths of prompts.

    Raises:
      ValueError: if one is empty, or the model has no positions for what follows it.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    transformer.check_tokens(config, prompts)
    if not len(lengths) or not lengths.min():
        raise ValueError(f"prompts must not be empty, got lengths {lengths.tolist()}")
    if lengths.max() + max_new_tokens > config.max_positions:
        raise ValueError(
            f"a prompt of {lengths.max()} tokens and {max_new_tokens} new ones exceed "
            f"the model's {config.max_positions} positions"
        )
    return lengths


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of a rollout in each of the dp_size parts of the batch."""

    dp_size: int
    slots: int
    prefix_slots: int
    prompt_width: int
    ladder: tuple[int, ...]
    widths: tuple[int, ...]
    cache_dtype: str
    backend: str
    token_bytes: int  # of a token's keys and values in one layer, on one device
    # Of the layers; 0 where no sequence outgrows it, None where a state is kept instead.
    windows: tuple[int | None, ...]
    state_bytes: int = 0  # of a sequence, in all such layers, on one device
    # Whether responses are kept beyond the windows: chains go back and draw anew.
    keeps_all: bool = False

    def response_widths(self, width: int) -> tuple[int, ...]:
        """Tokens that each layer has room for of responses of `width` tokens."""
        reach = self.windows
        if self.keeps_all:
            reach = tuple(None if w is None else 0 for w in reach)
        return windows.cache_widths(reach, width, self._multiple)

    @property
    def prompt_widths(self) -> tuple[int, ...]:
        """Tokens that each layer has room for of prompts."""
        return windows.cache_widths(self.windows, self.prompt_width, self._multiple)

    @property
    def _multiple(self) -> int:
        return decode_attention.WIDTH_MULTIPLE[self.backend]

    @property
    def cache_bytes(self) -> int:
        """On one device, when the caches are at their widest."""
        tokens = self.slots * sum(self.response_widths(self.widths[-1]))
        tokens += self.prefix_slots * sum(self.prompt_widths)
        states = (self.slots + self.prefix_slots) * self.state_bytes
        return tokens * self.token_bytes + states

    def __str__(self) -> str:
        return (
            f"{self.slots * self.dp_size} samples at once, caches of "
            f"{self.cache_bytes / 1e6:.1f} MB per device in {self.cache_dtype} "
            f"({self.slots} x {self.widths[-1]} response and {self.prefix_slots} x "
            f"{self.prompt_width} prompt tokens)"
        )


def with_most_slots(
    plan: Plan,
    config: ModelConfig,
    *,
    num_prompts: int,
    samples_per_prompt: int,
    tensor: int = 1,
    free_bytes: int,
    most: int | None = None,
) -> Plan:
    """A plan with as many slots as there are samples, if memory lasts.

    Args:
      plan: of any number of slots.
      num_prompts: of one part of the batch.
      most: slots, where they are fewer than samples.

    Raises:
      NoRoom: if not even one sample fits.
    """
    most = most or num_prompts * samples_per_prompt
    for slots in [*ladder(most, "xla"), 3, 2, 1]:
        plan = with_slots(plan, slots, num_prompts, samples_per_prompt)
        need = _GROWTH * plan.cache_bytes
        need += slots * config.vocab_size * _LOGITS_BYTES // tensor
        if need <= _FRACTION * free_bytes:
            return plan
    raise NoRoom(
        f"one sample of {plan.widths[-1]} tokens needs {need / 1e9:.2f} GB and "
        f"{free_bytes / 1e9:.2f} GB are free; lower max_new_tokens or raise mesh.tensor"
    )


def with_slots(
    plan: Plan, slots: int, num_prompts: int, samples_per_prompt: int
) -> Plan:
    """A plan with another number of slots, and what follows from it."""
    return dataclasses.replace(
        plan,
        slots=slots,
        prefix_slots=num_prefix_slots(slots, num_prompts, samples_per_prompt),
        ladder=tuple(ladder(slots, plan.backend)),
    )


def prompts_at_once(
    config: ModelConfig, samples_per_prompt: int, max_new_tokens: int
) -> int:
    """Prompts whose responses all parts of the batch have room for, at least one each.

    What is drawn stays on the devices until the last response has ended.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dp_size = 1 if mesh.empty else sharding.batch_ways(mesh)
    each = _result_bytes(config, samples_per_prompt, max_new_tokens)
    return dp_size * max(_RESULT_BYTES // each, 1)


def _result_bytes(config: ModelConfig, num_samples: int, max_new_tokens: int) -> int:
    """Of what a part of the batch has drawn: two copies, one of which the host reads, with
    room for twice its share (see `prompts_per_part`)."""
    return 4 * num_samples * max_new_tokens * (4 + 4 + config.num_choices)


def prompts_per_part(plan: Plan, num_prompts: int, samples_per_prompt: int) -> int:
    """Prompts that a part of the batch has room for: an equal share where all samples are
    decoded at once, else up to two, for the part whose responses end early."""
    equal = math.ceil(num_prompts / plan.dp_size)
    if plan.slots >= equal * samples_per_prompt:
        return equal
    return min(num_prompts, 2 * equal)


def make_plan(policy: Policy, **kwargs: Any) -> Plan:
    """`plan_for` the devices that hold a policy."""
    where = jax.tree.leaves(policy.params)[0].sharding
    device = min(where.addressable_devices, key=lambda x: x.id)
    memory = functools.partial(free_bytes, device)
    return plan_for(policy.config, sharding.kind_of(device), memory, **kwargs)


def plan_for(
    config: ModelConfig,
    devices: tuple[str, str],
    memory: Callable[[], int],
    *,
    num_prompts: int,
    samples_per_prompt: int,
    max_new_tokens: int,
    prompt_width: int,
    num_slots: int | None = None,
    most_slots: int | None = None,
    cache_dtype: str | None = None,
    backend: str | None = None,
    keeps_all: bool = False,
) -> Plan:
    """Decides what the arguments leave open; see `engine.rollout`.

    Args:
      config: of the policy.
      devices: platform and kind, see `sharding.platform`.
      memory: tells the bytes that are free on a device; asked without `num_slots`.
      most_slots: of those that memory has room for; as many as there are samples if not given.
      keeps_all: see `Plan`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dp_size = 1 if mesh.empty else sharding.batch_ways(mesh)
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    if backend is None:
        backend = decode_attention.decode_backend(*devices, config.head_dim)
    if cache_dtype is None:
        cache_dtype = config.dtype if devices[0] == "cpu" else "bfloat16"
    multiple = decode_attention.WIDTH_MULTIPLE[backend]
    prompts = math.ceil(num_prompts / dp_size)
    prompt_width = math.ceil(prompt_width / multiple) * multiple
    widths = response_widths(max_new_tokens, backend)
    longest = prompt_width + widths[-1]
    reach = [kind.window for kind in config.layer_kinds]
    plan = Plan(
        dp_size=dp_size,
        slots=1,
        prefix_slots=1,
        prompt_width=prompt_width,
        ladder=(1,),
        widths=tuple(widths),
        cache_dtype=cache_dtype,
        backend=backend,
        token_bytes=bytes_per_token(config, cache_dtype, tensor),
        windows=tuple(w if w is None or w < longest else 0 for w in reach),
        state_bytes=_state_bytes(config, tensor),
        keeps_all=keeps_all,
    )
    sizes = {"num_prompts": prompts, "samples_per_prompt": samples_per_prompt}
    if num_slots is not None:
        slots = min(math.ceil(num_slots / dp_size), prompts * samples_per_prompt)
        return with_slots(plan, slots, **sizes)
    free = memory() - weight_bytes(config) // tensor
    free -= _result_bytes(config, prompts * samples_per_prompt, max_new_tokens)
    sizes |= {"tensor": tensor, "free_bytes": free}
    most = most_slots and math.ceil(most_slots / dp_size)
    return with_most_slots(plan, config, **sizes, most=most)
