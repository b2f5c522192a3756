"""What stays under a budget: counted by hand, by brute force, and on the model that comes back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thinet
from thinet.budget import WITHIN, Budget, check_reached, uniform_widths, units
from thinet.cut import apply_to_copy
from thinet.errors import BudgetError
from thinet.outcome import PruneReport
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.trace.planning import make_plan
from thinet.types import ChannelGroup


def chain(*widths: int) -> nn.Sequential:
    """Convolutions 3 -> widths -> 2; the groups are "0", "1", ... but the last."""
    sizes = [3, *widths, 2]
    return nn.Sequential(*(nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(sizes)))


def analysed(model: nn.Module) -> tuple[Analysis, list[ChannelGroup]]:
    analysis = analyse(model, torch.randn(1, 3, 4, 4))
    return analysis, [g for g in analysis.groups if g.locked is None]


def macs_of(widths: list[int]) -> int:
    return 16 * sum(a * b for a, b in itertools.pairwise([3, *widths, 2]))


def counted(model: nn.Module, analysis: Analysis, widths: dict[str, int]) -> thinet.types.Counts:
    keep = {n: list(range(w)) for n, w in widths.items() if w < analysis.group(n).channels}
    small = apply_to_copy(model, make_plan(analysis, model, keep))
    return thinet.count(small, torch.randn(1, 3, 4, 4))


# --- keep -----------------------------------------------------------------------------------


@given(st.integers(1, 600), st.floats(0.001, 1.0))
def test_keep_is_the_papers_rounding_and_at_least_one(channels: int, keep: float) -> None:
    group = ChannelGroup("g", channels, None, (), (), ())
    assert units(group, keep) in {max(1, int(channels * keep)), max(1, int(channels * keep + 1e-9))}


@pytest.mark.parametrize(
    ("channels", "keep", "expected"),
    [
        (64, 0.5, 32),
        (5, 0.5, 2),
        (10, 0.3, 3),
        (100, 0.29, 29),
        (3, 0.1, 1),
        (1, 0.5, 1),
        (7, 1, 7),
    ],
)
def test_keep_by_hand(channels: int, keep: float, expected: int) -> None:
    assert units(ChannelGroup("g", channels, None, (), (), ()), float(keep)) == expected


def test_keep_is_the_same_for_every_group() -> None:
    analysis, groups = analysed(chain(6, 9, 3))
    assert uniform_widths(Budget(keep=0.5), groups, analysis.costs) == {"0": 3, "1": 4, "2": 1}


# --- costs ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(4, 40), min_size=2, max_size=4),
    st.floats(0.05, 0.99),
    st.sampled_from(["macs", "params"]),
)
def test_a_cost_is_met_within_one_percent_or_the_nearest_is_said(
    widths: list[int], fraction: float, kind: str
) -> None:
    model = chain(*widths)
    analysis, groups = analysed(model)
    budget = Budget(**{kind: fraction})
    full = macs_of(widths)
    least = macs_of([1] * len(widths)) / full
    found: dict[str, int] = {}
    said = ""
    try:
        found = uniform_widths(budget, groups, analysis.costs)
        check_reached(budget, {kind: macs_of(list(found.values())) / full})
    except BudgetError as error:
        said = str(error)
    if said:
        nearest = macs_of(list(found.values())) / full if found else least
        assert (
            nearest - fraction > WITHIN * fraction
            if not found
            else abs(nearest - fraction) > WITHIN
        )
        assert f"{kind}={fraction:g} cannot be met" in said and f"{nearest:.4f}" in said
        return
    counts = counted(model, analysis, found)
    reached = counts.macs / full if kind == "macs" else counts.params * 16 / full
    assert abs(reached - fraction) <= WITHIN
    assert counts.macs == macs_of(list(found.values()))
    assert all(1 <= w <= g.channels for w, g in zip(found.values(), groups, strict=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(12, 40), min_size=1, max_size=3), st.floats(0.1, 0.99))
def test_no_group_is_far_from_the_largest_common_fraction_that_fits(
    widths: list[int], fraction: float
) -> None:
    analysis, groups = analysed(chain(*widths))
    found = list(uniform_widths(Budget(macs=fraction), groups, analysis.costs).values())
    target = fraction * macs_of(widths)
    fits = [[max(1, c * k // n) for c in widths] for n in widths for k in range(1, n + 1)]
    best = max((w for w in fits if macs_of(w) <= target), default=[1] * len(widths))
    if any(abs(a - b) > 2 for a, b in zip(found, best, strict=True)):  # nothing nearer reaches it
        around = [
            range(max(1, b - 2), min(c, b + 2) + 1) for b, c in zip(best, widths, strict=True)
        ]
        within = WITHIN * macs_of(widths) - 1e-6
        assert all(abs(macs_of(list(w)) - target) > within for w in itertools.product(*around))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=2), st.floats(0.05, 0.99))
def test_small_networks_reach_what_any_widths_reach(widths: list[int], fraction: float) -> None:
    """Against brute force: within the tolerance if any widths are, else as near as any."""
    analysis, groups = analysed(chain(*widths))
    full = macs_of(widths)
    try:
        found = list(uniform_widths(Budget(macs=fraction), groups, analysis.costs).values())
    except BudgetError:
        assert macs_of([1] * len(widths)) > fraction * full * (1 + WITHIN)
        return
    gap = abs(macs_of(found) / full - fraction)
    every = list(itertools.product(*(range(1, c + 1) for c in widths)))
    best = min(abs(macs_of(list(w)) / full - fraction) for w in every)
    assert gap <= max(best, WITHIN) + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(8, 40), min_size=2, max_size=3))
def test_more_budget_never_costs_less(widths: list[int]) -> None:
    analysis, groups = analysed(chain(*widths))
    costs: list[int] = []
    for fraction in (0.3, 0.4, 0.5, 0.7, 0.9, 1.0):
        try:
            found = uniform_widths(Budget(macs=fraction), groups, analysis.costs)
        except BudgetError:
            continue
        costs.append(macs_of(list(found.values())))
    slack = WITHIN * macs_of(widths)
    assert all(a <= b + slack for a, b in itertools.pairwise(costs))
    assert costs[-1] == macs_of(widths)


@pytest.mark.parametrize("budget", [Budget(macs=0.4), Budget(params=0.4), Budget(keep=0.4)])
@pytest.mark.parametrize("widths", ["uniform", "error"])
def test_the_costs_of_the_report_are_those_of_the_model_that_comes_back(
    budget: Budget, widths: Any
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(40 * 16, 20), nn.ReLU(), nn.Linear(20, 5),
    )  # fmt: skip
    images = torch.randn(8, 3, 8, 8)
    result = thinet.prune(model, images[:1], [images], budget=budget, widths=widths)
    before, after = (thinet.count(m, images[:1]) for m in (model, result.model))
    report = result.report
    assert (report.macs_before, report.params_before) == (before.macs, before.params)
    assert (report.macs_after, report.params_after) == (after.macs, after.params)
    if budget.kind == "keep":
        cut = [g for g in report.groups if g.locked is None]
        assert report.reached == sum(g.kept for g in cut) / sum(g.channels for g in cut)
    else:
        part = getattr(after, budget.kind) / getattr(before, budget.kind)
        assert report.reached == pytest.approx(part)
        assert abs(part - 0.4) <= WITHIN


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "a budget names one of macs, params, latency and keep; none given"),
        ({"macs": 0.5, "keep": 0.5}, "macs and keep given"),
        ({"keep": 0}, "keep is the fraction that stays, above 0 and at most 1; got 0"),
        ({"keep": 1.2}, "at most 1; got 1.2"),
        ({"macs": -0.5}, "macs is the fraction that stays, above 0 and at most 1; got -0.5"),
        ({"params": "half"}, "got 'half'"),
        ({"params": True}, "got True"),
        ({"macs": float("nan")}, "got nan"),
        ({"macs": 50}, "got 50"),
    ],
)
def test_a_budget_says_what_is_wrong_with_it(options: dict[str, Any], text: str) -> None:
    with pytest.raises(BudgetError, match=text):
        Budget(**options)


def test_a_budget_below_the_narrowest_network_says_what_that_costs() -> None:
    analysis, groups = analysed(chain(10, 10))
    least = macs_of([1, 1]) / macs_of([10, 10])
    text = f"macs=0.01 cannot be met: with one channel left in each of the 2 .* {least:.4f} of"
    with pytest.raises(BudgetError, match=text):
        uniform_widths(Budget(macs=0.01), groups, analysis.costs)


def test_a_budget_between_two_widths_says_the_nearest() -> None:
    model, x = chain(2), torch.randn(1, 3, 4, 4)
    with pytest.raises(BudgetError, match=r"macs=0.7 cannot be met .*nearest .* 0.5000"):
        thinet.prune(model, x, [x], budget=Budget(macs=0.7), widths="uniform")


def test_a_least_width_holds_or_the_budget_is_refused() -> None:
    model, x = chain(16, 16), torch.randn(1, 3, 4, 4)
    result = thinet.prune(model, x, [x], budget=Budget(macs=0.5), least=9, divisor=1)
    assert min(g.kept for g in result.report.groups if g.locked is None) >= 9
    least = macs_of([14, 14]) / macs_of([16, 16])
    with pytest.raises(BudgetError, match=rf"macs=0.5 cannot be met: .* leave {least:.4f} of"):
        thinet.prune(model, x, [x], budget=Budget(macs=0.5), least=14, divisor=1)


def test_all_of_it_cuts_nothing() -> None:
    model, x = chain(5, 4), torch.randn(2, 3, 4, 4)
    for budget in (Budget(macs=1.0), Budget(params=1), Budget(keep=1.0)):
        result = thinet.prune(model, x, [x], budget=budget)
        assert result.plan.keep == {} and result.report.macs_after == macs_of([5, 4]) * 2
        pairs = zip(result.model.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_divisor_that_gives_way_is_told_and_one_that_holds_is_not() -> None:
    torch.manual_seed(0)
    model, x = chain(64, 64), torch.randn(2, 3, 4, 4)

    def report(**options: Any) -> PruneReport:
        macs = macs_of([64, 32]) / macs_of([64, 64]) + 1e-4
        options = {"budget": Budget(macs=macs), "repair": "none", **options}
        return thinet.prune(model, x, [x], **options).report

    assert [g.kept for g in report().groups if g.locked is None] == [64, 32]
    assert not report().notes
    some = report(budget=Budget(macs=macs_of([64, 28]) / macs_of([64, 64])))
    told = f"so these widths are others: {some.groups[1].kept} of 64 in 1"
    assert some.groups[1].kept % 8 and any(note.endswith(told) for note in some.notes)
    any_width = report(budget=Budget(macs=macs_of([64, 28]) / macs_of([64, 64])), divisor=1)
    assert not any_width.notes
    there = report(fixed={"1": 28}, budget=Budget(macs=macs_of([64, 28]) / macs_of([64, 64])))
    assert [g.kept for g in there.groups if g.locked is None] == [64, 28] and not there.notes
