"""First-order Taylor expansion over feature maps (Molchanov et al., ICLR 2017)."""

from __future__ import annotations

from torch import Tensor

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


def normalised(taylor: Tensor) -> Tensor:
    """Scores divided by their L2 norm over the layer, so that layers compare (their eq. 9)."""
    scores = taylor.detach().double()
    norm = scores.norm()
    return scores / norm if norm > 0 else scores


@criterion("taylor", needs={"taylor"})
def taylor(stats: GroupStatistics) -> Order:
    """The map whose removal changes the loss least, to first order, goes first."""
    assert stats.taylor is not None
    return by_score(stats, normalised(stats.taylor))
