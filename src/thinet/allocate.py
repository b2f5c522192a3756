"""Widths from error curves: take away what loses least for what it saves, until the budget holds.

Each group has a curve: the error when r of its units are gone, in units of the network's own
signal, so that groups can be compared. Only widths at which the curve bends downwards are worth
having (its lower convex hull); between them the next step is always the one with the least added
error for each multiply-add (or parameter) that it saves. Savings are recomputed as widths change,
because neighbouring layers multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from thinet.errors import BudgetError
from thinet.types import ChannelGroup

Measure = Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class Allowed:
    """Which widths a group may have, ascending, its full width last.

    `errors[i]` is the error at `widths[i]`.
    """

    name: str
    widths: tuple[int, ...]
    errors: tuple[float, ...]


def allowed_widths(
    group: ChannelGroup, errors: Sequence[float], *, divisor: int = 1, least: int = 1
) -> Allowed:
    """The widths worth having: multiples of the divisor on the lower hull of the error curve.

    Args:
        errors: `channels + 1` numbers, `errors[r]` with r units gone.
        divisor: widths are multiples of it in groups of at least four times as many channels.
        least: no width is below it.
    """
    step = divisor if group.channels >= 4 * divisor else 1
    first = max(step * -(-least // step), step)
    widths = [w for w in range(first, group.channels, step)] + [group.channels]
    points = [(w, float(errors[group.channels - w])) for w in widths]
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return Allowed(group.name, tuple(w for w, _ in hull), tuple(e for _, e in hull))


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def allocate(choices: Sequence[Allowed], measure: Measure, target: float) -> dict[str, int]:
    """Widths whose cost is at most the target, by least added error for each unit of cost saved.

    The last steps are made smaller where single widths between two points of a hull still fit.

    Args:
        choices: the widths that each group may have.
        measure: cost of the whole model at given widths.
        target: the cost that may remain.

    Raises:
        BudgetError: the narrowest widths still cost more.
    """
    place = {c.name: len(c.widths) - 1 for c in choices}
    widths = {c.name: c.widths[-1] for c in choices}
    cost = measure(widths)
    while cost > target:
        best: tuple[float, str, int] | None = None
        for choice in choices:
            at = place[choice.name]
            if at == 0:
                continue
            saved = cost - measure({**widths, choice.name: choice.widths[at - 1]})
            if saved <= 0:
                continue
            slope = (choice.errors[at - 1] - choice.errors[at]) / saved
            if best is None or slope < best[0]:
                best = (slope, choice.name, choice.widths[at - 1])
        if best is None:
            raise BudgetError(
                f"the narrowest widths that are allowed still cost {cost:,}, more than the "
                f"{target:,.0f} that may remain"
            )
        _, name, width = best
        widths[name] = width
        place[name] -= 1
        cost = measure(widths)
    return _give_back(widths, choices, place, measure, target)


def _give_back(
    widths: dict[str, int],
    choices: Sequence[Allowed],
    place: Mapping[str, int],
    measure: Measure,
    target: float,
) -> dict[str, int]:
    """Undo steps that turn out not to be needed, the dearest error first."""

    def worth(choice: Allowed) -> float:
        at = place[choice.name]
        gained = choice.errors[at] - choice.errors[at + 1] if at + 1 < len(choice.errors) else 0.0
        return -gained

    for choice in sorted(choices, key=worth):
        at = place[choice.name]
        if at + 1 < len(choice.widths):
            wider = {**widths, choice.name: choice.widths[at + 1]}
            if measure(wider) <= target:
                widths = wider
    return widths
