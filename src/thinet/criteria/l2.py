"""The L2 norm of each filter, the smallest goes first."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


def norms(filters: tuple[Tensor, ...]) -> Tensor:
    """(units,) Euclidean norm over the weights of all producers, each (units, fan)."""
    return torch.stack([f.detach().double().square().sum(1) for f in filters]).sum(0).sqrt()


@criterion("l2", needs={"filters"})
def l2(stats: GroupStatistics) -> Order:
    """The norm of this layer's filter, over all producers of the group."""
    return by_score(stats, norms(stats.filters))
