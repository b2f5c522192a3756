"""Error curves along an order, against least squares on stored rows for every width."""

import pytest
import torch

from thinet.criteria import Consumer
from thinet.criteria.curves import (
    group_refit_errors,
    refit_errors,
)
from thinet.errors import CalibrationError, RepairError

ORDER = [3, 0, 4, 1, 2]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unexplained(rows: torch.Tensor, y: torch.Tensor) -> float:
    if rows.shape[1] == 0:
        return float(y.square().sum())
    return float((y - rows @ torch.linalg.lstsq(rows, y).solution).square().sum())


@pytest.mark.parametrize("units", [None, [0, 1, 2, 3, 4, 4, 1], [2, -1, 0, 3, 1, -1, 4]], ids=str)
def test_refit_errors_are_least_squares_at_every_width(units):
    channels, taps = (5, 3) if units is None else (len(units), 2)
    rows = random(60, channels * taps) + 0.5
    weight = random(4, channels, taps, seed=1)
    owner = (torch.arange(5) if units is None else torch.tensor(units)).repeat_interleave(taps)
    errors = refit_errors(
        rows.T @ rows, weight, ORDER, None if units is None else torch.tensor(units)
    )
    y = rows @ weight.flatten(1).T
    for gone in range(6):
        kept = torch.tensor([int(u) not in ORDER[:gone] for u in owner])
        assert errors[gone] == pytest.approx(unexplained(rows[:, kept], y), abs=1e-9)
    assert list(errors) == sorted(errors)


def test_a_free_intercept_is_the_covariance():
    rows = random(60, 5) + 3
    weight = random(4, 5, seed=1)
    y = rows @ weight.T
    errors = refit_errors(torch.cov(rows.T, correction=0) * 60, weight, ORDER)
    for gone in range(6):
        design = torch.cat([rows[:, ORDER[gone:]], torch.ones(60, 1)], 1)
        assert errors[gone] == pytest.approx(unexplained(design, y), abs=1e-9)


def test_dead_and_repeated_columns_cost_nothing():
    rows = random(60, 5)
    rows[:, 3], rows[:, 0] = 0, rows[:, 2]
    errors = refit_errors(rows.T @ rows, random(4, 5, seed=1), ORDER)
    assert errors[2] == pytest.approx(0, abs=1e-4)
    assert errors[3] > 1


def test_consumers_add_up_over_their_energies_and_dead_ones_do_not_count():
    rows, weight = random(60, 5), random(4, 5, seed=1)
    second = rows.T @ rows / 60
    energy = float((rows @ weight.T).square().sum()) / 60
    units = torch.arange(5)
    live = Consumer(weight, units, second, energy)
    dead = Consumer(weight, units, torch.zeros(5, 5), 0.0)
    one = group_refit_errors([live], ORDER)
    assert one[-1] == pytest.approx(1, rel=1e-5)
    assert group_refit_errors([live, live, dead], ORDER) == pytest.approx([2 * e for e in one])
    with pytest.raises(CalibrationError, match="conv1: a consumer's second moments were not"):
        group_refit_errors([Consumer(weight, units)], ORDER, name="conv1")


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(RepairError, match="fc: the least-squares system holds NaN"):
        refit_errors(torch.full((5, 5), float("nan")), torch.ones(1, 5), ORDER, name="fc")


def test_fewer_rows_than_columns_still_give_a_curve() -> None:
    """A narrow last stage on few images: 6 rows for 20 columns, single precision."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(6, 20, generator=generator)
    weight = torch.randn(3, 20, generator=generator)
    second = (rows.T @ rows / 6).double()
    errors = refit_errors(second, weight, list(range(20)), ridge=1e-6)
    energy = float((rows @ weight.T).double().square().mean(0).sum())
    # Any 6 columns explain 6 rows, and with none left all of the output is lost.
    assert errors[14] < 1e-3 * energy
    assert errors[20] == pytest.approx(energy, rel=1e-3)


def test_a_consumer_known_by_its_parts_loses_what_scaling_them_cannot_mend() -> None:
    rows, weight = random(60, 10) + 0.5, random(4, 5, 2, seed=1)  # five units of two columns
    parts = torch.einsum("ruk,nuk->run", rows.view(60, 5, 2), weight)  # (rows, units, outputs)
    varies = parts - parts.mean(0)
    moments = torch.einsum("run,rvn->uv", varies, varies) / 60
    y = varies.sum(1).reshape(-1, 1)
    energy = float(y.square().sum()) / 60
    consumer = Consumer(weight, torch.arange(5), None, energy, parts=moments)
    errors = group_refit_errors([consumer], ORDER)
    whole = Consumer(weight, torch.arange(5), torch.cov(rows.T, correction=0), energy)
    bound = group_refit_errors([whole], ORDER)
    columns = varies.transpose(1, 2).reshape(-1, 5)
    for gone in range(6):
        scaled = unexplained(columns[:, ORDER[gone:]], y) / 60 / energy
        assert errors[gone] == pytest.approx(scaled, abs=1e-5)
        assert bound[gone] <= errors[gone] + 1e-9  # all weights refitted lose less
