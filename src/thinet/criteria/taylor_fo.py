"""First-order Taylor expansion over weights or gates (Molchanov et al., CVPR 2019)."""

from __future__ import annotations

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


@criterion("taylor-fo", needs={"taylor_fo"})
def taylor_fo(stats: GroupStatistics) -> Order:
    """The smallest (sum of gradient * weight)^2 goes first."""
    assert stats.taylor_fo is not None
    return by_score(stats, stats.taylor_fo)
