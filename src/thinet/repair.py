"""Refit the layers of a cut network by least squares, so that it answers as the dense one did.

All calibration batches move through the cut network together, one operation at a time. Before a
layer runs, its new weights are solved from the inputs that the network as cut and repaired so far
really gives it, and from the dense network's outputs at the same places, so errors do not pile up.
Where the layer's output is added to a shortcut, it also makes up for what the shortcut has lost
(He, Zhang and Sun, ICCV 2017, do the same for residual networks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinet.calibrate.collect import Observations
from thinet.calibrate.layers import (
    ROWS_CUT,
    Layer,
    dropouts,
    layers_beside,
    same_rows,
    trained_names,
)
from thinet.calibrate.ordering import in_order, shortcut_source
from thinet.calibrate.patches import dense_weight
from thinet.calibrate.room import leave_room
from thinet.calibrate.rows import WIDEST
from thinet.calibrate.statistics import site_gram
from thinet.calibrate.ways import picks_by_data
from thinet.errors import OptionError
from thinet.lstsq import solve_scale
from thinet.plan import Plan
from thinet.refit import Fit, solve
from thinet.store import Store
from thinet.surgery.apply import named_tensors
from thinet.trace.interpret import Environment, Execution, dependencies
from thinet.trace.program import Op
from thinet.types import ChannelGroup, ExampleInputs, Progress

SHARED = "its weights are used more than once"
FIXED = "its weights or its bias are a buffer, which is not trained"
IN_TURN = "its weights are used again on what they have made"


@dataclass(frozen=True)
class RepairSettings:
    """How the least squares are set up.

    Attributes:
        ridge: pull towards the old weights, relative to the mean diagonal of the system; up to a
            thousand times as strong where rows are few (see `thinet.lstsq.FEW`).
        layers: "all" layers behind the first cut, or only the "consumers" of cut channels.
        shortcut: make up for what the shortcut has lost.
        refine: iterations of the joint refit of producers and consumers that follows
            (`thinet.refine`), 0 for none. None: as many as pay where widths are shared out by
            error and a pass over the calibration images is cheap enough, else none.
        every: the joint refit looks at each `every`-th batch only.
    """

    ridge: float = 1e-3
    layers: str = "all"
    shortcut: bool = True
    refine: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise OptionError(f"ridge is at least 0; got {self.ridge!r}")
        if not isinstance(self.every, int) or self.every < 1:
            raise OptionError(f"every is a whole number from 1; got {self.every!r}")
        if self.refine is not None and (not isinstance(self.refine, int) or self.refine < 0):
            raise OptionError(f"refine is a whole number from 0, or None; got {self.refine!r}")
        if self.layers not in ("all", "consumers"):
            raise OptionError(f"unknown layers {self.layers!r}; choose all or consumers")


@dataclass(frozen=True)
class Repaired:
    """Names of the layers that were refitted, and of those that could not be, with the reason."""

    refitted: tuple[str, ...]
    skipped: Mapping[str, str]


def repair_full(
    small: nn.Module,
    plan: Plan,
    seen: Observations,
    batches: Sequence[ExampleInputs],
    *,
    settings: RepairSettings | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Refit the layers of a freshly cut network, in place.

    A convolution with groups is as many small least squares; a layer that is used several times is
    one over all its uses, with an intercept only where it has a bias.

    Args:
        small: the cut network.
        plan: how it was cut.
        seen: targets of the dense network, collected on the same batches. They are used up, and
            the moments let go, as memory may be short.
        batches: the calibration inputs.
        store: where the activations of waiting batches rest.

    Raises:
        RepairError: a system cannot be solved; names the layer. Nothing is changed then.
        CalibrationError: activations that are not finite.
        OptionError: shortcuts are left out of the settings and are in the targets.
    """
    settings = settings or RepairSettings()
    if not settings.shortcut and any(kept.undo is not None for kept in seen.targets.values()):
        raise OptionError(
            "RepairSettings(shortcut=False) takes targets without shortcuts; collect them with "
            "shortcuts=False"
        )
    return _Pass(small, plan, seen, batches, settings, store, progress).run()


def repair_scale(
    small: nn.Module,
    dense: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    seen: Observations,
) -> Repaired:
    """The paper's repair, in place: one least-squares scalar for each kept input channel.

    The scalars (ICCV 2017, eq. 7) are folded into the consumers' weights. Where a consumer mixes
    the channels of several groups, those of each are solved by themselves.

    Raises:
        RepairError: a system cannot be solved; nothing is changed then.
    """
    tensors, weights = dict(named_tensors(small)), dict(named_tensors(dense))
    kept = {(s.parameter, s.dim): s.indices for s in plan.kept}
    trained = trained_names(dense)
    factors: list[tuple[Tensor, int, Tensor]] = []
    skipped: dict[str, str] = {}
    done: list[str] = []
    for group in groups:
        if group.name not in plan.keep:
            continue
        stays = torch.tensor(plan.keep[group.name])
        for site in group.sites:
            layer = seen.layers.get(site.op)
            found = None
            fixed = layer is not None and layer.weight not in trained
            if layer is not None and (layer.shared or fixed):
                reason = FIXED if fixed else SHARED
                skipped[layer.weight.removesuffix(".weight")] = reason
                continue
            if layer is not None:
                weight = dense_weight(layer.matrix(weights).detach(), layer.geometry)
                found = site_gram(site, group, seen, weight)
            name = site.module or str(site.parameter)
            if layer is None or found is None:
                skipped[name] = "its input was not measured"
                continue
            scale = torch.ones(group.channels + 1, dtype=torch.float64)
            scale[stays] = solve_scale(found.cpu(), stays, name=name)
            for member in group.members:
                if member.role == "consumes" and member.parameter == layer.weight:
                    units = torch.tensor(member.units)
                    stay = torch.tensor(kept[member.parameter, member.dim])
                    factors.append((tensors[layer.weight], member.dim, scale[units][stay]))
            done.append(name)
    with torch.no_grad():
        for weight, dim, factor in factors:
            shape = [1] * weight.ndim
            shape[dim] = -1
            weight.mul_(factor.to(weight).reshape(shape))
    return Repaired(tuple(dict.fromkeys(done)), skipped)


class _Pass:
    """One pass over the cut network."""

    def __init__(
        self,
        small: nn.Module,
        plan: Plan,
        seen: Observations,
        batches: Sequence[ExampleInputs],
        settings: RepairSettings,
        store: Store | None,
        progress: Progress | None,
    ) -> None:
        self.small, self.seen, self.settings = small, seen, settings
        self.batches, self.store, self.progress = batches, store, progress
        self.execution = Execution(small)
        self.program = self.execution.program(batches[0])
        self.layers, self.dense = layers_beside(self.program, seen.layers)
        self.dropouts = dropouts(small, self.program)
        self.needs = dependencies(self.program)
        self.kept = {(s.parameter, s.dim): s.indices for s in plan.kept}
        self.trained, self.routed = trained_names(small), picks_by_data(self.program)
        self.refitted: list[str] = []
        self.skipped: dict[str, str] = {}

    def run(self) -> Repaired:
        touched = self._touched()
        uses: dict[tuple[str, str | None], list[Layer]] = {}
        for layer in self.layers.values():
            uses.setdefault((layer.weight, layer.bias), []).append(layer)
        wanted = [together for together in uses.values() if any(u.op in touched for u in together)]
        if self.settings.layers == "consumers":
            wanted = [t for t in wanted if (t[0].weight, 1 - t[0].outputs_dim) in self.kept]
        order = self._order(wanted)
        place = {index: number for number, index in enumerate(order)}
        self.due: dict[int, list[Layer]] = {}
        for together in wanted:
            reason = self._cannot(together, place)
            if reason is None:
                self.due[min((u.op for u in together), key=place.__getitem__)] = together
            else:
                self.skipped[_name(together)] = reason
        self.seen.moments.clear()
        if self.store is not None:
            leave_room(self.store, self.execution, self.batches, self.layers)
        self.execution.run(
            self.batches, before=self._before, order=order, meet=self.due, store=self.store
        )
        new = self.execution.tensors
        with torch.no_grad():
            for name, tensor in named_tensors(self.small):
                if new[name].data_ptr() != tensor.data_ptr():
                    tensor.copy_(new[name])
        return Repaired(tuple(self.refitted), self.skipped)

    def _touched(self) -> set[int]:
        """Layers whose input, or what is added to them, sees anything of the cut."""
        cut_names = {name for name, _ in self.kept}
        changed = {i for i, name in self.program.names.items() if name in cut_names}
        for op in self.program.ops:
            if any(value.id in changed for value in op.inputs()):
                changed.update(value.id for value in op.outputs())
        return {
            index
            for index, layer in self.layers.items()
            if layer.x.id in changed
            or (layer.shortcut is not None and layer.shortcut.id in changed)
        }

    def _order(self, wanted: Sequence[Sequence[Layer]]) -> list[int]:
        """As recorded, but what a shortcut needs comes before the layer that makes up for it, and
        the inputs of all uses of a weight before the first of them."""
        first: dict[int, list[int]] = {}
        for together in wanted:
            shortcuts = [shortcut_source(self.program, use) for use in together]
            sources = [source for source in shortcuts if source is not None]
            for use in together:
                others = [u for u in together if u is not use]
                first[use.op] = [*sources, *(n for u in others for n in sorted(self.needs[u.op]))]
        return in_order(self.program, self.needs, first)

    def _cannot(self, together: Sequence[Layer], place: Mapping[int, int]) -> str | None:
        """Why the uses of one weight cannot be refitted together."""
        if not self.trained.issuperset(together[0].parameters):
            return FIXED
        if any(self.dense.get(use.op) not in self.seen.targets for use in together):
            return "the dense network has no such layer"
        if any(self.seen.targets[self.dense[u.op]].summed and u.shortcut is None for u in together):
            return "the dense network adds a shortcut to it"
        if any(use.uses != len(together) for use in together):
            return SHARED
        if len({(use.inputs_first, use.geometry.spread) for use in together}) > 1:
            return SHARED  # and in more ways than one
        dense = [self.seen.layers[self.dense[use.op]] for use in together]
        if not self.routed and not all(map(same_rows, together, dense)):
            return ROWS_CUT
        start = min(place[use.op] for use in together)
        if any(place[need] >= start for use in together for need in self.needs[use.op]):
            return IN_TURN
        columns = together[0].columns // together[0].geometry.groups
        if columns > WIDEST and together[0].geometry.groups > 1:
            return f"its {columns} input columns are more than {WIDEST}"
        return None

    def _before(self, op: Op, envs: Sequence[Environment]) -> None:
        together = self.due[op.index]
        self._refit(together, envs)
        self.refitted.append(_name(together))
        for use in together:
            del self.seen.targets[self.dense[use.op]]
        if self.progress is not None:
            self.progress("repairing", op.index + 1, len(self.program.ops))

    def _refit(self, together: Sequence[Layer], envs: Sequence[Environment]) -> None:
        tensors, layer = self.execution.tensors, together[0]
        weight = layer.matrix(tensors)
        norm = layer.norm if layer.bias is None and len(together) == 1 else None
        new, intercept = solve(
            [self._fit(use) for use in together],
            envs,
            weight.flatten(1),
            ridge=self.settings.ridge,
            dropout=max(self.dropouts.get(use.x.storage, 0.0) for use in together),
            intercept=layer.bias is not None or norm is not None,
        )
        tensors[layer.weight] = layer.turned(new.reshape(weight.shape).to(weight)).contiguous()
        for use in together:
            if use.read is not None:  # it was made before this layer's turn came
                for env in envs:
                    env[use.read.id] = use.as_read(layer.matrix(tensors))
        if layer.bias is not None:
            tensors[layer.bias] = intercept.flatten().to(tensors[layer.bias])
        elif norm is not None:
            mean = tensors[norm.mean]
            tensors[norm.mean] = mean - intercept.flatten().to(mean)

    def _fit(self, use: Layer) -> Fit:
        targets = self.seen.targets[self.dense[use.op]]
        return Fit(use, targets, self.kept.get((use.weight, use.outputs_dim)))


def _name(together: Sequence[Layer]) -> str:
    return together[0].weight.removesuffix(".weight")
