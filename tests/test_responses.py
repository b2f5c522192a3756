"""Zeros and first-order loss changes on hand-worked maps."""

import torch

from thinet.calibrate.responses import taylor_sums, taylor_weights, zero_share


def test_zero_share_counts_over_images_and_positions():
    maps = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 5.0]]])
    assert zero_share(maps).tolist() == [0.75, 0.25]
    assert zero_share(torch.tensor([[0.0, 1.0], [0.0, -1.0]])).tolist() == [1.0, 0.0]


def test_taylor_takes_the_absolute_value_after_positions_and_before_images():
    maps = torch.tensor([[[1.0, 2.0]], [[1.0, 1.0]]])
    gradient = torch.tensor([[[1.0, -1.0]], [[3.0, 1.0]]])
    # image 0: |(1 - 2) / 2| = 0.5, image 1: |(3 + 1) / 2| = 2
    assert taylor_sums(maps, gradient).tolist() == [2.5]


def test_taylor_weights_square_the_sum():
    weights = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    gradient = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert taylor_weights(weights, gradient).tolist() == [1.0, 16.0]
    assert taylor_weights(torch.tensor([2.0, -3.0]), torch.ones(2)).tolist() == [4.0, 9.0]
