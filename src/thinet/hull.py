"""The widths that a group may have, and what a model of any widths costs.

Only widths at which a group's error curve bends downwards are worth having: its lower convex hull.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinet.knapsack import knapsack
from thinet.trace.groups import CostTerm
from thinet.types import ChannelGroup


@dataclass(frozen=True)
class Allowed:
    """Which widths a group may have, ascending, its full width last.

    `errors[i]` is the error at `widths[i]`, on the hull; `between` holds the error at every width
    that is allowed, on the hull or not.
    """

    name: str
    widths: tuple[int, ...]
    errors: tuple[float, ...]
    between: Mapping[int, float]


def width_step(group: ChannelGroup, divisor: int) -> int:
    """What a group's widths are multiples of: the divisor, where it is four times as wide."""
    return divisor if group.channels >= 4 * divisor else 1


def allowed_widths(
    group: ChannelGroup, errors: Sequence[float], *, divisor: int = 1, least: int = 1
) -> Allowed:
    """The widths worth having: multiples of the divisor on the lower hull of the error curve.

    Args:
        errors: `channels + 1` numbers, `errors[r]` with r units gone.
        divisor: widths are multiples of it in groups of at least four times as many channels.
        least: no width is below it.
    """
    step = width_step(group, divisor)
    first = max(step * -(-least // step), step)
    widths = [*range(first, group.channels, step), group.channels]
    points = [(w, float(errors[group.channels - w])) for w in widths]
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    on_hull, their_errors = zip(*hull, strict=True)
    return Allowed(group.name, on_hull, their_errors, dict(points))


def one_width(group: ChannelGroup, errors: Sequence[float], width: int) -> Allowed:
    """No choice at all."""
    error = float(errors[group.channels - width])
    return Allowed(group.name, (width,), (error,), {width: error})


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


class Meter:
    """Cost of a model whose widths change one by one: only that group's terms are redone."""

    def __init__(
        self, terms: Sequence[CostTerm], full: Mapping[str, int], widths: Mapping[str, int]
    ) -> None:
        self.widths = dict(widths)
        self._full = full
        self._terms: dict[str, list[CostTerm]] = {name: [] for name in widths}
        for term in terms:
            for name in {name for size in term.sizes for name, _ in size.per_unit}:
                if name in self._terms:
                    self._terms[name].append(term)
        self.cost = sum(term.at(self.widths, full) for term in terms)

    def change(self, name: str, width: int) -> float:
        """How much cost one group's new width would add; negative where it saves."""
        before = self._of(name)
        was, self.widths[name] = self.widths[name], width
        after = self._of(name)
        self.widths[name] = was
        return after - before

    def set(self, name: str, width: int) -> None:
        self.cost += self.change(name, width)
        self.widths[name] = width

    def around(
        self, choices: Sequence[Allowed], most: float, least: float | None = None
    ) -> dict[str, int] | None:
        """The widths of least error that cost up to `most`, each as if the others stayed.

        Args:
            choices: the widths that each group may have.
            least: and, as nearly, at least this.

        Returns:
            One width for each group, or None if there is no such choice.
        """
        every = [sorted(choice.between) for choice in choices]
        pairs = list(zip(choices, every, strict=True))
        places = knapsack(
            [[self.change(choice.name, w) for w in widths] for choice, widths in pairs],
            [[choice.between[w] for w in widths] for choice, widths in pairs],
            most - self.cost,
            None if least is None else least - self.cost,
        )
        if places is None:
            return None
        return {c.name: widths[p] for (c, widths), p in zip(pairs, places, strict=True)}

    def _of(self, name: str) -> float:
        return sum(term.at(self.widths, self._full) for term in self._terms[name])


def summed_error(choices: Sequence[Allowed], widths: Mapping[str, int]) -> float:
    """Of all groups at these widths."""
    return math.fsum(c.between[widths[c.name]] for c in choices)
