"""The collectives of a compiled program, read from its text (HLO)."""

import math
import re
from typing import NamedTuple

import numpy as np

from pfjax.infra.sharding import AnyMesh

# Bytes that one of n devices sends in a ring, as a multiple of those of the result.
_RING = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,  # the result is one device's part
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_COMPUTATION = re.compile(
    r"^(ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}$", re.MULTILINE | re.DOTALL
)
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_RING)})(-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
_CALLERS = "calls|to_apply|body|condition|branch_computations|called_computations"
_CALLS = re.compile(rf"({_CALLERS})=(\{{[^}}]*\}}|%?[\w.\-]+)")


class Collective(NamedTuple):
    """One exchange between devices, as a program states it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # the largest array of its result
    axes: tuple[str, ...]  # mesh axes along which it sends
    sent: float  # bytes that one device sends each time
    times: int  # product of the lengths of the loops around it, where known
    loops: int  # loops around it whose length only the running program knows


def collectives(text: str, mesh: AnyMesh) -> list[Collective]:
    """Lists the collectives of a program, from `compiled.as_text()` and its mesh."""
    matches = list(_COMPUTATION.finditer(text))
    computations = {x[2]: x[3] for x in matches}
    entry = next(x[2] for x in matches if x[1])
    repeats, fused = _repeats(computations, entry)
    found, seen = [], set()
    for name, body in computations.items():
        for line in body.splitlines() if name in repeats else ():
            if not (match := _COLLECTIVE.search(line)):
                continue
            result, kind, is_start = match.groups()
            if name in fused:
                # Fused with other work it is written in pieces, all on one channel.
                piece = kind, re.search(r"channel_id=\d+", line)[0]
                if piece in seen:
                    continue
                seen.add(piece)
            group = _group(line) or list(range(mesh.size))  # none stated: all devices
            if len(group) == 1:
                continue  # nothing is sent
            arrays = [_array(*x) for x in _SHAPE.findall(_results(result, is_start))]
            dtype, shape, size = max(arrays, key=lambda x: x[2])
            if not is_start or result.startswith("(("):
                size = sum(x[2] for x in arrays)  # several arrays travel at once
            if name.startswith("all-reduce-scatter"):
                # How compilers for TPUs write it: of what is summed, a part is kept.
                kind, size = "reduce-scatter", size // len(group)
            sent = size * _RING[kind](len(group))
            at = np.unravel_index(group, tuple(mesh.shape.values()))
            axes = tuple(a for a, x in zip(mesh.shape, at, strict=True) if np.ptp(x))
            found.append(Collective(kind, dtype, shape, axes, sent, *repeats[name]))
    return found


def _results(types: str, is_start: str | None) -> str:
    """Types of what a collective makes; before them, when it starts one, may be those of
    what it takes, in brackets of their own."""
    types = re.sub(r"\{[^}]*\}", "", types)  # layouts, which have brackets too
    nested = is_start and re.match(r"\(\([^()]*\),", types)
    return types[nested.end() :] if nested else types


def _repeats(
    computations: dict[str, str], entry: str
) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Follows calls from the entry: `times` and `loops` (see `Collective`) of each
    computation that runs, and which of them are fusions."""
    repeats, fused, todo = {entry: (1, 0)}, set(), [entry]
    while todo:
        caller = todo.pop()
        times, loops = repeats[caller]
        for line in computations[caller].splitlines():
            called = _CALLS.findall(line)
            for how, callees in called:
                trips = 1
                if how == "body":
                    names = (dict(called)[x].lstrip("%") for x in ("condition", "body"))
                    trips = _trips(line, *(computations.get(x, "") for x in names))
                for callee in re.findall(r"[\w.\-]+", callees):
                    if callee in computations and callee not in repeats:
                        repeats[callee] = times * (trips or 1), loops + (not trips)
                        todo.append(callee)
                        if how == "calls":
                            fused.add(callee)
    return repeats, fused


def _trips(line: str, condition: str, body: str) -> int | None:
    """Length of a loop: as the compiler notes it, or as the loop counts up to a
    constant; None when only the running program knows."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    less = r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\).*direction=LT"
    compared = re.search(less, condition)
    end = compared and _constants(condition).get(compared[2])
    if not end:
        return None
    # The counter is an element of the tuple that the body returns. It may grow by more
    # than one: the compiler unrolls loops.
    counter = re.search(rf"%?{re.escape(compared[1])} = .*index=(\d+)", condition)
    returned = re.search(r"ROOT .* tuple\((.*?)\)", body)
    elements = re.findall(r"%([\w.\-]+)", returned[1]) if returned else []
    if counter is None or int(counter[1]) >= len(elements):
        return end
    name = re.escape(elements[int(counter[1])])
    grows = re.search(rf"%{name} = \S+ add\(\S+, %?([\w.\-]+)\)", body)
    return end // (_constants(body).get(grows[1], 1) if grows else 1)


def _constants(computation: str) -> dict[str, int]:
    pattern = r"([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)"
    return {name: int(x) for name, x in re.findall(pattern, computation)}


def _array(dtype: str, dims: str) -> tuple[str, tuple[int, ...], int]:
    """The type, the shape and the bytes of an array."""
    shape, bits = _integers(dims), int(re.sub(r"\D", "", dtype) or 8)
    return dtype, shape, math.prod(shape) * bits // 8


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x)


def _group(line: str) -> list[int]:
    """Devices that exchange with each other, in the first such group; of a permutation,
    those that its first cycle visits. Empty when the line states none."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        follows = dict(map(_integers, re.findall(r"\{(\d+,\d+)\}", pairs[1])))
        ring = [min(follows)]
        while follows.get(ring[-1], ring[0]) not in ring:
            ring.append(follows[ring[-1]])
        return ring
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return list(_integers(listed[1]))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        chosen = re.findall(r"'(\w+)'", named[2])
        return ids[*(slice(None) if a in chosen else 0 for a in sizes)].ravel().tolist()
    pattern = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if not (iota := re.search(pattern, line)):
        return []
    groups, dims, order = (_integers(x or "") for x in iota.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order or None).reshape(groups)[0].tolist()
