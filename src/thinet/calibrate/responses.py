"""What single feature maps tell on their own: zeros and first-order loss changes."""

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


def taylor_sums(maps: Tensor, gradient: Tensor) -> Tensor:
    """Sum over images of |mean over positions of dL/dz * z| (Molchanov et al. 2017, eq. 8).

    The absolute value comes after the mean over positions and before the sum over images.

    Args:
        maps, gradient: (images, C, *spatial); the gradient of the loss *summed* over images.

    Returns:
        (C,) float64; divide by the images seen.
    """
    products = _per_channel(maps).double() * _per_channel(gradient).double()
    return products.mean(2).abs().sum(0)


def taylor_weights(weights: Tensor, gradient: Tensor) -> Tensor:
    """(sum over a unit's weights of gradient * weight)^2 (Molchanov et al. 2019, eq. 8).

    Args:
        weights, gradient: (C, fan), or (C,) for a BatchNorm's scale, as gates.

    Returns:
        (C,) float64, for one batch; the importance is its mean over batches.
    """
    products = weights.detach().double() * gradient.detach().double()
    return products.reshape(len(weights), -1).sum(1).square()
