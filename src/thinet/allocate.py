"""Widths from error curves: take away what loses least for what it saves, until the budget holds.

Each group has a curve: the error when r of its units are gone, in units of the network's own
signal, so that groups can be compared. Only widths at which the curve bends downwards are worth
having (its lower convex hull); between them the next step is always the one with the least added
error for each multiply-add (or parameter) that it saves. Savings are recomputed as widths change,
because neighbouring layers multiply.

An error that is made early is made up for, in part, by the repair of all layers behind it; one at
the end is not. So errors weigh more the later they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from thinet.between import allocate_between
from thinet.budget import WITHIN, Budget, check_reached, nearer_widths
from thinet.errors import BudgetError, OptionError
from thinet.hull import Allowed, Meter, allowed_widths, one_width
from thinet.trace.groups import Costs, CostTerm
from thinet.types import ChannelGroup

LATE = 3.0
"""How much more an error weighs in the last group than in the first: on ResNet-56 better than 1
and 6 (docs/method.md)."""


Allocator = Callable[
    [Sequence[Allowed], Sequence[CostTerm], Mapping[str, int], float], dict[str, int]
]
"""What `allocate` is: from the widths that each group may have, the terms of the cost, full widths
and the cost that may remain to one width for each group."""


def error_widths(
    budget: Budget,
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, Sequence[float]],
    costs: Costs,
    *,
    divisor: int = 8,
    least: int | None = None,
    late: float = LATE,
    fixed: Mapping[str, int] | None = None,
    allocator: Allocator | None = None,
    exactly: bool = True,
) -> dict[str, int]:
    """How many units stay in each group under a budget of MACs or parameters.

    Where the divisor leaves the budget more than 1 % unused, it is halved until it does not. Where
    nothing does, as a few dear units are so cheap to lose that all else is kept, the costs just
    below the budget are searched (`thinet.between`), with the divisor first.

    Args:
        groups: in the order in which they run.
        curves: for each group `channels + 1` errors; one without a curve gets the mean of the
            others at the same fraction.
        least: no group is made narrower than this; None: two, or one where it takes that.
        late: how much more the last group's errors weigh than the first one's; between, the
            weights grow evenly in proportion.
        fixed: units that stay of single groups; the others are shared out around them.
        allocator: by default `allocate`.
        exactly: within 1 %; else as near as these widths can.

    Raises:
        BudgetError: the budget cannot be met.
    """
    narrowest = 2 if least is None else least
    if divisor < 1 or narrowest < 1:
        raise OptionError(f"divisor and least are at least 1; got {divisor} and {narrowest}")
    if not 0 < late < float("inf"):
        raise OptionError(f"late is a factor above 0; got {late!r}")
    fixed = fixed or {}
    weighed = {
        group.name: [late ** (n / max(len(groups) - 1, 1)) * e for e in _curve(group, curves)]
        for n, group in enumerate(groups)
    }
    measure = costs.macs if budget.kind == "macs" else costs.params
    terms = costs.macs_terms if budget.kind == "macs" else costs.params_terms
    full = measure({})
    target = budget.fraction * full
    asked = divisor
    enough = target - (1 - 1e-9) * WITHIN * full  # the very edge may round to less

    def allowed(divisor: int, narrowest: int) -> list[Allowed]:
        return [
            allowed_widths(g, weighed[g.name], divisor=divisor, least=min(narrowest, g.channels))
            if g.name not in fixed
            else one_width(g, weighed[g.name], fixed[g.name])
            for g in groups
        ]

    while True:
        choices = allowed(divisor, narrowest)
        try:
            widths = (allocator or allocate)(choices, terms, costs.full, target)
        except BudgetError as error:
            if divisor == 1 and (narrowest == 1 or least is not None):
                remains = measure({c.name: min(c.between) for c in choices}) / full
                raise BudgetError(
                    f"{budget.kind}={budget.fraction:g} cannot be met: the narrowest widths that "
                    f"are allowed leave {remains:.4f} of the {budget.kind}; ask for that, or allow "
                    "narrower or more groups"
                ) from error
            divisor, narrowest = 1, narrowest if least is not None else 1
            continue
        if divisor == 1 and measure(widths) < enough:
            for low, coarse in product(
                sorted({narrowest, least or 1}, reverse=True), _halved(asked)
            ):
                some = allowed(coarse, low)
                found = allocate_between(some, terms, costs.full, enough, target)
                if found is not None:
                    return found
        if divisor == 1 or measure(widths) >= enough:
            free = [g for g in groups if g.name not in fixed]
            widths = nearer_widths(widths, free, measure, target, WITHIN * full, least=least or 1)
            if exactly:
                check_reached(budget, {budget.kind: measure(widths) / full})
            return widths
        divisor //= 2


def _halved(divisor: int) -> Iterator[int]:
    """The divisor, its half, and so on to one."""
    while divisor > 1:
        yield divisor
        divisor //= 2
    yield 1


def _curve(group: ChannelGroup, curves: Mapping[str, Sequence[float]]) -> Sequence[float]:
    if group.name in curves:
        return curves[group.name]
    fractions = [r / group.channels for r in range(group.channels + 1)]
    if not curves:
        return fractions
    return [
        sum(c[round(f * (len(c) - 1))] for c in curves.values()) / len(curves) for f in fractions
    ]


def allocate(
    choices: Sequence[Allowed], terms: Sequence[CostTerm], full: Mapping[str, int], target: float
) -> dict[str, int]:
    """Widths whose cost is at most the target, by least added error for each unit of cost saved.

    Single widths between two points of a hull are given back where they still fit.

    Args:
        choices: the widths that each group may have.
        terms: of the whole model's cost.
        full: the full width of every group.
        target: the cost that may remain.

    Raises:
        BudgetError: the narrowest widths still cost more.
    """
    place = {choice.name: len(choice.widths) - 1 for choice in choices}
    meter = Meter(terms, full, {c.name: c.widths[-1] for c in choices})
    while meter.cost > target:
        best: tuple[float, str, int] | None = None
        for choice in choices:
            at = place[choice.name]
            if at == 0:
                continue
            saved = -meter.change(choice.name, choice.widths[at - 1])
            if saved <= 0:
                continue
            slope = (choice.errors[at - 1] - choice.errors[at]) / saved
            if best is None or slope < best[0]:
                best = (slope, choice.name, choice.widths[at - 1])
        if best is None:
            raise BudgetError(
                f"the narrowest widths that are allowed still cost {meter.cost:,.0f}, more than "
                f"the {target:,.0f} that may remain"
            )
        _, name, width = best
        meter.set(name, width)
        place[name] -= 1
    _give_back(meter, choices, target)
    return meter.widths


def _give_back(meter: Meter, choices: Sequence[Allowed], target: float) -> None:
    """Widen single groups again where it still fits, the largest gain first."""
    while True:
        best: tuple[float, str, int] | None = None
        for choice in choices:
            now = meter.widths[choice.name]
            wider = min((w for w in choice.between if w > now), default=None)
            if wider is None or meter.cost + meter.change(choice.name, wider) > target:
                continue
            gain = choice.between[now] - choice.between[wider]
            if best is None or gain > best[0]:
                best = (gain, choice.name, wider)
        if best is None:
            return
        meter.set(best[1], best[2])
