"""A random order: the baseline that every criterion must beat."""

from __future__ import annotations

import zlib

import torch

from thinet.criteria.base import GroupStatistics, Order, criterion


@criterion("random", needs=())
def random(stats: GroupStatistics) -> Order:
    """The same for the same group name and seed, on any machine."""
    seed = zlib.crc32(f"{stats.seed}:{stats.name}".encode())
    generator = torch.Generator().manual_seed(seed)
    return Order(tuple(torch.randperm(stats.channels, generator=generator).tolist()))
