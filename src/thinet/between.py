"""Widths of which the cost lies between two bounds.

A budget is to be used, not only kept. Where the next unit of one group (a head) saves more than
was asked for and loses next to nothing, the least error lies far below the budget, and with all
other groups whole there is nothing to give back. What is wanted then is the least error among the
widths that use the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from thinet.hull import Allowed, Meter, summed_error
from thinet.trace.groups import CostTerm

TURNS = 12


def allocate_between(
    choices: Sequence[Allowed],
    terms: Sequence[CostTerm],
    full: Mapping[str, int],
    enough: float,
    target: float,
) -> dict[str, int] | None:
    """The least error of the widths that cost from `enough` to `target`; None if none is found.

    With every other group as it is, a group's cost at each width is a number; a knapsack over these
    numbers gives new widths, around which they are taken again, as groups multiply each other's
    costs. Widths one step away are looked at too.

    Args:
        choices: the widths that each group may have.
        terms: of the whole model's cost.
        full: the full width of every group.
    """
    widths = {choice.name: choice.widths[-1] for choice in choices}
    meter = Meter(terms, full, widths)
    best: dict[str, int] | None = None
    off = 0.0  # by how much the numbers promised less than what came of them
    for _ in range(TURNS):
        found = meter.around(choices, target - off, enough - off)
        if found is None:
            break
        meter = Meter(terms, full, found)
        fits = enough <= meter.cost <= target
        for name, width in _steps(choices, found):
            if enough <= meter.cost + meter.change(name, width) <= target:
                near = {**found, name: width}
                if best is None or summed_error(choices, near) < summed_error(choices, best):
                    best = near
        if fits and found == widths:
            break
        off += 0.0 if fits else (meter.cost - (enough + target) / 2) / 2
        widths = found
    return best


def _steps(choices: Sequence[Allowed], widths: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Each group's width, its next wider one and its next narrower one."""
    for choice in choices:
        now = widths[choice.name]
        yield choice.name, now
        yield choice.name, min((w for w in choice.between if w > now), default=now)
        yield choice.name, max((w for w in choice.between if w < now), default=now)
