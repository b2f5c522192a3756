"""Average percentage of zeros (Hu et al. 2016): the channel that is zero most often goes first."""

from __future__ import annotations

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


@criterion("apoz", needs={"zeros"})
def apoz(stats: GroupStatistics) -> Order:
    """The highest share of zeros after the activation goes first."""
    assert stats.zeros is not None
    return by_score(stats, -stats.zeros)
