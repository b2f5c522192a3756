"""Widths from error curves against brute force on cases small enough to try them all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinet.allocate import Allocator, allocate, error_widths
from thinet.budget import Budget
from thinet.dynamic import allocate_dynamic
from thinet.errors import BudgetError, OptionError
from thinet.hull import Allowed, allowed_widths
from thinet.trace.groups import Costs, CostTerm, Size
from thinet.types import ChannelGroup


def group(name: str, channels: int) -> ChannelGroup:
    return ChannelGroup(name, channels, None, (name,), (), ())


def costs(channels: Mapping[str, int], chain: list[str]) -> Costs:
    """Layers in a row: each costs its width times the width before, the first and last 3 and 10."""
    sizes = [Size(3, ()), *(Size(0, ((name, 1),)) for name in chain), Size(10, ())]
    terms = tuple(CostTerm("", 1, pair) for pair in pairwise(sizes))
    return Costs(full=channels, macs_terms=terms, params_terms=terms)


def test_the_hull_keeps_the_widths_that_bend_downwards() -> None:
    # Widths 4, 3, 2, 1 have errors 0, 1, 1.5, 6: at 3 a straight line from 4 to 2 is better.
    found = allowed_widths(group("a", 4), [0, 1, 1.5, 6, 99])
    assert found.widths == (1, 2, 4)
    assert found.errors == (6, 1.5, 0)
    assert found.between == {1: 6, 2: 1.5, 3: 1, 4: 0}


def test_widths_are_multiples_of_the_divisor_where_the_group_is_wide_enough() -> None:
    line = [float(r) for r in range(33)]
    assert set(allowed_widths(group("a", 32), line, divisor=8).between) == {8, 16, 24, 32}
    assert set(allowed_widths(group("a", 31), line[:32], divisor=8).between) == set(range(1, 32))
    assert min(allowed_widths(group("a", 32), line, divisor=8, least=9).between) == 16


@settings(max_examples=60, deadline=None)
@given(
    curves=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=5), min_size=2, max_size=3),
    keep=st.floats(0.3, 0.95),
)
def test_convex_curves_are_shared_out_nearly_as_well_as_trying_everything(
    curves: list[list[int]], keep: float
) -> None:
    """Greedy on hulls is within one step of the best of all widths."""
    names = [f"g{i}" for i in range(len(curves))]
    errors: dict[str, list[float]] = {}
    for name, steps in zip(names, curves, strict=True):
        errors[name] = [0.0]
        for step in sorted(steps):
            errors[name].append(errors[name][-1] + step)
    groups = [group(n, len(errors[n]) - 1) for n in names]
    model = costs({g.name: g.channels for g in groups}, names)
    target = keep * model.macs({})
    if model.macs(dict.fromkeys(names, 1)) > target:
        return
    choices = [allowed_widths(g, errors[g.name]) for g in groups]
    widths = allocate(choices, model.macs_terms, model.full, target)
    assert model.macs(widths) <= target

    def error(given_widths: Mapping[str, int]) -> float:
        return sum(errors[g.name][g.channels - given_widths[g.name]] for g in groups)

    every = (
        dict(zip(names, w, strict=True))
        for w in product(*(range(1, g.channels + 1) for g in groups))
    )
    best = min(error(w) for w in every if model.macs(w) <= target)
    largest = max(max(steps) for steps in curves)
    assert error(widths) <= best + 2 * largest
    # Nothing more fits: every single widening costs too much.
    for g in groups:
        if widths[g.name] < g.channels:
            assert model.macs({**widths, g.name: widths[g.name] + 1}) > target


def test_what_hardly_matters_goes_first() -> None:
    groups = [group("vital", 16), group("idle", 16)]
    model = costs({"vital": 16, "idle": 16}, ["vital", "idle"])
    curves = {"vital": [10.0 * r for r in range(17)], "idle": [0.01 * r for r in range(17)]}
    widths = error_widths(Budget(macs=0.555), groups, curves, model, divisor=1)
    assert widths["vital"] == 16
    assert widths["idle"] == 8


def test_the_divisor_gives_way_to_the_budget() -> None:
    """At multiples of 8 half of 32 x 32 can only be met at 16; 0.45 needs finer steps."""
    groups = [group("a", 32)]
    model = costs({"a": 32}, ["a"])
    curves = {"a": [float(r) for r in range(33)]}
    assert error_widths(Budget(macs=0.5), groups, curves, model)["a"] == 16
    finer = error_widths(Budget(macs=0.44), groups, curves, model)["a"]
    assert finer == 14


def test_a_dear_unit_leaves_room_for_others_to_give() -> None:
    """One of four heads costs an eighth of all and loses next to nothing; the rest are 128 fine
    units that lose more. Without the head, 0.875 remain: at 0.95 it has to stay."""
    heads, fine = group("heads", 4), group("fine", 128)
    sizes = Size(0, (("heads", 1),)), Size(0, (("fine", 1),))
    terms = CostTerm("", 32, sizes[:1]), CostTerm("", 1, sizes[1:])
    cost = Costs(full={"heads": 4, "fine": 128}, macs_terms=terms, params_terms=terms)
    assert cost.macs({}) == 256
    curves = {"heads": [0, 1e-3, 2e-3, 3e-3, 1], "fine": [float(r) for r in range(129)]}
    budgets = {0.95: (4, 116), 0.875: (3, 128), 0.8: (3, 110), 0.7: (2, 116)}
    for allocator in (allocate, allocate_dynamic):
        for fraction, widths in budgets.items():
            found = error_widths(
                Budget(macs=fraction), [heads, fine], curves, cost, divisor=1, late=1.0,
                allocator=allocator,
            )  # fmt: skip
            by_hand = (found["heads"], found["fine"])
            assert by_hand == pytest.approx(widths, abs=2), (fraction, found)
            assert abs(cost.macs(found) / 256 - fraction) <= 0.01
    coarse = error_widths(Budget(macs=0.94), [heads, fine], curves, cost, divisor=4, late=1.0)
    assert coarse == {"heads": 4, "fine": 112}


@pytest.mark.parametrize("fraction", [0.95, 0.94, 0.93, 0.925, 0.87, 0.86, 0.85, 0.5])
@pytest.mark.parametrize("allocator", [allocate, allocate_dynamic])
def test_several_dear_groups_leave_room_for_others_to_give(
    fraction: float, allocator: Allocator
) -> None:
    """Eight heads of 8 % each are cheap to lose, 360 fine units of 0.1 % are not; where the heads
    that go leave more than 1 % unused, the heads that stay are as many as without the next one."""
    channels = {"h1": 4, "h2": 4, "f1": 180, "f2": 180}
    sizes = {name: Size(0, ((name, 1),)) for name in channels}
    terms = tuple(CostTerm("", 80 if n[0] == "h" else 1, (sizes[n],)) for n in channels)
    cost = Costs(full=channels, macs_terms=terms, params_terms=terms)
    assert cost.macs({}) == 1000
    curves = {
        name: [(1e-3 if name[0] == "h" else 1.0) * r / n for r in range(n + 1)]
        for name, n in channels.items()
    }
    groups = [group(name, n) for name, n in channels.items()]
    found = error_widths(
        Budget(macs=fraction), groups, curves, cost, divisor=1, late=1.0, allocator=allocator
    )
    assert fraction - 0.01 <= cost.macs(found) / 1000 <= fraction
    # By hand: as many heads go as leave more than 1 % below the budget, but for two of each group.
    heads = min(4, (round(1010 - 1000 * fraction) - 1) // 80)
    assert sum(4 - found[name] for name in ("h1", "h2")) == heads


def test_a_budget_out_of_reach_says_so() -> None:
    choice = Allowed("a", (2, 4), (1.0, 0.0), {2: 1.0, 4: 0.0})
    model = costs({"a": 4}, ["a"])
    with pytest.raises(BudgetError, match="narrowest widths that are allowed still cost 26"):
        allocate([choice], model.macs_terms, model.full, 10)
    with pytest.raises(OptionError, match="divisor and least are at least 1; got 0 and 2"):
        error_widths(Budget(macs=0.5), [], {}, costs({}, []), divisor=0)


def best_by_trying(
    errors: Mapping[str, list[float]], cost: Costs, fraction: float
) -> tuple[float, dict[str, int]]:
    """The least summed error of all widths that cost at most the fraction."""
    full = cost.macs({})
    found: list[tuple[float, dict[str, int]]] = []
    for widths in product(*(range(1, len(e)) for e in errors.values())):
        given = dict(zip(errors, widths, strict=True))
        if cost.macs(given) <= fraction * full:
            lost = sum(e[len(e) - 1 - given[n]] for n, e in errors.items())
            found.append((lost, given))
    return min(found, key=lambda each: each[0])


@settings(max_examples=40, deadline=None)
@given(
    curves=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=6), min_size=2, max_size=3),
    keep=st.floats(0.4, 0.95),
)
def test_dynamic_programming_is_the_best_where_costs_add_up(
    curves: list[list[int]], keep: float
) -> None:
    """Curves of any shape; each group has its own layers, of 7 units of cost a channel."""
    names = [f"g{i}" for i in range(len(curves))]
    errors = {n: [0.0, *accumulate(map(float, c))] for n, c in zip(names, curves, strict=True)}
    channels = {n: len(e) - 1 for n, e in errors.items()}
    terms = tuple(CostTerm("", 1, (Size(7, ()), Size(0, ((n, 1),)))) for n in names)
    cost = Costs(full=channels, macs_terms=terms, params_terms=terms)
    groups = [group(n, channels[n]) for n in names]
    choices = [
        Allowed(n, tuple(range(1, channels[n] + 1)), tuple(errors[n][::-1][1:]),
                {w: errors[n][channels[n] - w] for w in range(1, channels[n] + 1)})
        for n in names
    ]  # fmt: skip
    target = keep * cost.macs({})
    if cost.macs({g.name: 1 for g in groups}) > target:
        return
    widths = allocate_dynamic(choices, terms, channels, target)
    assert cost.macs(widths) <= target
    lost = sum(errors[n][channels[n] - w] for n, w in widths.items())
    assert lost == pytest.approx(best_by_trying(errors, cost, keep)[0])


def test_dynamic_programming_is_never_worse_than_the_hull_where_costs_multiply() -> None:
    errors = {"a": [0.0, 1, 2, 9, 10], "b": [0.0, 4, 5, 6, 30], "c": [0.0, 2, 8, 9, 10]}
    channels = dict.fromkeys(errors, 4)
    cost = costs(channels, list(errors))
    choices = [allowed_widths(group(n, 4), e) for n, e in errors.items()]
    for keep in (0.4, 0.5, 0.6, 0.8):
        target = keep * cost.macs({})
        lost = [
            sum(errors[n][4 - w] for n, w in found.items())
            for found in (
                way(choices, cost.macs_terms, channels, target)
                for way in (allocate, allocate_dynamic)
            )
        ]
        assert lost[1] <= lost[0]
        assert lost[1] >= best_by_trying(errors, cost, keep)[0]


def test_fixed_widths_stay_and_the_others_are_shared_out_around_them() -> None:
    channels = {"a": 8, "b": 8, "c": 8}
    cost = costs(channels, ["a", "b", "c"])
    groups = [group(n, 8) for n in channels]
    curves = {n: [float(r) for r in range(9)] for n in channels}
    found = error_widths(Budget(macs=0.5), groups, curves, cost, divisor=1, fixed={"b": 7})
    assert found["b"] == 7
    assert cost.macs(found) <= 0.51 * cost.macs({})
    assert found["a"] < 8
