"""Group-wise Brain Damage (Lebedev and Lempitsky, CVPR 2016), as a score of whole channels.

The paper drives single taps of an input map to zero: groups {K[n, c, s] for all outputs n} of the
consumer's kernel K, with the penalty sum over c, s of || K[:, c, s] ||. The channel form adds up
the penalty of all taps s of an input channel c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.criteria.base import Consumer, GroupStatistics, Order, by_score, criterion


def tap_norms(weight: Tensor) -> Tensor:
    """(C, taps) norms over all outputs of a (N, C, *kernel) weight."""
    kernels = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    return kernels.detach().double().norm(dim=0)


def penalties(consumers: tuple[Consumer, ...], channels: int) -> Tensor:
    """(units,) group-lasso penalty, over all consumers and all input channels of a unit."""
    device = consumers[0].weight.device
    total = torch.zeros(channels, dtype=torch.float64, device=device)
    for consumer in consumers:
        units = consumer.units.to(device)
        member = units >= 0
        total.index_add_(0, units[member], tap_norms(consumer.weight).sum(1)[member])
    return total


@criterion("group-brain-damage", needs={"weights"})
def group_brain_damage(stats: GroupStatistics) -> Order:
    """The smallest penalty goes first."""
    return by_score(stats, penalties(stats.consumers, stats.channels))
