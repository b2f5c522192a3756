"""Windows of a consumer's input against torch's own convolution."""

import pytest
import torch
from torch.nn import functional

from thinet.calibrate.patches import (
    Geometry,
    dense_weight,
    output_rows,
    patches,
    position_grid,
    sample_positions,
)
from thinet.errors import CalibrationError

LINEAR = Geometry()
CASES = {
    "conv1d": (Geometry((3,), (2,), (1,), (1,)), (3, 4, 11), (5, 4, 3)),
    "conv2d": (Geometry((3, 3), (1, 1), (1, 1), (1, 1)), (2, 3, 6, 5), (4, 3, 3, 3)),
    "pointwise": (Geometry((1, 1), (1, 1), (0, 0), (1, 1)), (2, 3, 4, 5), (4, 3, 1, 1)),
    "strided pointwise": (Geometry((1, 1), (2, 2), (0, 0), (1, 1)), (2, 3, 5, 5), (4, 3, 1, 1)),
    "uneven": (Geometry((3, 1), (2, 1), (0, 2), (2, 1)), (2, 3, 9, 6), (4, 3, 3, 1)),
    "grouped": (Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2), (2, 4, 5, 5), (6, 2, 3, 3)),
    "conv3d": (
        Geometry((2, 3, 3), (1, 2, 1), (1, 1, 0), (1, 1, 1)),
        (2, 2, 4, 5, 5),
        (3, 2, 2, 3, 3),
    ),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampled", [False, True])
def test_patches_times_weight_is_the_convolution(case, sampled, generator):
    geometry, shape, weight_shape = CASES[case]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    conv = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[geometry.rank]
    y = conv(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    images, places = position_grid(shape, geometry)
    assert (images, places) == (shape[0], y[0, 0].numel())
    positions = sample_positions(images, places, 7, generator) if sampled else None
    phi = patches(x, geometry, positions)
    want = output_rows(y, geometry, positions)
    assert phi.shape == (7 if sampled else images * places, shape[1] * geometry.taps)
    torch.testing.assert_close(phi @ dense_weight(weight, geometry).flatten(1).T, want)


def test_patches_of_a_linear_layer_are_its_rows():
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(patches(x, LINEAR), x.view(6, 4))
    assert torch.equal(patches(x, LINEAR, torch.tensor([4])), torch.tensor([[16.0, 17, 18, 19]]))
    assert position_grid((2, 3, 4), LINEAR) == (2, 3)
    assert position_grid((2, 4), LINEAR) == (2, 1)


def test_patches_do_not_care_about_memory_format_or_a_missing_batch(generator):
    geometry, shape, _ = CASES["conv2d"]
    x = torch.randn(shape, generator=generator)
    want = patches(x, geometry)
    picked = torch.tensor([3, 40])
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(patches(last, geometry, picked), want[picked])
    assert torch.equal(output_rows(last, geometry, picked), output_rows(x, geometry, picked))
    assert torch.equal(patches(x[0], geometry), want[:30])


def test_padding_is_zero_even_beside_infinite_values():
    geometry = Geometry((3,), (1,), (1,), (1,))
    x = torch.tensor([[[float("inf"), 1.0, 2.0]]])
    phi = patches(x, geometry, torch.tensor([0]))
    assert phi.tolist() == [[0.0, float("inf"), 1.0]]


def test_columns_are_channel_major():
    x = torch.arange(8.0).view(1, 2, 4)
    phi = patches(x, Geometry((2,), (1,), (0,), (1,)), torch.tensor([1]))
    assert phi.tolist() == [[1.0, 2.0, 5.0, 6.0]]


def test_a_kernel_larger_than_its_input_is_refused():
    with pytest.raises(CalibrationError, match=r"shape \(1, 2, 4\) does not fit"):
        patches(torch.zeros(1, 2, 4), Geometry((5,), (1,), (0,), (1,)))
    with pytest.raises(CalibrationError, match="differ in rank"):
        Geometry((3, 3), (1,), (0, 0), (1, 1))


def test_dense_weight_puts_zeros_across_groups():
    weight = torch.tensor([[[1.0]], [[2.0]]])
    dense = dense_weight(weight, Geometry((1,), (1,), (0,), (1,), groups=2))
    assert dense.squeeze(-1).tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_sampled_positions_are_distinct_and_even_over_images(generator):
    drawn = sample_positions(4, 100, 30, generator)
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert sorted(torch.bincount(drawn // 100, minlength=4).tolist()) == [7, 7, 8, 8]


def test_fewer_rows_than_images_take_different_images(generator):
    drawn = sample_positions(50, 9, 20, generator)
    assert len(set((drawn // 9).tolist())) == 20


def test_all_positions_when_asked_for_as_many(generator):
    assert sample_positions(2, 3, 6, generator).tolist() == [0, 1, 2, 3, 4, 5]
    assert sample_positions(2, 3, 99, generator).tolist() == [0, 1, 2, 3, 4, 5]


def test_every_position_is_drawn_equally_often(generator):
    hits = torch.zeros(14)
    for _ in range(4000):
        hits[sample_positions(2, 7, 5, generator)] += 1
    # 5 of 14 each time: binomial, standard error about 0.0076
    torch.testing.assert_close(hits / 4000, torch.full((14,), 5 / 14), atol=0.03, rtol=0)
