"""One forward pass of the dense network: moments at the consumers, targets for the repair."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from thinet.calibrate.batches import images_in
from thinet.calibrate.curvature import weighed
from thinet.calibrate.gram import PartSums, unit_sums
from thinet.calibrate.layers import (
    Layer,
    find_layers,
    inverse_gains,
    output_gains,
    same_layers,
)
from thinet.calibrate.moments import Moments, sum_bytes
from thinet.calibrate.patches import dense_weight, output_rows, patches, row_blocks
from thinet.calibrate.responses import zero_share
from thinet.calibrate.room import leave_room, parts_that_fit
from thinet.calibrate.rows import WIDEST, Rows, positions_of
from thinet.calibrate.sampling import paper_rows
from thinet.calibrate.targets import (
    HALVED_FROM,
    LayerTargets,
    behind_their_shortcuts,
    in_half,
    target_bytes,
)
from thinet.errors import CalibrationError
from thinet.store import Shelf, Store
from thinet.trace.environment import Environment
from thinet.trace.interpret import Execution
from thinet.trace.program import Op, Program
from thinet.types import ChannelGroup, ExampleInputs, Progress

DRAWS = 10  # single outputs of each image in the paper's sampling

SKETCH = 256
"""Random mixtures of a wider consumer's outputs from which its gram is estimated."""


@dataclass
class Observations:
    """What one pass over the dense network found, by operation index in the traced program.

    `moments` of the consumers' inputs; where these would be too wide instead the sums of the
    `parts` that units make of their outputs, and for the paper's sampling `grams` (units, units)
    by operation and group name; for both the moments of the layer's `outputs`. `signals` are
    moments of the consumers' outputs as they go on, behind a BatchNorm and with their shortcut.
    `zeros` are shares per input channel. `roots` say what an output's error costs the loss, where
    that was asked for (`curvature`).
    """

    layers: Mapping[int, Layer]
    moments: dict[int, Moments] = field(default_factory=dict)
    parts: dict[int, PartSums] = field(default_factory=dict)
    grams: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    outputs: dict[int, Moments] = field(default_factory=dict)
    signals: dict[int, Moments] = field(default_factory=dict)
    zeros: dict[int, Tensor] = field(default_factory=dict)
    targets: dict[int, LayerTargets] = field(default_factory=dict)
    roots: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass
class Collector:
    """Observers for one pass over the dense network, batch after batch.

    Attributes:
        layers: those of the running program, by its operations.
        key: their operations in the traced program, by which all is stored.
        consumers: for each stored operation whose input is measured, the groups it mixes: name,
            number of units, unit of each input channel.
        keep_targets: whether outputs are kept at sampled positions.
        shortcuts: whether what is added to them is kept too.
        summed: layers in whose targets it is.
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
    shortcuts: bool
    summed: Collection[int]
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
            shortcut = self._rows(layer.as_made(envs[0][layer.shortcut.id]), layer)
            y, kept = self._made.pop(layer.op), self.found.targets[self.key[layer.op]]
            if layer.op in self.summed:
                assert kept.undo is not None
                kept.y.append(self._kept(y + shortcut * kept.undo))
            elif self.shortcuts:
                kept.shortcut.append(self._kept(shortcut))
            self._signal(layer, y, shortcut)
        layer = self.layers.get(op.index)
        if layer is None or (self.again and self.key[op.index] not in self.measured):
            return
        x, weight = envs[0][layer.x.id], layer.matrix(self.execution.tensors)
        columns = layer.columns

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
                self.found.targets[key] = self._targets(layer, rows)
            kept = self.found.targets[key]
            kept.positions.append(self._positions[op.index])
            if op.index not in self.summed:
                kept.y.append(self._kept(rows))
            if layer.add is None:
                self._signal(layer, rows, None)
            else:
                self._made[layer.op] = rows
        if key in self.found.outputs:
            self.found.outputs[key].add(rows[:, :0], rows)

    def _targets(self, layer: Layer, rows: Tensor) -> LayerTargets:
        undo = None
        if layer.add is not None and self.shortcuts:
            undo = inverse_gains(layer, self.execution.tensors).to(rows)
        return LayerTargets([], Shelf(self.store), Shelf(self.store), undo)

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
        signal = y * output_gains(layer, self.execution.tensors).to(y)
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
            self._add_parts(layer, x, weight, positions)

    def _add_parts(self, layer: Layer, x: Tensor, weight: Tensor, positions: Tensor | None) -> None:
        """Add what each unit makes of the output, without second moments of the input."""
        found, key = self.found, self.key[layer.op]
        generator = torch.Generator().manual_seed(self.seed + key * 7919 + self.batch)
        if self.sampling == "exact":
            if key not in found.parts:
                dense = weighed(dense_weight(weight, layer.geometry), found.roots.get(key))
                found.parts[key] = PartSums(dense, self.consumers[key], SKETCH)
            found.parts[key].add(patches(x, layer.geometry, positions), self.share, generator)
            return
        dense = weighed(dense_weight(weight, layer.geometry), found.roots.get(key))
        x = x if layer.geometry.rank else x.flatten(0, -2)  # each row has its draws
        rows = paper_rows(x, dense, layer.geometry, DRAWS, generator).double()
        for name, count, units in self.consumers[key]:
            parts = unit_sums(rows, units, count)
            part = parts.T @ parts / len(parts) * len(dense) * self.share
            found.grams[key, name] = found.grams.get((key, name), 0) + part


def collect(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    *,
    program: Program,
    groups: Sequence[ChannelGroup],
    targets: bool = True,
    shortcuts: bool = True,
    zeros: bool = False,
    sampling: str = "exact",
    rows: Rows | None = None,
    seed: int = 0,
    store: Store | None = None,
    roots: Mapping[int, Tensor] | None = None,
    progress: Progress | None = None,
) -> Observations:
    """Run the dense network over the batches and keep only sums and sampled targets.

    Once, or where the moments of all consumers are more than the store has room for, once for each
    part of them; what is found is the same.

    Args:
        program: the traced program, to which the groups' sites and what is found refer.
        groups: those whose consumers' inputs are measured.
        targets: keep the outputs of all layers at sampled positions, for the repair.
        shortcuts: and what is added to them.
        zeros: also the share of zeros in each input channel of the consumers.
        sampling: "exact" (all filters at the sampled positions) or "paper" (10 single outputs of
            each image, ThiNet section 3.2.1).
        rows: how many positions are sampled in each layer.
        store: where targets and moments rest, and what bounds them.
        roots: of `collect_curvature`, for grams that are made on the way and for what follows.

    Raises:
        CalibrationError: activations that are not finite (names the layer), or batches that do
            not fit the model.
        OptionError: the store's bound is less than the work itself needs.
    """
    execution = Execution(model)
    running = execution.program(batches[0])
    layers, traced = find_layers(running), find_layers(program)
    key = same_layers(layers, traced)
    layers = {op: layer for op, layer in layers.items() if op in key}
    found = Observations({key[op]: layer for op, layer in layers.items()}, roots=roots or {})
    consumers: dict[int, list[tuple[str, int, Tensor]]] = {}
    for group in groups:
        for site in group.sites:
            units = torch.tensor(site.units)
            consumers.setdefault(site.op, []).append((group.name, group.channels, units))
    columns = {key[op]: layer.columns for op, layer in layers.items()}
    rows = rows or Rows()
    solved = {op: count for op, count in columns.items() if count <= WIDEST}
    passes = [[op for op in solved if op in consumers] if sampling == "exact" else []]
    systems = 0
    if store is not None:
        systems = leave_room(store, execution, batches, layers)
        passes = parts_that_fit(passes[0], columns, systems + store.limit // 2)
    at_hand = behind_their_shortcuts(running, layers)
    collector = Collector(
        execution=execution,
        found=found,
        layers=layers,
        key=key,
        consumers=consumers,
        keep_targets=targets,
        shortcuts=shortcuts,
        summed=at_hand if targets and shortcuts else (),
        halved=target_bytes(layers, execution, rows, batches, at_hand) > HALVED_FROM,
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
