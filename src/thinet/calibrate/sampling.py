"""The paper's own sampling: single values of the next layer's output (ThiNet, ICCV 2017, 3.2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.calibrate.patches import Geometry, patches, position_grid


def paper_rows(
    x: Tensor, weight: Tensor, geometry: Geometry, draws: int, generator: torch.Generator
) -> Tensor:
    """Split randomly drawn outputs of a consumer into the parts that its input channels make.

    Each draw takes one random filter n and one random output position, with replacement, as the
    authors do (10 draws for each of 10 images a class): x_c = sum over taps of W[n, c] * phi[c],
    and the row's sum over c is the output without its bias. The mean of the rows' outer products
    estimates G / N, with G the exact gram over all N filters.

    Args:
        x: the consumer's input, (images, C, *spatial) or (images, ..., C) for a linear layer.
        weight: (N, C, *kernel), dense over groups.
        draws: draws for each image.

    Returns:
        (images * draws, C).
    """
    images, positions = position_grid(tuple(x.shape), geometry)
    rows = images * draws
    position = torch.randint(positions, (rows,), generator=generator)
    filters = torch.randint(len(weight), (rows,), generator=generator).to(weight.device)
    image = torch.arange(images).repeat_interleave(draws)
    phi = patches(x, geometry, image * positions + position)
    kernels = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    return (phi.view(rows, weight.shape[1], -1) * kernels[filters]).sum(-1)
