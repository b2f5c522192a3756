"""Widths from error curves by dynamic programming over costs, to compare with the hull.

With every other group as it is, a group's cost at each width is a number, and which widths lose
least in all within the budget is a knapsack with one choice from each group (as SPDY has it,
Frantar and Alistarh, ICML 2022). Where groups multiply each other's costs, that is an approximation
around the present widths; it is made again around what it gives, and the best that fits is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thinet.allocate import allocate
from thinet.hull import Allowed, Meter, summed_error
from thinet.trace.groups import CostTerm

TURNS = 8


def allocate_dynamic(
    choices: Sequence[Allowed], terms: Sequence[CostTerm], full: Mapping[str, int], target: float
) -> dict[str, int]:
    """As `thinet.allocate.allocate`, whose widths are the start and never better."""
    best = allocate(choices, terms, full, target)
    least = summed_error(choices, best)
    widths, room = best, target
    for _ in range(TURNS):
        found = Meter(terms, full, widths).around(choices, room)
        if found is None:
            break
        cost = Meter(terms, full, found).cost
        if cost <= target and summed_error(choices, found) < least:
            best, least = found, summed_error(choices, found)
        if found == widths:
            break
        room -= max(0.0, cost - target)  # what the approximation left out
        widths = found
    return best
