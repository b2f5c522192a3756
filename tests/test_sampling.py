"""The paper's random rows: what each one is, and what they are on average."""

import torch
from torch.nn import functional

from thinet.calibrate.gram import gram
from thinet.calibrate.patches import Geometry, patches
from thinet.calibrate.sampling import paper_rows

CONV = Geometry((3, 3), (1, 1), (1, 1), (1, 1))


def test_rows_sum_to_outputs_without_bias_at_each_image():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    rows = paper_rows(x, weight, CONV, 20, generator)
    assert rows.shape == (60, 4)
    y = functional.conv2d(x, weight, padding=1)
    for image, drawn in enumerate(rows.sum(1).view(3, 20)):
        distance = (drawn[:, None] - y[image].flatten()).abs().min(1).values
        assert distance.max() < 1e-12
    assert len({round(float(v), 9) for v in rows.sum(1)}) > 30


def test_their_mean_is_the_exact_gram_over_the_number_of_filters():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 4, 4, generator=generator)
    weight = torch.randn(5, 3, 3, 3, generator=generator)
    phi = patches(x, CONV).double()
    exact = gram(phi.T @ phi / len(phi), weight) / 5
    rows = paper_rows(x, weight, CONV, 50_000, generator).double()
    squares = rows[:, :, None] * rows[:, None, :]
    error = squares.std(0) / len(rows) ** 0.5
    assert ((squares.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.02 * exact.diagonal().max()).all()


def test_rows_of_a_linear_layer_over_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, generator=generator)
    weight = torch.randn(5, 4, generator=generator)
    rows = paper_rows(x, weight, Geometry(), 6, generator)
    possible = (x.view(6, 1, 4) * weight).flatten(0, 1)
    assert rows.shape == (12, 4)
    assert all((possible == row).all(1).any() for row in rows)


def test_the_same_seed_draws_the_same_rows():
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3)
    first, again = (
        paper_rows(x, weight, CONV, 10, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, again)
