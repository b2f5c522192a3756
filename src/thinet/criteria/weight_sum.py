"""Weight sum (Li et al., ICLR 2017): the L1 norm of each filter, the smallest goes first."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


def weight_sums(filters: tuple[Tensor, ...]) -> Tensor:
    """(units,) sum of absolute weights over all producers, each (units, fan)."""
    return torch.stack([f.detach().double().abs().sum(1) for f in filters]).sum(0)


@criterion("weight-sum", needs={"filters"})
def weight_sum(stats: GroupStatistics) -> Order:
    """The sum of absolute weights of this layer's filter, over all producers of the group."""
    return by_score(stats, weight_sums(stats.filters))
