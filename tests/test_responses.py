"""Zeros of hand-worked maps."""

import torch

from thinet.calibrate.responses import zero_share


def test_zero_share_counts_over_images_and_positions():
    maps = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 5.0]]])
    assert zero_share(maps).tolist() == [0.75, 0.25]
    assert zero_share(torch.tensor([[0.0, 1.0], [0.0, -1.0]])).tolist() == [1.0, 0.0]
