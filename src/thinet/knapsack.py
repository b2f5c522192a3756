"""One choice from each of several lists, of least error, under a bound on the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CELLS = 4000
"""Into which the range of costs is divided; a cost is rounded down, so that what just fits is found
(and what is found is to be seen to fit)."""


def knapsack(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    room: float,
    at_least: float | None = None,
) -> list[int] | None:
    """One place in each list, of least summed error, with summed costs at most `room`; or None.

    Costs may exceed the room by a cell for each list.

    Args:
        at_least: and, as nearly, at least this.
    """
    floors = [min(each) for each in costs]
    spare = room - math.fsum(floors)
    if spare < 0:
        return None
    cell = max(spare / CELLS, 1e-12)
    lost = np.zeros(CELLS + 1)
    if at_least is not None:  # a sum is met at its own cell only
        lost[1:] = np.inf
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
    first = 0 if at_least is None else max(CELLS - math.floor((room - at_least) / cell), 0)
    at = CELLS if at_least is None else first + int(np.argmin(lost[first:]))
    if not np.isfinite(lost[at]):
        return None
    places: list[int] = []
    for each, floor, which in zip(reversed(costs), reversed(floors), reversed(taken), strict=True):
        place = int(which[at])
        places.append(place)
        at -= math.floor((each[place] - floor) / cell + 1e-9)
    return places[::-1]
