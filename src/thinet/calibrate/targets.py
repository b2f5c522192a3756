"""What the dense network makes, kept for the repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinet.calibrate.layers import Layer
from thinet.calibrate.moments import magnitude
from thinet.calibrate.rows import Rows, columns_of, positions_in, wanted
from thinet.store import Shelf
from thinet.trace.interpret import Execution
from thinet.types import ExampleInputs

HALVED_FROM = 2**29
"""Bytes of targets in all from which they are kept in half precision.

A value is rounded by 2^-11 of itself at most, each by chance, and a least-squares solution is a
mean over thousands of them. What does not fit into memory goes through a file, which costs more.
"""


@dataclass
class LayerTargets:
    """What the dense network makes at the sampled positions of a layer, batch by batch.

    `y` are rows (rows, N); `shortcut` what is added to them behind the norm, or None. In half
    precision where they are many (`HALVED_FROM`).
    """

    positions: list[Tensor | None] = field(default_factory=list)
    y: Shelf = field(default_factory=Shelf)
    shortcut: Shelf = field(default_factory=Shelf)


def in_half(rows: Tensor) -> Tensor:
    """float32 rows in half precision, unless its range is not theirs."""
    if rows.dtype != torch.float32 or not rows.numel():
        return rows
    return rows.half() if 1e-2 <= magnitude(rows) <= 6e4 else rows


def target_bytes(
    layers: Mapping[int, Layer], execution: Execution, rows: Rows, batches: Sequence[ExampleInputs]
) -> int:
    """Bytes that the targets of all layers take, where batches are alike."""
    total = 0
    for layer in layers.values():
        weight = execution.tensors[layer.weight]
        there = positions_in(layer, weight, batches)
        looked_at = min(there, wanted(rows, columns_of(layer, weight)))
        kept = len(weight) * layer.y.dtype.itemsize * (1 if layer.shortcut is None else 2)
        total += looked_at * kept
    return total
