"""Which rows of a layer's input are looked at: output positions, drawn anew for each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinet.calibrate.batches import images_in
from thinet.calibrate.layers import Layer
from thinet.calibrate.patches import position_grid, sample_positions
from thinet.errors import OptionError
from thinet.types import ExampleInputs

WIDEST = 6144
"""Columns of a consumer's input up to which its second moments are formed."""


@dataclass(frozen=True)
class Rows:
    """How many output positions of a layer are looked at, over the whole calibration set.

    `per_column` for each column of the layer's input, so that its least squares are well
    determined, and at least `least`. Of so many, `choosing` is the part from which channels are
    chosen, for which fewer do.
    """

    per_column: int = 8
    least: int = 16384
    choosing: float = 0.5

    def __post_init__(self) -> None:
        if self.per_column < 0 or self.least < 1:
            raise OptionError(f"rows: per_column is at least 0 and least at least 1; got {self}")
        if not 0 < self.choosing <= 1:
            raise OptionError(f"rows: choosing is a part above 0 and at most 1; got {self}")

    def count(self, columns: int) -> int:
        return max(self.per_column * columns, self.least)

    def to_choose(self) -> Rows:
        """Those from which channels are chosen."""
        return Rows(
            math.ceil(self.per_column * self.choosing), math.ceil(self.least * self.choosing), 1.0
        )


def positions_in(layer: Layer, batches: Sequence[ExampleInputs]) -> int:
    """Output positions of a layer in all batches together, where batches are alike."""
    images = sum(images_in(batch) for batch in batches)
    there = math.prod(layer.y.shape) // layer.outputs  # in the first batch
    return images * there // max(images_in(batches[0]), 1)


def positions_of(
    layer: Layer, x: Tensor, columns: int, rows: Rows, share: float, seed: int, batch: int
) -> Tensor | None:
    """Flat (image, position) indices to look at in one batch; None for all.

    The same for the dense and the cut network: they depend on the output's shape only.

    Args:
        share: the batch's part of all calibration images.
    """
    images, positions = position_grid(tuple(x.shape), layer.geometry)
    some = math.ceil(wanted(rows, columns) * share)
    if some >= images * positions:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.op * 1_009 + batch)
    return sample_positions(images, positions, some, generator).to(x.device)


def wanted(rows: Rows, columns: int) -> int:
    """How many of a layer whose input has so many columns."""
    return rows.count(columns if columns <= WIDEST else 0)  # no more to solve what is not solved
