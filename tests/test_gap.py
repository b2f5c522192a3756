"""How far two outputs are apart."""

from __future__ import annotations

import pytest
import torch

from thinet.gap import largest, relative_gap

MASKED = torch.tensor([2.0, torch.inf, -torch.inf, torch.nan])


def test_differences_are_measured_by_the_largest_finite_number() -> None:
    assert relative_gap(MASKED, MASKED + torch.tensor([0.5, 0, 0, 0])) == pytest.approx(0.25)
    assert largest(MASKED) == 2
    assert relative_gap(torch.tensor([-4.0, 1]), torch.tensor([-4.0, 2])) == pytest.approx(0.25)


def test_only_equal_infinities_are_no_difference() -> None:
    assert relative_gap(MASKED, MASKED.clone()) == 0
    assert relative_gap(MASKED, -MASKED) == float("inf")
    assert relative_gap(MASKED, torch.zeros(4)) == float("inf")
    assert relative_gap(torch.zeros(4), MASKED) == float("inf")


def test_where_zeros_are_expected_the_difference_is_absolute() -> None:
    assert relative_gap(torch.zeros(3), torch.tensor([0.0, -1e-9, 0])) == pytest.approx(1e-9)
    assert relative_gap(torch.zeros(0), torch.zeros(0)) == 0
    assert largest(torch.full((2,), torch.nan)) == 1
