"""One forward pass of the dense network: moments at the consumers, targets for the repair."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thinet.calibrate.batches import images_in
from thinet.calibrate.gram import gram_rows
from thinet.calibrate.layers import Layer, find_layers
from thinet.calibrate.moments import Moments
from thinet.calibrate.patches import (
    dense_weight,
    output_rows,
    patches,
    position_grid,
    sample_positions,
)
from thinet.calibrate.responses import zero_share
from thinet.calibrate.sampling import paper_rows
from thinet.errors import CalibrationError
from thinet.trace.interpret import Environment, Execution
from thinet.trace.record import Op
from thinet.types import ExampleInputs, Progress

DRAWS = 10  # single outputs of each image in the paper's sampling

WIDEST = 6144
"""Columns of a consumer's input up to which its second moments are formed."""


@dataclass(frozen=True)
class Rows:
    """How many output positions of a layer are looked at, over the whole calibration set.

    `per_column` for each column of the layer's input, so that its least squares are well
    determined, and at least `least`.
    """

    per_column: int = 16
    least: int = 16384

    def count(self, columns: int) -> int:
        return max(self.per_column * columns, self.least)


@dataclass
class LayerTargets:
    """What the dense network makes at the sampled positions of a layer, batch by batch.

    `y` are rows (rows, N); `shortcut` what is added to them behind the norm, or None.
    """

    positions: list[Tensor | None] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    shortcut: list[Tensor] = field(default_factory=list)


@dataclass
class Observations:
    """What one pass over the dense network found, by operation index.

    `moments` of the consumers' inputs; where these would be too wide, or the paper's sampling was
    asked for, `grams` per input channel instead. `zeros` are shares per input channel.
    """

    layers: Mapping[int, Layer]
    moments: dict[int, Moments] = field(default_factory=dict)
    grams: dict[int, Tensor] = field(default_factory=dict)
    zeros: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, LayerTargets] = field(default_factory=dict)


def columns_of(layer: Layer, weight: Tensor) -> int:
    """Columns of the layer's input patches: input channels x taps."""
    return weight.shape[1] * layer.geometry.groups * layer.geometry.taps


def positions_of(
    layer: Layer, x: Tensor, columns: int, rows: Rows, share: float, seed: int, batch: int
) -> Tensor | None:
    """Flat (image, position) indices to look at in one batch; None for all.

    The same for the dense and the cut network: they depend on the output's shape only.

    Args:
        share: the batch's part of all calibration images.
    """
    images, positions = position_grid(tuple(x.shape), layer.geometry)
    wanted = math.ceil(rows.count(columns) * share)
    if wanted >= images * positions:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.op * 1_009 + batch)
    return sample_positions(images, positions, wanted, generator).to(x.device)


@dataclass
class Collector:
    """Observers for one pass over the dense network, batch after batch.

    Attributes:
        consumers: operations whose input moments are wanted.
        keep_targets: operations whose outputs are kept at sampled positions.
        zeros: whether zeros are counted.
        sampling: "exact" or "paper".
    """

    execution: Execution
    found: Observations
    consumers: Collection[int]
    keep_targets: Collection[int]
    zeros: bool
    sampling: str
    rows: Rows
    seed: int
    share: float = 1.0
    batch: int = 0
    _adders: dict[int, list[Layer]] = field(default_factory=dict)
    _positions: dict[int, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.found.layers.values():
            if layer.add is not None and layer.op in self.keep_targets:
                self._adders.setdefault(layer.add, []).append(layer)

    def before(self, op: Op, envs: Sequence[Environment]) -> None:
        for layer in self._adders.get(op.index, ()):
            assert layer.shortcut is not None
            rows = output_rows(
                envs[0][layer.shortcut.id], layer.geometry, self._positions[layer.op]
            )
            self.found.targets[layer.op].shortcut.append(rows.clone())
        layer = self.found.layers.get(op.index)
        if layer is None:
            return
        x, weight = envs[0][layer.x.id], self.execution.tensors[layer.weight]
        columns = columns_of(layer, weight)
        positions = positions_of(
            layer, x, columns, self.rows, self.share, self.seed, self.batch
        )
        self._positions[op.index] = positions
        if op.index in self.consumers:
            self._measure(layer, x, weight, positions, columns)

    def after(self, op: Op, envs: Sequence[Environment]) -> None:
        layer = self.found.layers.get(op.index)
        if layer is not None and op.index in self.keep_targets:
            kept = self.found.targets.setdefault(op.index, LayerTargets())
            positions = self._positions[op.index]
            kept.positions.append(positions)
            kept.y.append(output_rows(envs[0][layer.y.id], layer.geometry, positions).clone())

    def _measure(
        self, layer: Layer, x: Tensor, weight: Tensor, positions: Tensor | None, columns: int
    ) -> None:
        found, op = self.found, layer.op
        where = f"{layer.module or 'the model itself'} ({layer.weight})"
        if self.zeros:
            maps = x if layer.geometry.rank else x.reshape(-1, x.shape[-1])
            counted = zero_share(maps).cpu() * self.share
            found.zeros[op] = found.zeros.get(op, 0) + counted
        if self.sampling == "paper" or columns > WIDEST:
            if not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f"{where}: its input holds NaN or infinite values; check the calibration "
                    "images and the weights before this layer"
                )
            dense = dense_weight(weight, layer.geometry)
            if self.sampling == "paper":
                generator = torch.Generator().manual_seed(self.seed + op * 7919 + self.batch)
                parts = paper_rows(x, dense, layer.geometry, DRAWS, generator).double()
                found_gram = parts.T @ parts / len(parts) * len(dense)
            else:
                phi = patches(x, layer.geometry, positions)
                found_gram = gram_rows(phi, dense) / len(phi)
            found.grams[op] = found.grams.get(op, 0) + found_gram.cpu() * self.share
            return
        if op not in found.moments:
            found.moments[op] = Moments(columns, where=where, device=x.device)
        found.moments[op].add(patches(x, layer.geometry, positions))


def collect(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    *,
    consumers: Collection[int],
    targets: bool = True,
    zeros: bool = False,
    sampling: str = "exact",
    rows: Rows | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Observations:
    """Run the dense network once over the batches and keep only sums and sampled targets.

    Args:
        consumers: operation indices of the layers whose input moments are wanted.
        targets: keep the outputs of all layers at sampled positions, for the repair.
        zeros: also the share of zeros in each input channel of the consumers.
        sampling: "exact" (all filters at the sampled positions) or "paper" (10 single outputs of
            each image, ThiNet section 3.2.1).
        rows: how many positions are sampled in each layer.

    Raises:
        CalibrationError: activations that are not finite (names the layer), or batches that do
            not fit the model.
    """
    execution = Execution(model)
    found = Observations(find_layers(execution.program(batches[0])))
    collector = Collector(
        execution=execution,
        found=found,
        consumers=set(consumers),
        keep_targets=set(found.layers) if targets else set(),
        zeros=zeros,
        sampling=sampling,
        rows=rows or Rows(),
        seed=seed,
    )
    images = sum(images_in(batch) for batch in batches)
    for number, batch in enumerate(batches):
        collector.share, collector.batch = images_in(batch) / images, number
        execution.run([batch], before=collector.before, after=collector.after)
        if progress is not None:
            progress("measuring the dense network", number + 1, len(batches))
    return found
