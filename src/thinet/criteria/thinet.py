"""ThiNet's greedy selection (Luo, Wu and Lin, ICCV 2017, algorithm 1), on the exact gram."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.criteria.base import GroupStatistics, Order, check_finite, criterion, rising


def greedy(gram: Tensor) -> tuple[list[int], Tensor]:
    """Grow the removed set T by the channel that makes 1_T' G 1_T least, O(C^2) in all.

    Args:
        gram: (C, C) symmetric.

    Returns:
        The channels in order, and the objective after each, (C,) float64. The objective may fall
        where channels cancel each other.
    """
    gram = gram.double()
    added = gram.diagonal().clone()
    order: list[int] = []
    costs = torch.empty_like(added)
    for step in range(len(gram)):
        choice = added.argmin()
        costs[step] = added[choice]
        order.append(int(choice))
        added.add_(gram[order[-1]], alpha=2)
        added[choice] = torch.inf
    return order, costs.cumsum(0)


@criterion("thinet", needs={"gram"})
def thinet(stats: GroupStatistics) -> Order:
    """Errors are the running maximum of ThiNet's objective, before any repair."""
    assert stats.gram is not None
    check_finite(stats, stats.gram)
    order, errors = greedy(stats.gram)
    return Order(tuple(order), rising(errors))
