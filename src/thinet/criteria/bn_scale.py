"""BatchNorm scale (Network Slimming, Liu et al., ICCV 2017): the smallest goes first."""

from __future__ import annotations

from thinet.criteria.base import GroupStatistics, Order, by_score, criterion


@criterion("bn-scale", needs={"bn_scale"})
def bn_scale(stats: GroupStatistics) -> Order:
    """The smallest absolute scale goes first."""
    assert stats.bn_scale is not None
    return by_score(stats, stats.bn_scale.detach().abs())
