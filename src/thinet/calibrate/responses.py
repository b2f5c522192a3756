"""What single feature maps tell on their own: their zeros."""

from __future__ import annotations

from torch import Tensor


def _per_channel(maps: Tensor) -> Tensor:
    return maps.flatten(2) if maps.dim() > 2 else maps[..., None]


def zero_share(maps: Tensor) -> Tensor:
    """Share of exact zeros in each channel (APoZ, Hu et al. 2016), over images and positions.

    Args:
        maps: (images, C, *spatial), after the ReLU.

    Returns:
        (C,) float64 in 0..1.
    """
    return (_per_channel(maps) == 0).double().mean((0, 2))
