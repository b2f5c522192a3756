"""Which layers share which channels, as data for a drawing: layers in running order, and rails.

A rail stands for a group: it joins the layers that make its channels, those that mix them, and
those that only follow (norms, depthwise scales, buffers).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from thinet.report.data import Group
from thinet.report.rows import found_groups
from thinet.surgery.apply import named_tensors
from thinet.trace.groups import Analysis, layer_name
from thinet.types import ChannelGroup, Counts

STAGE: Final = 40
"""Rows above which a stage is taken apart, if the names of its modules go deeper."""


@dataclass(frozen=True)
class Layer:
    """A module (or raw parameter) with weights, or one that mixes channels without any."""

    name: str
    kind: str
    size: str
    macs: int
    params: int
    runs: bool = True


@dataclass(frozen=True)
class Rail:
    """A group, its number, and the places of its layers in the list of all layers."""

    number: int
    group: Group
    makes: tuple[int, ...]
    mixes: tuple[int, ...]
    follows: tuple[int, ...]

    @property
    def colour(self) -> int:
        """One of six; those of neighbours, and of every second, differ."""
        return (self.number + self.number // 6) % 6

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(sorted({*self.makes, *self.mixes, *self.follows}))


@dataclass(frozen=True)
class Coupling:
    """All layers in running order, the rails, and the stages: (name, first layer, one past)."""

    layers: tuple[Layer, ...]
    rails: tuple[Rail, ...]
    stages: tuple[tuple[str, int, int], ...]
    choices: tuple[tuple[str, str], ...] = ()


def coupling(model: nn.Module, analysis: Analysis, counts: Counts) -> Coupling:
    """The layers and rails of an analysed model."""
    tensors = dict(named_tensors(model))
    owned: dict[str, list[str]] = {}
    for name in tensors:
        owned.setdefault(layer_name(name), []).append(name)
    names: dict[str, None] = dict.fromkeys(owned)
    for group in analysis.groups:
        names.update(dict.fromkeys((*group.producers, *group.consumers)))
    names.update(dict.fromkeys(path for path, count in counts.by_module.items() if count.macs))
    order = _first_runs(analysis)
    never = max(order.values(), default=0) + 1
    ordered = sorted(names, key=lambda name: order.get(name, never))
    layers = tuple(
        Layer(
            name=name,
            kind=_kind(model, name),
            size=_size(model, name, [tensors[t] for t in owned.get(name, ())]),
            macs=counts.by_module[name].macs if name in counts.by_module else 0,
            params=sum(
                tensors[t].numel()
                for t in owned.get(name, ())
                if isinstance(tensors[t], nn.Parameter)
            ),
            runs=name in order,
        )
        for name in ordered
    )
    place = {name: i for i, name in enumerate(ordered)}
    rows = found_groups(model, analysis.groups, counts)
    rails = tuple(
        _rail(number, rows[number], group, place) for number, group in enumerate(analysis.groups)
    )
    made = tuple(sorted(analysis.labeller.made.items()))
    return Coupling(layers, rails, stages([layer.name for layer in layers]), made)


def folded(whole: Coupling) -> Coupling:
    """Each stage as one layer, and the rails that go from one to another."""
    stage_of = {i: n for n, (_, first, end) in enumerate(whole.stages) for i in range(first, end)}
    layers: list[Layer] = []
    for name, first, end in whole.stages:
        inside = whole.layers[first:end]
        macs, params = sum(x.macs for x in inside), sum(x.params for x in inside)
        many = inside[0].kind if end == first + 1 else f"{len(inside)} layers"
        layers.append(Layer(name, many, "", macs, params))
    rails: list[Rail] = []
    for rail in whole.rails:
        places = [{stage_of[i] for i in at} for at in (rail.makes, rail.mixes, rail.follows)]
        makes, mixes = places[0], places[1] - places[0]
        if len(set().union(*places)) > 1:
            rest = places[2] - makes - mixes
            ends = (tuple(sorted(at)) for at in (makes, mixes, rest))
            rails.append(Rail(rail.number, rail.group, *ends))
    return Coupling(tuple(layers), tuple(rails), (("all stages", 0, len(layers)),))


def _rail(number: int, row: Group, group: ChannelGroup, place: Mapping[str, int]) -> Rail:
    touched = {layer_name(member.parameter) for member in group.members}
    follows = touched - {*group.producers, *group.consumers}
    makes, mixes, rest = (
        tuple(sorted(place[name] for name in names))
        for names in (group.producers, group.consumers, follows)
    )
    return Rail(number, row, makes, mixes, rest)


def _first_runs(analysis: Analysis) -> dict[str, int]:
    """For each layer, the number of the first operation that is its own or reads its tensors."""
    found: dict[str, int] = {}
    walks = [analysis.labeller, *([analysis.training] if analysis.training else [])]
    first = 0
    for walk in walks:
        for op in walk.program.ops:
            found.setdefault(op.module, first + op.index)
            for value in op.inputs():
                name = walk.program.names.get(value.id)
                if name is not None:
                    found.setdefault(layer_name(name), first + op.index)
        first += len(walk.program.ops)
    return found


def stages(names: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """Runs of layers under one module: (its path, first, one past the last).

    Runs of more than `STAGE` layers are taken apart; single layers beside each other are one run.
    """
    found: list[tuple[str, int, int]] = []
    for name, first, end in _runs(names, 0, len(names), 1):
        alone = end - first == 1
        if alone and found and found[-1][0] == "":
            found[-1] = "", found[-1][1], end
        else:
            found.append(("" if alone else name, first, end))
    return tuple((name or _between(names, first, end), first, end) for name, first, end in found)


def _between(names: Sequence[str], first: int, end: int) -> str:
    return names[first] if end - first == 1 else f"{names[first]} to {names[end - 1]}"


def _runs(names: Sequence[str], first: int, end: int, depth: int) -> Iterable[tuple[str, int, int]]:
    def prefix(place: int) -> str:
        return ".".join(names[place].split(".")[:depth])

    for name, places in groupby(range(first, end), key=prefix):
        run = list(places)
        deeper = any(names[place].count(".") > depth for place in run)
        if len(run) > STAGE and deeper:
            yield from _runs(names, run[0], run[-1] + 1, depth + 1)
        else:
            yield name, run[0], run[-1] + 1


def _kind(model: nn.Module, name: str) -> str:
    try:
        return type(model.get_submodule(name)).__name__
    except AttributeError:
        return "parameter"


def _size(model: nn.Module, name: str, tensors: Sequence[Tensor]) -> str:
    """Channels in and out and the kernel, or the shape of what the layer holds."""
    largest = max(tensors, key=lambda t: (t.ndim, t.numel()), default=None)
    if largest is None:
        return ""
    shape = tuple(largest.shape)
    module = None if _kind(model, name) == "parameter" else model.get_submodule(name)
    if isinstance(module, _ConvNd):
        per_group, out = shape[1], shape[0]
        ins = per_group * module.groups
        if isinstance(module, _ConvTransposeNd):
            ins, out = shape[0], per_group * module.groups
        kernel = "x".join(map(str, shape[2:]))
        return f"{ins} → {out}, {kernel}" + (f", {module.groups} groups" * (module.groups > 1))
    if isinstance(module, nn.Linear):
        return f"{shape[1]} → {shape[0]}"
    return " x ".join(map(str, shape))
