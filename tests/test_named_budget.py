"""A budget that says what stays of each named group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thinet
from thinet.errors import BudgetError, LockedGroupError, OptionError, UnknownGroupError
from thinet.outcome import PruneResult


def chain() -> nn.Sequential:
    """Groups "0" (6 channels), "2" (10), "4" (4, the output)."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 3), nn.ReLU(), nn.Conv2d(10, 4, 3)
    )


def pruned(keep: Any, **options: Any) -> PruneResult:
    images = torch.randn(8, 3, 10, 10)
    return thinet.prune(chain(), images[:1], [images], budget=thinet.Budget(keep=keep), **options)


def widths(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({"0": 0.5}, [3, 10, 4]),
        ({"2": 7}, [6, 7, 4]),
        ({"0": 1, "2": 0.39}, [1, 3, 4]),
        ({"0": 0.01, "2": 1.0}, [1, 10, 4]),
        ({"0": 6, "2": 10}, [6, 10, 4]),
    ],
)
def test_counts_and_fractions_of_named_groups(keep: Any, expected: list[int]) -> None:
    assert widths(pruned(keep).model) == expected


def test_the_report_and_the_plan_say_what_was_asked() -> None:
    result = pruned({"0": 3, "2": 0.5})
    assert result.plan.settings["budget"] == {"keep": {"0": 3, "2": 0.5}}
    assert result.report.target == result.report.reached == 8 / 16


@pytest.mark.parametrize(
    ("keep", "error", "text"),
    [
        ({}, BudgetError, "of at least one group name"),
        ({"0": 0}, BudgetError, "keep of '0' is a number of channels"),
        ({"0": 1.5}, BudgetError, "got 1.5"),
        ({"0": True}, BudgetError, "got True"),
        ({0: 3}, BudgetError, "keep of 0 is"),
        ({"0": 7}, BudgetError, "0 cannot keep 7 channels, it has 6"),
        ({"1": 2}, UnknownGroupError, "names the group '1', which is none of the 3 groups"),
        ({"4": 2}, LockedGroupError, "group '4' may not be cut: it is an output of the model"),
    ],
)
def test_what_cannot_be_kept_is_said(keep: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        pruned(keep)


def test_only_keep_takes_names_and_no_patterns_beside_them() -> None:
    with pytest.raises(BudgetError, match="only keep takes a mapping"):
        thinet.Budget(macs={"0": 0.5})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="leave only and skip out"):
        pruned({"0": 3}, only="2")
