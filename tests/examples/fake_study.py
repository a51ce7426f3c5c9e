"""A study by hand: what a base says to two prompts, and results of runs."""

import types

import numpy as np

from examples.study import tables
from examples.study.methods import Base


def listed(log_p0, length, is_correct, log_p_rare=0.0):
    log_p0, length, is_correct = map(np.array, (log_p0, length, is_correct))
    texts = [str(i) for i in range(len(log_p0))]
    return types.SimpleNamespace(
        problem=None,
        texts=texts,
        log_p0=log_p0,
        length=length,
        is_correct=is_correct,
        log_p_rare=np.broadcast_to(log_p_rare, log_p0.shape),
    )


def base():
    """Two prompts, of three responses and of one."""
    of_world = types.SimpleNamespace(name="sums")
    rows = [
        listed(
            np.log([0.5, 0.3, 0.2]), [1, 2, 3], [False, True, True], [0.0, 0.0, -1.0]
        ),
        listed(np.log([1.0]), [2], [True]),
    ]
    return Base(of_world, None, rows)


def run(method, base, seed, accuracy=0.0, **more):
    values = {"accuracy": accuracy, "distinct_correct": 1.0, "distinct": 2.0}
    values |= {"length": 10.0, "tokens": 1000, "fell_below_base": 0.0}
    found = {"world": "sums", "method": method, "base": base, "seed": seed}
    return found | values | more


def world(**more):
    value = lambda x: [run("", b, 0, x + 0.1 * b) for b in range(2)]
    runs = [
        run(m, b, s, at + 0.1 * b + 0.001 * s, total_variation=0.02)
        for m, at in (("powerflow", 0.8), ("tb_traj", 0.1), ("grpo", 0.85))
        for b in range(2)
        for s in range(3)
    ]
    known = {"base": 0.5, "target": 0.8, "powerflow": 0.8, "tb_traj": 0.2} | more
    predictions = {k: value(x) for k, x in known.items()}
    return tables.World("sums", 4.0, runs[::-1], predictions)


def cells_of(table):
    lines = [x for x in table.splitlines() if x.startswith("|")]
    rows = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
