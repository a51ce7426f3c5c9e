"""What a compiled program sends between devices, read from its text (HLO)."""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


class Collective(NamedTuple):
    kind: str
    dtype: str
    shape: tuple[int, ...]  # the largest array of its result
    axes: tuple[str, ...]  # of the mesh, along which it sends
    sent: float  # bytes that a device sends each time
    times: int  # by loops whose length is known
    loops: int  # further loops around it, of a length known when they run


def collectives(text: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """The collectives of a program for `mesh`.

    Args:
      text: `compiled.as_text()`.
      mesh: whose devices, in its order, the program is for.
    """
    computations, entry = _computations(text)
    around, fused = _loops_around(computations, entry)
    found, seen = [], set()
    for name, lines in computations.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None or name not in around:
                continue
            if name in fused:  # in pieces that overlap with other work, one channel
                piece = match[2], re.search(r"channel_id=\d+", line)[0]
                if piece in seen:
                    continue
                seen.add(piece)
            group = _group(line) or list(range(mesh.size))  # none: all
            arrays = [_array(*x) for x in _SHAPE.findall(match[1])]
            dtype, shape, size = max(arrays, key=lambda x: x[2])
            kind = match[2]
            if kind == "all-reduce" and not match[3]:
                size = sum(x[2] for x in arrays)  # of several arrays at once
            times, loops = around[name]
            found.append(
                Collective(
                    kind=kind,
                    dtype=dtype,
                    shape=shape,
                    axes=_axes(group, mesh),
                    sent=_sent(kind, size, len(group)),
                    times=times,
                    loops=loops,
                )
            )
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    out: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            out[name] = []
            entry = name if head[1] else entry
        elif name:
            out[name].append(line)
    return out, entry


def _loops_around(
    computations: dict[str, list[str]], entry: str
) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """How often each computation runs: a number, and loops of unknown length; and those
    that are part of a fusion."""
    calls: dict[str, list[tuple[str, str, int, int]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            called = _CALLS.findall(line)
            for how, callees in called:
                times, loops = 1, 0
                if how == "body":
                    names = dict(called)
                    trips = _trips(
                        line,
                        computations.get(names["condition"].lstrip("%"), []),
                        computations.get(names["body"].lstrip("%"), []),
                    )
                    times, loops = (trips, 0) if trips else (1, 1)
                for callee in re.findall(r"[\w.\-]+", callees):
                    calls[name].append((callee, how, times, loops))
    around, fused, todo = {entry: (1, 0)}, set(), [entry]
    while todo:
        caller = todo.pop()
        for callee, how, times, loops in calls[caller]:
            if callee in computations and callee not in around:
                before = around[caller]
                around[callee] = (before[0] * times, before[1] + loops)
                if how == "calls":
                    fused.add(callee)
                todo.append(callee)
    return around, fused


def _trips(line: str, condition: list[str], body: list[str]) -> int | None:
    """Of a loop: as the compiler says, or as it counts up to a constant; else None."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    end = None
    for x in condition:
        compared = re.search(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\)", x)
        if compared and "direction=LT" in x:
            end = _constants(condition).get(compared[2])
            counter = re.escape(compared[1])
    if end is None:
        return None
    # The counter is an element of what the body returns: by how much does it grow?
    at = re.search(rf"%?{counter} = .*index=(\d+)", "\n".join(condition))
    root = next((x for x in body if "ROOT" in x and " tuple(" in x), "")
    elements = re.findall(
        r"%([\w.\-]+)", root.rpartition(" tuple(")[2].partition(")")[0]
    )
    if at is None or int(at[1]) >= len(elements):
        return end
    name = re.escape(elements[int(at[1])])
    grows = re.search(rf"%{name} = \S+ add\(\S+, %?([\w.\-]+)\)", "\n".join(body))
    return end // (_constants(body).get(grows[1], 1) if grows else 1)


def _constants(lines: list[str]) -> dict[str, int]:
    found = (
        re.search(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", x) for x in lines
    )
    return {x[1]: int(x[2]) for x in found if x}


def _array(dtype: str, dims: str) -> tuple[str, tuple[int, ...], int]:
    shape = tuple(int(x) for x in dims.split(",") if x)
    bits = int(re.sub(r"\D", "", dtype) or 8)
    return dtype, shape, int(np.prod(shape, dtype=np.int64)) * bits // 8


def _group(line: str) -> list[int]:
    """Devices of the first group; for a permutation, of all its steps."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    if pairs:
        steps = re.findall(r"\{(\d+),(\d+)\}", pairs[1])
        follows = {int(a): int(b) for a, b in steps}
        ring = [min(follows)]
        while follows.get(ring[-1], ring[0]) not in ring:
            ring.append(follows[ring[-1]])
        return ring
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return [int(x) for x in listed[1].split(",")]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if named:
        sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        at = [slice(None) if a in chosen else 0 for a in sizes]
        ids = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        return ids[tuple(at)].ravel().tolist()
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
    )
    if iota is None:
        return []
    numbers = lambda x: [int(y) for y in x.split(",")]
    ids = np.arange(np.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
    if iota[3]:
        ids = ids.transpose(numbers(iota[3]))
    return ids.reshape(numbers(iota[1]))[0].tolist()


def _axes(group: list[int], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    at = np.unravel_index(group, tuple(mesh.shape.values()))
    varies = (len(set(x.tolist())) > 1 for x in at)
    return tuple(a for a, v in zip(mesh.axis_names, varies, strict=True) if v)


def _sent(kind: str, size: int, devices: int) -> float:
    """Bytes a device sends in a ring, from those of the largest array there is."""
    share = (devices - 1) / devices
    return {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        # The result is a device's part.
        "reduce-scatter": float(size * (devices - 1)),
        "all-to-all": size * share,
        "collective-permute": float(size),
    }[kind]
