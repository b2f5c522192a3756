"""Budgets: fractions that stay, and how many units of each group that leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from thinet.errors import BudgetError
from thinet.trace.groups import Costs
from thinet.types import ChannelGroup

WITHIN = 0.01
"""A budget is reached within this fraction of the whole model's cost."""


@dataclass(frozen=True)
class Budget:
    """The fraction that stays, of exactly one thing.

    Attributes:
        macs: of the multiply-adds of the whole model.
        params: of its parameters.
        latency: of the time of a forward pass on the example inputs, measured on this machine.
        keep: of the channels of every group, rounded down as in the paper (`int(channels * keep)`,
            where the product itself is not rounded: 0.7 of 90 channels are 63), at least 1; or
            a mapping from group names to a fraction (float) or a number of channels (int), groups
            that are not named staying whole.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    keep: float | Mapping[str, int | float] | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.__dict__.items() if value is not None}
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise BudgetError(
                f"a budget names one of macs, params, latency and keep; {names} given"
            )
        ((name, value),) = given.items()
        if isinstance(value, Mapping):
            _check_named(name, value)
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1:
            raise BudgetError(
                f"{name} is the fraction that stays, above 0 and at most 1; got {value!r}"
            )

    @property
    def kind(self) -> str:
        return next(name for name, value in self.__dict__.items() if value is not None)

    @property
    def fraction(self) -> float:
        return float(getattr(self, self.kind))

    @property
    def named(self) -> Mapping[str, int | float] | None:
        """What stays of each named group, None where one fraction is for all."""
        return self.keep if isinstance(self.keep, Mapping) else None


def _check_named(kind: str, keep: Mapping[object, object]) -> None:
    if kind != "keep" or not keep:
        raise BudgetError(
            f"only keep takes a mapping, of at least one group name; got {kind}={dict(keep)!r}"
        )
    for name, value in keep.items():
        count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not isinstance(name, str) or not (
            count or (isinstance(value, float) and 0 < value <= 1)
        ):
            raise BudgetError(
                f"keep of {name!r} is a number of channels (a whole number from 1) or a fraction "
                f"(a float above 0 and at most 1); got {value!r}"
            )


def uniform_widths(budget: Budget, groups: Sequence[ChannelGroup], costs: Costs) -> dict[str, int]:
    """How many units stay in each group, the same fraction everywhere (as the paper).

    A budget of costs is met by search: the largest common fraction that fits, then single units
    where they still fit, in the order in which rounding down took most from them. Where that is
    more than 1 % off, single units are traded.

    Args:
        groups: those that may be cut.
        costs: of the whole model.

    Raises:
        BudgetError: the model costs more even with one channel left in each group; says how much.
            Or the budget is one of latency.
    """
    if budget.named is not None:
        return {g.name: units(g, budget.named.get(g.name, g.channels)) for g in groups}
    if budget.kind == "keep":
        return _kept(groups, budget.fraction)
    if budget.kind == "latency":
        raise BudgetError(
            "a budget of latency is measured while thinet.prune shares it out; elsewhere give one "
            "of macs, params or keep"
        )
    measure = costs.macs if budget.kind == "macs" else costs.params
    full = measure({})
    target = budget.fraction * full
    if budget.fraction == 1.0:
        return {group.name: group.channels for group in groups}
    least = measure(_kept(groups, 0.0))
    if least > target * (1 + WITHIN):
        raise BudgetError(
            f"{budget.kind}={budget.fraction:g} cannot be met: with one channel left in each of "
            f"the {len(groups)} groups that may be cut, {least / full:.4f} of the {budget.kind} "
            f"remain; ask for at least that, or allow more groups"
        )
    steps = sorted({k / g.channels for g in groups for k in range(1, g.channels + 1)} | {0.0})
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if measure(_kept(groups, steps[middle])) <= target:
            low = middle
        else:
            high = middle - 1
    widths = _kept(groups, steps[low])
    widths = _fill(widths, groups, steps[min(low + 1, len(steps) - 1)], measure, target)
    return nearer_widths(widths, groups, measure, target, WITHIN * full)


def _kept(groups: Sequence[ChannelGroup], fraction: float) -> dict[str, int]:
    return {g.name: units(g, float(fraction)) for g in groups}


def units(group: ChannelGroup, keep: int | float) -> int:
    """The number of units that a count or a fraction leaves of a group."""
    if isinstance(keep, float):
        # The small excess undoes the rounding of k / n * n.
        return max(1, math.floor(group.channels * keep + 1e-9))
    if keep > group.channels:
        raise BudgetError(f"{group.name} cannot keep {keep} channels, it has {group.channels}")
    return keep


def _fill(
    widths: dict[str, int],
    groups: Sequence[ChannelGroup],
    fraction: float,
    measure: Callable[[Mapping[str, int]], int],
    target: float,
) -> dict[str, int]:
    """Give back single units, to the groups that the common fraction shorts most."""
    short = sorted(groups, key=lambda g: widths[g.name] - g.channels * fraction)
    for group in short:
        more = {**widths, group.name: widths[group.name] + 1}
        if more[group.name] <= group.channels and measure(more) <= target:
            widths = more
    return widths


def nearer_widths(
    widths: dict[str, int],
    groups: Sequence[ChannelGroup],
    measure: Callable[[Mapping[str, int]], int],
    target: float,
    within: float,
    *,
    least: int = 1,
) -> dict[str, int]:
    """Trade single units, of one group or between two, while the cost is further off than `within`.

    In small networks a single unit can cost more than what is left to give back; where there are
    few enough, all widths are gone through, and of those that reach the target the nearest is it.
    """
    within *= 1 - 1e-9  # what rounds to the very edge is not left there
    gap = abs(measure(widths) - target)
    lowest = [min(least, widths[g.name]) for g in groups]
    number = math.prod(g.channels + 1 - low for g, low in zip(groups, lowest, strict=True))
    if gap > within and number <= FEW:
        names = [g.name for g in groups]
        ranges = [range(low, g.channels + 1) for g, low in zip(groups, lowest, strict=True)]
        every = ({**widths, **dict(zip(names, each, strict=True))} for each in product(*ranges))
        return _nearest(list(every), widths, groups, measure, target, within)
    given = widths
    while gap > within:
        found = _nearest(
            [widths, *_traded(widths, groups, least)], given, groups, measure, target, within
        )
        if found == widths:
            break
        widths, gap = found, abs(measure(found) - target)
    return widths


FEW = 20_000
"""Combinations of widths that are gone through one by one."""


def _nearest(
    tried: Sequence[dict[str, int]],
    given: Mapping[str, int],
    groups: Sequence[ChannelGroup],
    measure: Callable[[Mapping[str, int]], int],
    target: float,
    within: float,
) -> dict[str, int]:
    """Of those that reach the target the nearest to what was given, else what comes nearest."""
    gaps = [abs(measure(each) - target) for each in tried]

    def moved(other: Mapping[str, int]) -> tuple[int, int]:
        by = [abs(other[g.name] - given[g.name]) for g in groups]
        return max(by, default=0), sum(by)

    reached = [each for each, gap in zip(tried, gaps, strict=True) if gap <= within]
    return min(reached, key=moved) if reached else tried[gaps.index(min(gaps))]


def _traded(
    widths: Mapping[str, int], groups: Sequence[ChannelGroup], least: int
) -> Iterator[dict[str, int]]:
    """All widths that differ by one unit in one group or in two."""
    single = [(g, step) for g in groups for step in (1, -1)]
    pairs = (pair for pair in combinations(single, 2) if pair[0][0] is not pair[1][0])
    for moves in (*((move,) for move in single), *pairs):
        tried = {**widths, **{g.name: widths[g.name] + step for g, step in moves}}
        if all(min(least, widths[g.name]) <= tried[g.name] <= g.channels for g, _ in moves):
            yield tried


def check_reached(budget: Budget, reached: Mapping[str, float]) -> None:
    """Raise a `BudgetError` if a cost budget was missed by more than `WITHIN`."""
    if budget.kind in ("keep", "latency"):  # the one is exact, the other as near as clocks are
        return
    found = reached[budget.kind]
    if abs(found - budget.fraction) > WITHIN:
        raise BudgetError(
            f"{budget.kind}={budget.fraction:g} cannot be met within {WITHIN:g}: the nearest that "
            f"these groups can is {found:.4f}; ask for that, or allow more groups"
        )
