"""One forward pass of the dense network: moments at the consumers, targets for the repair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thinet.calibrate.batches import images_in
from thinet.calibrate.gram import gram_rows, unit_sums
from thinet.calibrate.layers import Layer, find_layers, same_layers
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
from thinet.errors import CalibrationError, OptionError
from thinet.trace.interpret import Environment, Execution
from thinet.trace.record import Op, Program
from thinet.types import ChannelGroup, ExampleInputs, Progress

DRAWS = 10  # single outputs of each image in the paper's sampling

WIDEST = 6144
"""Columns of a consumer's input up to which its second moments are formed."""

SKETCH = 256
"""Random mixtures of a wider consumer's outputs from which its gram is estimated."""


@dataclass(frozen=True)
class Rows:
    """How many output positions of a layer are looked at, over the whole calibration set.

    `per_column` for each column of the layer's input, so that its least squares are well
    determined, and at least `least`.
    """

    per_column: int = 16
    least: int = 16384

    def __post_init__(self) -> None:
        if self.per_column < 0 or self.least < 1:
            raise OptionError(f"rows: per_column is at least 0 and least at least 1; got {self}")

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
    """What one pass over the dense network found, by operation index in the traced program.

    `moments` of the consumers' inputs; where these would be too wide, or the paper's sampling was
    asked for, instead `grams` (units, units) by operation and group name, and the moments of the
    layer's `outputs`. `zeros` are shares per input channel.
    """

    layers: Mapping[int, Layer]
    moments: dict[int, Moments] = field(default_factory=dict)
    grams: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    outputs: dict[int, Moments] = field(default_factory=dict)
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
    # What is too wide to be solved for needs no rows for it.
    wanted = math.ceil(rows.count(columns if columns <= WIDEST else 0) * share)
    if wanted >= images * positions:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.op * 1_009 + batch)
    return sample_positions(images, positions, wanted, generator).to(x.device)


@dataclass
class Collector:
    """Observers for one pass over the dense network, batch after batch.

    Attributes:
        layers: those of the running program, by its operations.
        key: their operations in the traced program, by which all is stored.
        consumers: for each stored operation whose input is measured, the groups it mixes: name,
            number of units, unit of each input channel.
        keep_targets: whether outputs are kept at sampled positions.
        zeros: whether zeros are counted.
        sampling: "exact" or "paper".
    """

    execution: Execution
    found: Observations
    layers: Mapping[int, Layer]
    key: Mapping[int, int]
    consumers: Mapping[int, Sequence[tuple[str, int, Tensor]]]
    keep_targets: bool
    zeros: bool
    sampling: str
    rows: Rows
    seed: int
    share: float = 1.0
    batch: int = 0
    _adders: dict[int, list[Layer]] = field(default_factory=dict)
    _positions: dict[int, Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.layers.values():
            if layer.add is not None and self.keep_targets:
                self._adders.setdefault(layer.add, []).append(layer)

    def before(self, op: Op, envs: Sequence[Environment]) -> None:
        for layer in self._adders.get(op.index, ()):
            assert layer.shortcut is not None
            rows = output_rows(
                envs[0][layer.shortcut.id], layer.geometry, self._positions[layer.op]
            )
            self.found.targets[self.key[layer.op]].shortcut.append(rows.clone())
        layer = self.layers.get(op.index)
        if layer is None:
            return
        x, weight = envs[0][layer.x.id], self.execution.tensors[layer.weight]
        columns = columns_of(layer, weight)
        positions = positions_of(layer, x, columns, self.rows, self.share, self.seed, self.batch)
        self._positions[op.index] = positions
        if self.key[op.index] in self.consumers:
            self._measure(layer, x, weight, positions, columns)

    def after(self, op: Op, envs: Sequence[Environment]) -> None:
        layer = self.layers.get(op.index)
        if layer is None:
            return
        key, positions = self.key[op.index], self._positions[op.index]
        if self.keep_targets:
            kept = self.found.targets.setdefault(key, LayerTargets())
            kept.positions.append(positions)
            kept.y.append(output_rows(envs[0][layer.y.id], layer.geometry, positions).clone())
        if key in self.found.outputs:
            y = output_rows(envs[0][layer.y.id], layer.geometry, positions)
            self.found.outputs[key].add(y[:, :0], y)

    def _measure(
        self, layer: Layer, x: Tensor, weight: Tensor, positions: Tensor | None, columns: int
    ) -> None:
        found, key = self.found, self.key[layer.op]
        where = f"{layer.module or 'the model itself'} ({layer.weight})"
        if self.zeros:
            maps = x if layer.geometry.rank else x.reshape(-1, x.shape[-1])
            counted = zero_share(maps).cpu() * self.share
            found.zeros[key] = found.zeros.get(key, 0) + counted
        if self.sampling == "paper" or columns > WIDEST:
            if not bool(torch.isfinite(x).all()):
                raise CalibrationError(
                    f"{where}: its input holds NaN or infinite values; check the calibration "
                    "images and the weights before this layer"
                )
            if key not in found.outputs:
                found.outputs[key] = Moments(0, len(weight), where=where, device=x.device)
            for name, count, units in self.consumers[key]:
                part = self._gram(layer, x, weight, positions, units, count).cpu() * self.share
                found.grams[key, name] = found.grams.get((key, name), 0) + part
            return
        if key not in found.moments:
            found.moments[key] = Moments(columns, where=where, device=x.device)
        found.moments[key].add(patches(x, layer.geometry, positions))

    def _gram(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        positions: Tensor | None,
        units: Tensor,
        count: int,
    ) -> Tensor:
        """(units, units), the mean over the rows of this batch, without second moments."""
        dense = dense_weight(weight, layer.geometry)
        key = self.key[layer.op]
        generator = torch.Generator().manual_seed(self.seed + key * 7919 + self.batch)
        if self.sampling == "paper":
            rows = paper_rows(x, dense, layer.geometry, DRAWS, generator).double()
            parts = unit_sums(rows, units, count)
            return parts.T @ parts / len(parts) * len(dense)
        phi = patches(x, layer.geometry, positions)
        total = gram_rows(phi, dense, units, count, sketch=SKETCH, generator=generator)
        return total / len(phi)


def collect(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    *,
    program: Program,
    groups: Sequence[ChannelGroup],
    targets: bool = True,
    zeros: bool = False,
    sampling: str = "exact",
    rows: Rows | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Observations:
    """Run the dense network once over the batches and keep only sums and sampled targets.

    Args:
        program: the traced program, to which the groups' sites and what is found refer.
        groups: those whose consumers' inputs are measured.
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
    layers, traced = find_layers(execution.program(batches[0])), find_layers(program)
    key = same_layers(layers, traced)
    found = Observations({key[op]: layer for op, layer in layers.items() if op in key})
    consumers: dict[int, list[tuple[str, int, Tensor]]] = {}
    for group in groups:
        for site in group.sites:
            units = torch.tensor(site.units)
            consumers.setdefault(site.op, []).append((group.name, group.channels, units))
    collector = Collector(
        execution=execution,
        found=found,
        layers={op: layer for op, layer in layers.items() if op in key},
        key=key,
        consumers=consumers,
        keep_targets=targets,
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
