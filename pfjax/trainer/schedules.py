"""Settings by training step: piecewise linear between points, constant outside them.

    --config.schedules=alpha:1@1,4@100,beta:0@1,2@50

takes alpha from 1 at step 1 to 4 at step 100, where it stays, and beta from 0 to 2 at step
50. Which settings may have a schedule is declared in `settings`.
"""

import math
from collections.abc import Mapping

import numpy as np

from pfjax.trainer import settings

Points = tuple[tuple[int, float], ...]  # steps, increasing, and values


def parse(text: str) -> dict[str, Points]:
    """The points of each setting that has a schedule.

    Raises:
      ValueError: for what is none, a setting that takes none, or a value out of bounds.

    >>> parse("alpha:1@1,4@100,beta:2@50")
    {'alpha': ((1, 1.0), (100, 4.0)), 'beta': ((50, 2.0),)}
    """
    out: dict[str, Points] = {}
    name = ""
    for part in filter(None, (p.strip() for p in text.split(","))):
        start, colon, point = part.rpartition(":")
        if colon:
            name = start.strip()
            _check_name(text, name)
            if name in out:
                raise ValueError(f"--config.schedules={text}: {name} is given twice")
            out[name] = ()
        elif not name:
            _fail(text, f"{part!r} comes before any setting")
        out[name] += (_point(text, name, point.strip()),)
        steps = [step for step, _ in out[name]]
        if sorted(set(steps)) != steps:
            _fail(text, f"the steps of {name} must increase, got {steps}")
    return out


def value(
    schedules: Mapping[str, Points], name: str, step: int, default: float
) -> float:
    """What a setting is at a training step, `default` if it has no schedule.

    >>> s = parse("alpha:1@1,4@100")
    >>> [value(s, "alpha", step, 2.0) for step in (1, 34, 100, 500)]
    [1.0, 2.0, 4.0, 4.0]
    >>> value(s, "beta", 1, 0.5)
    0.5
    """
    if name not in schedules:
        return default
    steps, values = zip(*schedules[name], strict=True)
    return float(np.interp(step, steps, values))


def _check_name(text: str, name: str) -> None:
    allowed = [k for k, s in settings.SETTINGS.items() if s.may_vary]
    if name not in allowed:
        near = settings.nearest(name)
        hint = f"; did you mean {near}?" if near in allowed else ""
        raise ValueError(
            f"--config.schedules={text}: {name!r} is no setting that has a schedule"
            f"{hint} ({', '.join(allowed)})"
        )


def _point(text: str, name: str, point: str) -> tuple[int, float]:
    number, _, step = point.partition("@")
    try:
        found = int(step), float(number)
    except ValueError:
        _fail(text, f"{point!r} is no VALUE@STEP")
    setting = settings.SETTINGS[name]
    if not setting.allows(found[1]):
        limits = setting.bounds() if math.isfinite(found[1]) else "finite"
        raise ValueError(
            f"--config.schedules={text}: {name} must be {limits}, got {point}"
        )
    if found[0] < 0:
        _fail(text, f"steps must not be negative, got {point}")
    return found


def _fail(text: str, what: str) -> None:
    raise ValueError(
        f"--config.schedules={text}: {what}; write NAME:VALUE@STEP,VALUE@STEP, as in "
        "alpha:1@1,4@100"
    )
