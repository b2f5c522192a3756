"""Least squares over the rows, against the same written out over the columns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from thinet import dual
from thinet.dual import most_rows, solve_rows
from thinet.errors import RepairError
from thinet.repair import RepairSettings

PULLS = (1, 3, 10, 30, 100, 300, 1000)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_columns(
    phi: Tensor, target: Tensor, prior: Tensor, *, intercept: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """The best pull by generalised cross-validation, its hat matrix and inverse written out."""
    rows, columns = phi.shape
    mean = phi.mean(0) if intercept else torch.zeros(columns, dtype=phi.dtype)
    at = target.mean(0) if intercept else torch.zeros(target.shape[1], dtype=phi.dtype)
    x, y = phi - mean, target - at
    missed, second = y - x @ prior.T, x.T @ x / rows
    noise = dropout / (1 - dropout) * phi.square().mean(0)
    found = []
    for factor in PULLS:
        pull = 1e-3 * factor * second.diagonal().mean() + noise
        inverse = torch.linalg.inv(second + torch.diag(pull))
        hat = x @ inverse @ x.T / rows
        left = (missed - hat @ missed).square().sum()
        score = left / (1 - (hat.trace() + intercept) / rows) ** 2
        found.append((float(score), prior + (inverse @ x.T @ missed / rows).T))
    weight = min(found, key=lambda pair: pair[0])[1]
    return weight, at - weight @ mean


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (39, 40), (60, 25)])
def test_the_rows_give_what_the_columns_give(
    rows: int, columns: int, intercept: bool, dropout: float
) -> None:
    phi, prior = random(rows, columns, seed=rows) + 1, random(3, columns, seed=1)
    true = prior + 0.1 * random(3, columns, seed=2)
    target = phi @ true.T + 0.5 * random(rows, 3, seed=3)
    want, at = by_columns(phi, target, prior, intercept=intercept, dropout=dropout)
    options = {"ridge": 1e-3, "intercept": intercept, "dropout": dropout}
    weight, bias = solve_rows(phi.clone(), target, prior, **options)
    torch.testing.assert_close(weight, want)
    torch.testing.assert_close(bias, at)
    single, _ = solve_rows(phi.float(), target, prior.float(), **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-3, atol=1e-4)


def test_traces_of_many_rows_are_estimated() -> None:
    phi, prior = random(700, 900) + 1, random(3, 900, seed=1)
    target = phi @ (prior + 0.05 * random(3, 900, seed=2)).T + random(700, 3, seed=3)
    want, _ = by_columns(phi, target, prior, intercept=True, dropout=0.0)
    found, _ = solve_rows(phi.clone(), target, prior, ridge=1e-3)
    assert (found - want).norm() < 0.1 * (want - prior).norm()


def test_without_a_pull_the_rows_are_met_exactly() -> None:
    phi, prior, target = random(10, 40), random(3, 40, seed=1), random(10, 3, seed=2)
    # Of all that meet them, the nearest to the old weights.
    nearest = prior + torch.linalg.lstsq(phi, target - phi @ prior.T).solution.T
    found, bias = solve_rows(phi.clone(), target, prior, ridge=0.0, intercept=False)
    assert not bias.any()
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-5)


def test_what_does_not_vary_moves_nothing() -> None:
    prior, target = random(2, 6), random(4, 2, seed=1)
    flat = torch.ones(4, 6, dtype=torch.float64) * 3
    weight, bias = solve_rows(flat.clone(), target, prior)
    torch.testing.assert_close(weight, prior)
    assert weight.data_ptr() != prior.data_ptr()  # the old weights are the dense model's
    torch.testing.assert_close(bias, target.mean(0) - 3 * prior.sum(1))
    varies = random(4, 6, seed=2)
    varies[:, 1] = 1e3  # the intercept's business
    weight, _ = solve_rows(varies.clone(), target, prior)
    assert torch.equal(weight[:, 1], prior[:, 1]) and not torch.equal(weight, prior)
    weight, bias = solve_rows(torch.zeros(1, 6), torch.ones(1, 2), prior.float())
    assert torch.equal(weight, prior.float()) and bias.tolist() == [1, 1]


def test_numbers_that_are_not_finite_are_refused() -> None:
    phi, prior = random(5, 9), random(2, 9, seed=1)
    with pytest.raises(RepairError, match="fc: the repaired weights are not finite"):
        solve_rows(phi.clone(), torch.full((5, 2), torch.nan), prior, name="fc")
    phi[2, 3] = torch.inf
    with pytest.raises(RepairError, match="fc: "):
        solve_rows(phi, random(5, 2), prior, name="fc")


def test_the_rows_of_a_very_wide_layer_stay_few() -> None:
    assert most_rows(7_000) == 4096
    assert most_rows(100_000) == 671  # 256 MiB of float32
    assert most_rows(10**9) == 1


class Wide(nn.Module):
    """A linear layer behind a flatten, and a convolution with many columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 36, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.last(F.relu(self.fc(x.flatten(1))))


def narrow(monkeypatch: pytest.MonkeyPatch, widest: int) -> None:
    calibrate = ("calibrate.collect", "calibrate.rows", "calibrate.room")
    for module in ("repair", "refit", "refine", *calibrate):
        monkeypatch.setattr(f"thinet.{module}.WIDEST", widest)


def images(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 3, 6, 6, generator=generator).split(16))


@torch.no_grad()
def off(small: nn.Module, model: nn.Module, batches: list[Tensor]) -> float:
    """Energy of the outputs' error on these images, of the outputs' own."""
    x = torch.cat(batches)
    return float((small(x) - model(x)).square().sum() / model(x).var(0).sum() / len(x))


def test_a_wide_layer_is_refitted_as_a_narrow_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = randomise(Wide()), images(48, 0)
    options = {
        "budget": thinet.Budget(keep={"first": 0.5, "second": 0.5}),
        "criterion": "weight-sum",
        "repair_settings": RepairSettings(refine=0),
    }
    plain = thinet.prune(model, batches[0], batches, **options)
    narrow(monkeypatch, 100)  # 108 columns of fc stay, for 48 images
    wide = thinet.prune(model, batches[0], batches, **options)
    assert "fc" in wide.report.refitted and not wide.report.not_refitted
    for ours, theirs in zip(wide.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_of_too_many_rows_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = randomise(Wide()), images(96, 0)
    narrow(monkeypatch, 40)
    seen: list[int] = []
    solve = solve_rows

    def counted(phi: Tensor, *args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(len(phi))
        return solve(phi, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("thinet.refit.solve_rows", counted)
    errors = {}
    options = {
        "budget": thinet.Budget(keep={"first": 0.75}),
        "repair_settings": RepairSettings(refine=0),
    }
    bare = thinet.prune(model, batches[0], batches, repair="none", **options)
    for most in (64, 512):
        monkeypatch.setattr(dual, "MOST", most)
        found = thinet.prune(model, batches[0], batches, **options)
        errors[most] = off(found.model, model, images(200, 1))
        assert {"second", "fc"} <= set(found.report.refitted)
    # 96 * 36 positions of `second`, evenly from six batches; `fc` has 96 rows for 216 columns.
    assert seen == [66, 66, 516, 96]
    assert errors[512] < errors[64] < off(bare.model, model, images(200, 1))


def test_rows_are_drawn_only_where_columns_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = randomise(Wide()), images(96, 0)
    monkeypatch.setattr(dual, "MOST", 64)
    seen: list[int] = []

    def counted(phi: Tensor, *args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(len(phi))
        return solve_rows(phi, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("thinet.refit.solve_rows", counted)
    settings = RepairSettings(refine=0)
    budget = thinet.Budget(keep={"first": 0.75})
    thinet.prune(model, batches[0], batches, budget=budget, repair_settings=settings)
    assert seen == [96]  # of `fc`, with 216 columns; the others have more rows than columns


def test_a_wide_consumer_shares_in_a_budget_by_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = randomise(Wide()), images(64, 0)
    with torch.no_grad():
        model.fc.weight[:, : 3 * 36] *= 1e-3  # what the first half of `second` makes is not heard
    narrow(monkeypatch, 200)
    result = thinet.prune(model, batches[0], batches, budget=thinet.Budget(params=0.4), divisor=1)
    assert set(result.plan.keep["second"]) <= {3, 4, 5}  # the budget is met where nothing is lost
    errors = {group.name: group.error for group in result.report.groups}
    assert errors["second"] is not None and 0 < errors["second"] < 1e-5
