"""How far two outputs are apart, measured by the larger numbers in them."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(values: Tensor) -> float:
    """The largest finite magnitude, 1 where nothing is finite."""
    finite = values[values.isfinite()].abs()
    return finite.max().item() if finite.numel() else 1.0


def relative_gap(expected: Tensor, found: Tensor) -> float:
    """The largest difference of two real tensors of one shape, relative to the largest expected.

    Equal infinities and NaN in the same place are no difference (a mask may mean them); one without
    the other is an infinite one. Where nothing but zeros is expected, the difference itself.
    """
    if not expected.numel():
        return 0.0
    expected, found = expected.double(), found.double()
    same = (expected == found) | (expected.isnan() & found.isnan())
    gap = torch.where(same, 0.0, (expected - found).abs())
    return gap.max().nan_to_num(torch.inf, torch.inf).item() / (largest(expected) or 1.0)
