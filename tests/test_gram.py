"""ThiNet's objective as a small matrix, against the sum over samples that it stands for."""

import itertools

import pytest
import torch

from thinet.calibrate import gram as gram_module
from thinet.calibrate.curvature import weighed
from thinet.calibrate.gram import (
    PartSums,
    fold_units,
    gram,
    gram_rows,
    unit_sums,
)

ROWS, OUTPUTS, CHANNELS, TAPS = 40, 5, 6, 4


@pytest.fixture
def sampled() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phi (rows, C taps), W (N, C, 2, 2), and the parts x (rows, N, C) by plain sums."""
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(ROWS, CHANNELS * TAPS, generator=generator, dtype=torch.float64) + 0.3
    weight = torch.randn(OUTPUTS, CHANNELS, 2, 2, generator=generator, dtype=torch.float64)
    parts = torch.zeros(ROWS, OUTPUTS, CHANNELS, dtype=torch.float64)
    for r, n, c, t in itertools.product(*map(range, (ROWS, OUTPUTS, CHANNELS, TAPS))):
        parts[r, n, c] += phi[r, c * TAPS + t] * weight[n, c].flatten()[t]
    return phi, weight, parts


@pytest.mark.parametrize("panel", [1, 9, 512])
def test_every_removed_set_costs_what_its_samples_say(sampled, panel, monkeypatch):
    monkeypatch.setattr(gram_module, "_PANEL", panel)
    phi, weight, parts = sampled
    found = gram(phi.T @ phi / ROWS, weight)
    for size in range(CHANNELS + 1):
        for removed in itertools.combinations(range(CHANNELS), size):
            lost = parts[..., list(removed)].sum(-1).square().sum() / ROWS
            chosen = torch.zeros(CHANNELS, dtype=torch.float64)
            chosen[list(removed)] = 1
            torch.testing.assert_close(chosen @ found @ chosen, lost)


def test_the_whole_gram_is_the_output_energy(sampled):
    phi, weight, parts = sampled
    second = phi.T @ phi / ROWS
    energy = parts.sum(-1).square().sum().item() / ROWS
    assert gram(second, weight).sum().item() == pytest.approx(energy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_weights(sampled, dtype):
    phi, weight, _ = sampled
    low = weight.to(dtype)
    want = gram(phi.T @ phi, low.double())
    torch.testing.assert_close(gram(phi.T @ phi, low), want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("block", [1, 200, 1 << 23])
def test_gram_rows_is_the_same_without_second_moments(sampled, block, monkeypatch):
    monkeypatch.setattr(gram_module, "_ROW_BLOCK", block)
    phi, weight, _ = sampled
    torch.testing.assert_close(gram_rows(phi, weight), gram(phi.T @ phi, weight))


def test_units_of_several_channels_and_channels_of_no_unit(sampled):
    phi, weight, parts = sampled
    units = torch.tensor([2, -1, 0, 2, 0, 2])  # unit 1 and 3 have no channel here
    by_unit = torch.zeros(ROWS, OUTPUTS, 4, dtype=torch.float64)
    for channel, unit in enumerate(units.tolist()):
        if unit >= 0:
            by_unit[..., unit] += parts[..., channel]
    want = torch.einsum("rnu,rnv->uv", by_unit, by_unit)
    torch.testing.assert_close(gram(phi.T @ phi, weight, units, 4), want)
    torch.testing.assert_close(gram_rows(phi, weight, units, 4), want)
    torch.testing.assert_close(unit_sums(parts.flatten(0, 1), units, 4), by_unit.flatten(0, 1))
    assert fold_units(torch.eye(6), units).shape == (3, 3)


def test_a_sketch_of_the_outputs_is_right_on_average(sampled):
    phi, weight, _ = sampled
    exact = gram(phi.T @ phi, weight)
    assert torch.equal(gram_rows(phi, weight, sketch=OUTPUTS), gram_rows(phi, weight))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [gram_rows(phi, weight, sketch=2, generator=generator) for _ in range(2000)]
    )
    error = drawn.std(0) / 2000**0.5
    assert ((drawn.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.03 * exact.diagonal().max()).all()
    assert (drawn.std(0) > 0).all()


def test_gamma_weighs_outputs(sampled):
    phi, weight, parts = sampled
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(30, OUTPUTS, generator=generator, dtype=torch.float64)
    gamma = gradients.T @ gradients / 30
    want = torch.einsum("rnc,nm,rmd->cd", parts, gamma, parts)
    heard = weighed(weight, torch.linalg.cholesky(gamma).T)
    torch.testing.assert_close(gram(phi.T @ phi, heard), want)
    torch.testing.assert_close(gram_rows(phi, heard), want)


def test_linear_weights_have_one_tap(sampled):
    phi, weight, _ = sampled
    flat = weight.flatten(1)
    units = torch.arange(CHANNELS).repeat_interleave(TAPS)
    second = phi.T @ phi
    torch.testing.assert_close(gram(second, flat, units), gram(second, weight))


@pytest.mark.parametrize("sizes", [(1, 16), (16, 1), (5, 5, 7)])
def test_parts_whatever_the_first_batch_is_like(sizes):
    """Estimates of what varies must not be of what does not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 4, 2, generator=generator)  # mixed into 256
    units = torch.tensor([0, 1, -1, 0])
    phi = torch.randn(17, 8, generator=generator) * 0.1 + 3
    phi[0] -= 5
    found = PartSums(weight, [("g", 3, units)], 256)
    for part in phi.split(sizes):
        found.add(part, len(part) / 17, generator)
    parts = torch.einsum("rck,nck->rnc", phi.view(17, 4, 2), weight).double()
    z = torch.stack([parts[..., 0] + parts[..., 3], parts[..., 1], parts[..., 1] * 0], 2)
    for made, direct in ((found.gram("g"), z), (found.centred("g"), z - z.mean(0))):
        want = torch.einsum("rnu,rnv->uv", direct, direct) / 17
        assert (made - want).norm() < 0.15 * want.norm()
        assert torch.linalg.eigvalsh(made)[0] > -1e-6 * float(made.diagonal().mean())
    exact = PartSums(weight, [("g", 3, units)], 400)
    exact.add(phi, 1.0, generator)
    varies = z - z.mean(0)
    want = torch.einsum("rnu,rnv->uv", varies, varies) / 17
    torch.testing.assert_close(exact.centred("g"), want, rtol=1e-3, atol=1e-2)
