"""Covariances from few rows say what leaving columns out costs on other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import thinet
from thinet.calibrate.shrink import shrunk
from thinet.criteria.curves import refit_errors


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A true covariance whose variances fall from 1 to 1 / columns, and one of so many rows."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, columns + 1, dtype=torch.float64).rsqrt()
    turn = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=generator))
    mix = spread[:, None] * turn.Q
    x = torch.randn(rows, columns, dtype=torch.float64, generator=generator) @ mix
    return mix.T @ mix, x.T @ x / rows


@pytest.mark.parametrize("rows", [5, 40, 150])
def test_the_formula(rows: int) -> None:
    _, sample = drawn(rows, 40)
    values, vectors = np.linalg.eigh(sample.numpy())
    p, total, squares = 40, values.sum(), (values**2).sum()
    rho = ((1 - 2 / p) * squares + total**2) / ((rows + 1 - 2 / p) * (squares - total**2 / p))
    expected = vectors @ np.diag((1 - rho) * values + rho * total / p) @ vectors.T
    assert 0 < rho < 1
    np.testing.assert_allclose(shrunk(sample.clone(), rows).numpy(), expected, atol=1e-12)


def test_enough_rows_stay_as_they_are() -> None:
    _, sample = drawn(200, 40)
    assert torch.equal(shrunk(sample.clone(), 200), sample)
    assert not torch.equal(shrunk(sample.clone(), 199), sample)


@pytest.mark.parametrize("given", [torch.eye(3), torch.zeros(3, 3), torch.eye(1)])
def test_nothing_to_shrink(given: torch.Tensor) -> None:
    assert torch.equal(shrunk(given.double(), 2), given.double())


@pytest.mark.parametrize("rows", [20, 60, 100])
def test_errors_are_nearer_to_those_on_other_rows(rows: int) -> None:
    true, sample = drawn(rows, 60)
    weight = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    order, half = list(range(60)), 30

    def error(second: torch.Tensor) -> float:
        return refit_errors(second, weight, order, ridge=1e-6)[half]

    kept = order[half:]
    # What the weights that are solved on the sample lose on all the data there may be.
    solved = torch.linalg.lstsq(
        sample[kept][:, kept] + 1e-6 * torch.eye(half), sample[kept] @ weight.double().T
    ).solution
    gap = weight.double().clone()
    gap[:, kept] -= solved.T
    loses = float((gap @ true * gap).sum())
    naive, foretold = error(sample), error(shrunk(sample.clone(), rows))
    assert naive < foretold <= 1.2 * loses


def test_a_layer_with_fewer_rows_than_columns_can_be_shared_out() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 300, 3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(300, 5),
    )  # fmt: skip
    x = torch.randn(20, 3, 9, 9)
    result = thinet.prune(model, x[:1], [x], budget=thinet.Budget(macs=0.5), divisor=1)
    assert abs(result.report.reached - 0.5) < 0.01
    assert bool(torch.isfinite(result.model(x)).all())
