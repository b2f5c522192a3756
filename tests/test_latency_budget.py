"""Budgets of measured time, with a clock that the tests wind up themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thinet
from thinet import one_round
from thinet.budget import Budget, uniform_widths
from thinet.errors import BudgetError, OptionError
from thinet.latency_budget import latency_widths, time_share
from thinet.timing import Latency
from thinet.trace.analyse import analyse

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1)
    )


def of_macs(model: nn.Module, small: nn.Module, inputs: Any) -> float:
    """A clock by which half of the time goes with the multiply-adds and half stays."""
    macs = thinet.count(small, inputs).macs / thinet.count(model, inputs).macs
    return 0.5 + 0.5 * macs


@pytest.mark.parametrize("widths", ["error", "uniform"])
def test_the_share_of_the_clock_is_met(widths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_round, "time_share", of_macs)
    model = net()
    result = thinet.prune(model, X, [X], budget=Budget(latency=0.7), widths=widths, divisor=1)
    report = result.report
    assert (report.budget, report.target) == ("latency", 0.7)
    assert report.reached == of_macs(model, result.model, X)
    assert abs(report.reached - 0.7) <= 0.01
    assert abs(report.macs_after / report.macs_before - 0.4) <= 0.02


def test_a_clock_that_does_not_run_that_slowly_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_round, "time_share", of_macs)
    model = net()
    with pytest.raises(BudgetError, match=r"latency=0.3 cannot be met: .* can takes 0.5\d\d of"):
        thinet.prune(model, X, [X], budget=Budget(latency=0.3))


def test_bisection_finds_the_widths_that_take_the_share() -> None:
    groups = [g for g in thinet.find_groups(net(), X) if g.locked is None]
    costs = analyse(net(), X).costs

    def share(widths: Any) -> float:
        return (costs.macs(widths) / costs.macs({})) ** 0.5

    found = latency_widths(Budget(latency=0.5), lambda at: uniform_widths(at, groups, costs), share)
    assert abs(costs.macs(found) / costs.macs({}) - 0.25) <= 0.01


def test_budgets_of_latency_belong_to_prune() -> None:
    groups = thinet.find_groups(net(), X)
    with pytest.raises(BudgetError, match="measured while thinet.prune shares it out"):
        uniform_widths(Budget(latency=0.5), groups, None)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="names one of macs, params, latency and keep"):
        Budget(macs=0.5, latency=0.5)
    with pytest.raises(OptionError, match="rounds are steps of a budget of macs or params"):
        thinet.prune(net(), X, [X], budget=Budget(latency=0.5), rounds=2)


def test_networks_are_compared_by_their_fastest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where most runs were disturbed, all else is about the other work."""
    timed = {
        "dense": Latency(8.0, 18.5, 12.0, 40.0, runs=10, threads=1, device="cpu"),
        "small": Latency(4.0, 4.1, 4.0, 9.0, runs=10, threads=1, device="cpu"),
    }
    monkeypatch.setattr("thinet.latency_budget.latencies", lambda *_, **__: timed)
    assert time_share(net(), net(), X) == 0.5


def test_a_network_takes_its_own_time() -> None:
    model = net()
    assert 0.2 < time_share(model, model, X) < 5


@pytest.mark.parametrize(("asked", "kept"), [(1 / 3, 1), (0.4, 1), (2 / 3, 2), (0.9, 2)])
def test_few_widths_with_gaps_between_them(asked: float, kept: int) -> None:
    """One group of three units, a third of the time each: what fits is found, never all of it."""

    def widths_at(budget: Budget) -> dict[str, int]:
        assert budget.macs is not None
        return {"heads": max(1, round(3 * budget.macs))}

    assert latency_widths(Budget(latency=asked), widths_at, lambda w: w["heads"] / 3) == {
        "heads": kept
    }


def test_widths_by_error_with_gaps_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_round, "time_share", of_macs)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1))
    result = thinet.prune(model, X, [X], budget=Budget(latency=0.7), divisor=1)
    assert result.model[0].out_channels == 1  # a third; two thirds take 0.83
    assert result.report.reached == pytest.approx(0.5 + 0.5 / 3)
