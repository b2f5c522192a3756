"""Widths from error curves by dynamic programming over costs, to compare with the hull.

With every other group as it is, a group's cost at each width is a number, and which widths lose
least in all within the budget is a knapsack with one choice from each group (as SPDY has it,
Frantar and Alistarh, ICML 2022). Where groups multiply each other's costs, that is an approximation
around the present widths; it is made again around what it gives, and the best that fits is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from thinet.allocate import Allowed, Meter, allocate
from thinet.trace.groups import CostTerm

CELLS = 4000
"""Into which the range of costs is divided; a width's cost is rounded down, so that what just fits
is found, and what is found is seen to fit."""

TURNS = 8


def allocate_dynamic(
    choices: Sequence[Allowed], terms: Sequence[CostTerm], full: Mapping[str, int], target: float
) -> dict[str, int]:
    """As `thinet.allocate.allocate`, whose widths are the start and never better."""
    best = allocate(choices, terms, full, target)
    least = _error(choices, best)
    widths, room = best, target
    for _ in range(TURNS):
        meter = Meter(terms, full, widths)
        costs = [[meter.change(c.name, w) for w in sorted(c.between)] for c in choices]
        errors = [[c.between[w] for w in sorted(c.between)] for c in choices]
        places = _knapsack(costs, errors, room - meter.cost)
        if places is None:
            break
        found = {c.name: sorted(c.between)[p] for c, p in zip(choices, places, strict=True)}
        cost = Meter(terms, full, found).cost
        if cost <= target and _error(choices, found) < least:
            best, least = found, _error(choices, found)
        if found == widths:
            break
        room -= max(0.0, cost - target)  # what the approximation left out
        widths = found
    return best


def _error(choices: Sequence[Allowed], widths: Mapping[str, int]) -> float:
    return math.fsum(c.between[widths[c.name]] for c in choices)


def _knapsack(
    costs: Sequence[Sequence[float]], errors: Sequence[Sequence[float]], room: float
) -> list[int] | None:
    """One place in each list, of least summed error, with summed costs at most `room`; or None.

    Costs may exceed the room by a cell for each list.
    """
    floors = [min(each) for each in costs]
    spare = room - math.fsum(floors)
    if spare < 0:
        return None
    cell = max(spare / CELLS, 1e-12)
    lost = np.zeros(CELLS + 1)
    taken: list[np.ndarray] = []
    for each, their, floor in zip(costs, errors, floors, strict=True):
        now = np.full(CELLS + 1, np.inf)
        which = np.zeros(CELLS + 1, dtype=np.int64)
        for place, (cost, error) in enumerate(zip(each, their, strict=True)):
            step = math.floor((cost - floor) / cell + 1e-9)
            if step > CELLS:
                continue
            reached = np.full(CELLS + 1, np.inf)
            reached[step:] = lost[: CELLS + 1 - step] + error
            better = reached < now
            now[better], which[better] = reached[better], place
        lost = now
        taken.append(which)
    at, places = CELLS, []
    for each, floor, which in zip(reversed(costs), reversed(floors), reversed(taken), strict=True):
        place = int(which[at])
        places.append(place)
        at -= math.floor((each[place] - floor) / cell + 1e-9)
    return places[::-1]
