"""What the dense network makes, kept for the repair."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from thinet.calibrate.layers import Layer
from thinet.calibrate.moments import magnitude
from thinet.calibrate.ordering import behind, shortcut_source
from thinet.calibrate.rows import Rows, positions_in, wanted
from thinet.store import Shelf
from thinet.trace.interpret import Execution, dependencies
from thinet.trace.program import Program
from thinet.types import ExampleInputs

HALVED_FROM = 2**29
"""Bytes of targets in all from which they are kept in half precision.

A value is rounded by 2^-11 of itself at most, each by chance, and a least-squares solution is a
mean over thousands of them. What does not fit into memory goes through a file, which costs more.
"""


@dataclass
class LayerTargets:
    """What the dense network makes at the sampled positions of a layer, batch by batch.

    In half precision where they are many (`HALVED_FROM`).

    Attributes:
        y: rows (rows, N), with the shortcut or without.
        undo: (N,) what brings the shortcut, which is added behind the norm, before the norm; None
            where no shortcut is kept.
        shortcut: where it may not be there yet when the layer is refitted; else it is in `y`.
    """

    positions: list[Tensor | None] = field(default_factory=list)
    y: Shelf = field(default_factory=Shelf)
    shortcut: Shelf = field(default_factory=Shelf)
    undo: Tensor | None = None

    @property
    def summed(self) -> bool:
        """Whether the shortcut is in `y`."""
        return self.undo is not None and not self.shortcut


def behind_their_shortcuts(program: Program, layers: Mapping[int, Layer]) -> set[int]:
    """Operations of the layers that need what is added to them, as in a block around an identity.

    In whatever order they are refitted, their shortcut is there.
    """
    needs = dependencies(program)
    sources = {op: shortcut_source(program, layer) for op, layer in layers.items()}
    return {
        op for op, source in sources.items() if source is not None and behind(needs, op, source)
    }


def in_half(rows: Tensor) -> Tensor:
    """float32 rows in half precision, unless its range is not theirs."""
    if rows.dtype != torch.float32 or not rows.numel():
        return rows
    return rows.half() if 1e-2 <= magnitude(rows) <= 6e4 else rows


def target_bytes(
    layers: Mapping[int, Layer],
    execution: Execution,
    rows: Rows,
    batches: Sequence[ExampleInputs],
    at_hand: Collection[int],
) -> int:
    """Bytes that the targets of all layers take, where batches are alike.

    Args:
        at_hand: of `behind_their_shortcuts`, which need no shortcut beside their outputs.
    """
    total = 0
    for layer in layers.values():
        there = positions_in(layer, batches)
        looked_at = min(there, wanted(rows, layer.columns))
        apart = layer.shortcut is not None and layer.op not in at_hand
        kept = layer.outputs * layer.y.dtype.itemsize * (2 if apart else 1)
        total += looked_at * kept
    return total
