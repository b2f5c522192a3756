"""Filter pruning via geometric median (He et al., CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


def distance_sums(filters: tuple[Tensor, ...]) -> Tensor:
    """(units,) sum of Euclidean distances to all other filters; producers are laid side by side."""
    points = torch.cat([f.detach().double() for f in filters], dim=1)
    products = points @ points.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0).sqrt()
    return distances.fill_diagonal_(0).sum(1)


@criterion("fpgm", needs={"filters"})
def fpgm(stats: GroupStatistics) -> Order:
    """The filter nearest to all others, which they can replace, goes first."""
    return by_score(stats, distance_sums(stats.filters))
