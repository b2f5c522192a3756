"""One forward pass of the dense network: moments at the consumers, targets for the repair."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thinet.calibrate.batches import images_in, tensors_in
from thinet.calibrate.gram import gram_rows, unit_sums
from thinet.calibrate.layers import Layer, find_layers, output_gains, same_layers
from thinet.calibrate.moments import Moments, magnitude, sum_bytes
from thinet.calibrate.patches import (
    BLOCK,
    dense_weight,
    output_rows,
    patches,
    position_grid,
    row_blocks,
    sample_positions,
)
from thinet.calibrate.responses import zero_share
from thinet.calibrate.sampling import paper_rows
from thinet.errors import CalibrationError, OptionError
from thinet.store import GIB, Shelf, Store
from thinet.trace.environment import Environment, peak_bytes
from thinet.trace.interpret import Execution
from thinet.trace.record import Op, Program
from thinet.types import ChannelGroup, ExampleInputs, Progress

DRAWS = 10  # single outputs of each image in the paper's sampling

WIDEST = 6144
"""Columns of a consumer's input up to which its second moments are formed."""

SYSTEMS = 4
"""Matrices as large as the largest second moments that selection and repair hold at once."""

ENTRY = 8  # bytes of a float64

HALVED_FROM = 2**29
"""Bytes of targets in all from which they are kept in half precision.

A value is rounded by 2^-11 of itself at most, each by chance, and a least-squares solution is a
mean over thousands of them. What does not fit into memory goes through a file, which costs more.
"""

SKETCH = 256
"""Random mixtures of a wider consumer's outputs from which its gram is estimated."""


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


@dataclass
class LayerTargets:
    """What the dense network makes at the sampled positions of a layer, batch by batch.

    `y` are rows (rows, N); `shortcut` what is added to them behind the norm, or None. In half
    precision where they are many (`HALVED_FROM`).
    """

    positions: list[Tensor | None] = field(default_factory=list)
    y: Shelf = field(default_factory=Shelf)
    shortcut: Shelf = field(default_factory=Shelf)


@dataclass
class Observations:
    """What one pass over the dense network found, by operation index in the traced program.

    `moments` of the consumers' inputs; where these would be too wide, or the paper's sampling was
    asked for, instead `grams` (units, units) by operation and group name, and the moments of the
    layer's `outputs`. `signals` are moments of the consumers' outputs as they go on, behind a
    BatchNorm and with their shortcut. `zeros` are shares per input channel.
    """

    layers: Mapping[int, Layer]
    moments: dict[int, Moments] = field(default_factory=dict)
    grams: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    outputs: dict[int, Moments] = field(default_factory=dict)
    signals: dict[int, Moments] = field(default_factory=dict)
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
    wanted = math.ceil(_wanted(rows, columns) * share)
    if wanted >= images * positions:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer.op * 1_009 + batch)
    return sample_positions(images, positions, wanted, generator).to(x.device)


def _wanted(rows: Rows, columns: int) -> int:
    return rows.count(columns if columns <= WIDEST else 0)  # no more to solve what is not solved


def in_half(rows: Tensor) -> Tensor:
    """float32 rows in half precision, unless its range is not theirs."""
    if rows.dtype != torch.float32 or not rows.numel():
        return rows
    return rows.half() if 1e-2 <= magnitude(rows) <= 6e4 else rows


@dataclass
class Collector:
    """Observers for one pass over the dense network, batch after batch.

    Attributes:
        layers: those of the running program, by its operations.
        key: their operations in the traced program, by which all is stored.
        consumers: for each stored operation whose input is measured, the groups it mixes: name,
            number of units, unit of each input channel.
        keep_targets: whether outputs are kept at sampled positions.
        halved: whether they are kept in half precision.
        zeros: whether zeros are counted.
        sampling: "exact" or "paper".
        again: whether another pass has seen all but the moments of `measured`.
        measured: the consumers whose moments are taken in this pass.
    """

    execution: Execution
    found: Observations
    layers: Mapping[int, Layer]
    key: Mapping[int, int]
    consumers: Mapping[int, Sequence[tuple[str, int, Tensor]]]
    keep_targets: bool
    halved: bool
    zeros: bool
    sampling: str
    rows: Rows
    seed: int
    store: Store | None = None
    again: bool = False
    measured: Collection[int] = ()
    share: float = 1.0
    batch: int = 0
    _adders: dict[int, list[Layer]] = field(default_factory=dict)
    _positions: dict[int, Tensor | None] = field(default_factory=dict)
    _made: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.layers.values():
            if layer.add is not None and self.keep_targets:
                self._adders.setdefault(layer.add, []).append(layer)

    def before(self, op: Op, envs: Sequence[Environment]) -> None:
        for layer in () if self.again else self._adders.get(op.index, ()):
            assert layer.shortcut is not None
            rows = self._rows(envs[0][layer.shortcut.id], layer)
            self.found.targets[self.key[layer.op]].shortcut.append(self._kept(rows))
            self._signal(layer, self._made.pop(layer.op), rows)
        layer = self.layers.get(op.index)
        if layer is None or (self.again and self.key[op.index] not in self.measured):
            return
        x, weight = envs[0][layer.x.id], self.execution.tensors[layer.weight]
        columns = columns_of(layer, weight)

        def positions(rows: Rows) -> Tensor | None:
            return positions_of(layer, x, columns, rows, self.share, self.seed, self.batch)

        self._positions[op.index] = positions(self.rows)
        if self.key[op.index] in self.consumers:
            self._measure(layer, x, weight, positions(self.rows.to_choose()), columns)

    def after(self, op: Op, envs: Sequence[Environment]) -> None:
        layer = self.layers.get(op.index)
        if layer is None or self.again:
            return
        key = self.key[op.index]
        rows = self._rows(envs[0][layer.y.id], layer)
        if self.keep_targets:
            if key not in self.found.targets:
                self.found.targets[key] = LayerTargets([], Shelf(self.store), Shelf(self.store))
            kept = self.found.targets[key]
            kept.positions.append(self._positions[op.index])
            kept.y.append(self._kept(rows))
            if layer.add is None:
                self._signal(layer, rows, None)
            else:
                self._made[layer.op] = rows
        if key in self.found.outputs:
            self.found.outputs[key].add(rows[:, :0], rows)

    def _rows(self, y: Tensor, layer: Layer) -> Tensor:
        positions = self._positions[layer.op]
        rows = output_rows(y, layer.geometry, positions)
        return rows.clone() if positions is None else rows

    def _kept(self, rows: Tensor) -> Tensor:
        return in_half(rows) if self.halved else rows

    def _signal(self, layer: Layer, y: Tensor, shortcut: Tensor | None) -> None:
        """Add what goes on from a consumer."""
        key = self.key[layer.op]
        if key not in self.consumers:
            return
        if key not in self.found.signals:
            self.found.signals[key] = Moments(
                0, y.shape[1], where=layer.module or layer.weight, device=y.device
            )
        signal = y * output_gains(layer.norm, y.shape[1], self.execution.tensors).to(y)
        signal = signal if shortcut is None else signal + shortcut
        self.found.signals[key].add(signal[:, :0], signal)

    def _measure(
        self, layer: Layer, x: Tensor, weight: Tensor, positions: Tensor | None, columns: int
    ) -> None:
        found, key = self.found, self.key[layer.op]
        where = f"{layer.module or 'the model itself'} ({layer.weight})"
        if self.zeros and not self.again:
            maps = x if layer.geometry.rank else x.reshape(-1, x.shape[-1])
            counted = zero_share(maps).cpu() * self.share
            found.zeros[key] = found.zeros.get(key, 0) + counted
        if key in self.measured:
            if key not in found.moments:
                found.moments[key] = Moments(columns, where=where, device=x.device)
            for _, phi in row_blocks(x, layer.geometry, positions):
                found.moments[key].add(phi)
        elif self.sampling == "paper" or columns > WIDEST:
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
    store: Store | None = None,
    progress: Progress | None = None,
) -> Observations:
    """Run the dense network over the batches and keep only sums and sampled targets.

    Once, or where the moments of all consumers are more than the store has room for, once for each
    part of them; what is found is the same.

    Args:
        program: the traced program, to which the groups' sites and what is found refer.
        groups: those whose consumers' inputs are measured.
        targets: keep the outputs of all layers at sampled positions, for the repair.
        zeros: also the share of zeros in each input channel of the consumers.
        sampling: "exact" (all filters at the sampled positions) or "paper" (10 single outputs of
            each image, ThiNet section 3.2.1).
        rows: how many positions are sampled in each layer.
        store: where targets and moments rest, and what bounds them.

    Raises:
        CalibrationError: activations that are not finite (names the layer), or batches that do
            not fit the model.
        OptionError: the store's bound is less than the work itself needs.
    """
    execution = Execution(model)
    layers, traced = find_layers(execution.program(batches[0])), find_layers(program)
    key = same_layers(layers, traced)
    layers = {op: layer for op, layer in layers.items() if op in key}
    found = Observations({key[op]: layer for op, layer in layers.items()})
    consumers: dict[int, list[tuple[str, int, Tensor]]] = {}
    for group in groups:
        for site in group.sites:
            units = torch.tensor(site.units)
            consumers.setdefault(site.op, []).append((group.name, group.channels, units))
    columns = {
        key[op]: columns_of(each, execution.tensors[each.weight]) for op, each in layers.items()
    }
    rows = rows or Rows()
    solved = {op: count for op, count in columns.items() if count <= WIDEST}
    passes = [[op for op in solved if op in consumers] if sampling == "exact" else []]
    systems = 0
    if store is not None:
        systems = leave_room(store, execution, batches, layers)
        passes = _passes(passes[0], columns, systems + store.limit // 2)
    collector = Collector(
        execution=execution,
        found=found,
        layers=layers,
        key=key,
        consumers=consumers,
        keep_targets=targets,
        halved=_target_bytes(layers, execution, rows, batches) > HALVED_FROM,
        zeros=zeros,
        sampling=sampling,
        rows=rows,
        seed=seed,
        store=store,
    )
    images = sum(images_in(batch) for batch in batches)
    for turn, measured in enumerate(passes):
        collector.measured, collector.again = measured, turn > 0
        size = sum(sum_bytes(columns[op]) for op in measured)
        with nullcontext() if store is None else store.reserved(max(size - systems, 0)):
            for number, batch in enumerate(batches):
                collector.share, collector.batch = images_in(batch) / images, number
                execution.run([batch], before=collector.before, after=collector.after)
                if progress is not None:
                    done = turn * len(batches) + number + 1
                    progress("measuring the dense network", done, len(passes) * len(batches))
        if store is not None:
            for op in measured:
                found.moments[op].rest(store)
    return found


def _target_bytes(
    layers: Mapping[int, Layer], execution: Execution, rows: Rows, batches: Sequence[ExampleInputs]
) -> int:
    """What the targets of all layers take, of batches alike."""
    share = sum(images_in(batch) for batch in batches) / max(images_in(batches[0]), 1)
    total = 0.0
    for layer in layers.values():
        weight, y = execution.tensors[layer.weight], layer.y
        there = share * math.prod(y.shape) / len(weight)
        looked_at = min(there, _wanted(rows, columns_of(layer, weight)))
        total += looked_at * len(weight) * y.dtype.itemsize * (1 if layer.shortcut is None else 2)
    return int(total)


def _passes(ops: Sequence[int], columns: Mapping[int, int], room: int) -> list[list[int]]:
    """The consumers in parts whose moments fit into memory together, in order."""
    passes: list[list[int]] = [[]]
    left = room
    for op in sorted(ops):
        size = sum_bytes(columns[op])
        if size > left and passes[-1]:
            passes.append([])
            left = room
        passes[-1].append(op)
        left -= size
    return passes


def leave_room(
    store: Store,
    execution: Execution,
    batches: Sequence[ExampleInputs],
    layers: Mapping[int, Layer],
) -> int:
    """Leave to the work itself what no store can spare; returns the least-squares systems' part.

    Args:
        layers: of the model that runs.

    Raises:
        OptionError: the store's bound is less than that.
    """
    largest = max(batches, key=images_in)
    columns = {op: columns_of(v, execution.tensors[v.weight]) for op, v in layers.items()}
    entries = (math.prod(v.y.shape[:1] + v.y.shape[2:]) * columns[op] for op, v in layers.items())
    widest = max((n for n in columns.values() if n <= WIDEST), default=0)
    systems = SYSTEMS * ENTRY * widest**2
    parts = {
        "the calibration images": sum(t.nbytes for batch in batches for t in tensors_in(batch)),
        f"what the model computes for {images_in(largest)} images at a time": peak_bytes(
            execution.program(largest)
        ),
        "the inputs of a layer in rows": 3 * 4 * min(max(entries, default=0), BLOCK),
        "the largest least-squares system": systems,
        "the smaller model": sum(tensor.nbytes for tensor in execution.tensors.values()),
    }
    text = ", ".join(f"{size / GIB:.3g} for {name}" for name, size in parts.items())
    store.set_aside(
        sum(parts.values()), f"{text}; calibrate in smaller batches or with fewer images"
    )
    return systems
