"""From observations to what a criterion is given about one group."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from thinet.calibrate.collect import Observations
from thinet.calibrate.curvature import weighed
from thinet.calibrate.gram import fold_units, gram
from thinet.calibrate.layers import output_gains
from thinet.calibrate.moments import Moments
from thinet.calibrate.patches import dense_weight
from thinet.calibrate.shrink import shrunk
from thinet.criteria.base import Consumer, GroupStatistics
from thinet.lstsq import CONSTANT
from thinet.surgery.apply import named_tensors
from thinet.types import ChannelGroup, Site

NATS = 2.0
"""What errors in the measure of the loss are divided by; to second order they are twice nats."""


def group_statistics(
    model: nn.Module, group: ChannelGroup, seen: Observations, *, seed: int = 0
) -> GroupStatistics:
    """All that was observed about a group; what was not is missing.

    Where the curvature of the loss was observed, errors are in nats, not fractions of an energy.
    """
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model)}
    consumers: list[Consumer] = []
    total: Tensor | None = None
    zeros: list[Tensor] = []
    for site in group.sites:
        layer = seen.layers.get(site.op)
        if layer is None:
            continue
        units = torch.tensor(site.units)
        # A copy: criteria are anyone's, and may work in place.
        weight = dense_weight(layer.matrix(tensors), layer.geometry).clone()
        root = seen.roots.get(site.op)
        weight = weighed(weight, root)
        if site.op in seen.moments:
            covariance = _varying(seen.moments[site.op])
            centred = gram(covariance, weight)
            energy = float(centred.sum()) if root is None else NATS
            gains, signal = None, energy
            if site.op in seen.signals and root is None:
                gains = output_gains(layer, tensors)
                signal = float(seen.signals[site.op].y_variance().sum())
            foretold = shrunk(covariance, seen.moments[site.op].rows)
            consumers.append(Consumer(weight, units, foretold, signal, gains))
            part = _about_zero(centred, weight, seen.moments[site.op].mean)
            part = fold_units(part, units, group.channels)
        elif site.op in seen.outputs:
            energy = float(seen.outputs[site.op].y_variance().sum()) if root is None else NATS
            parts = seen.parts.get(site.op)
            varies = None if parts is None else parts.centred(group.name)
            consumers.append(Consumer(weight, units, None, energy, parts=varies))
            part = site_gram(site, group, seen, weight)
        else:
            energy, part = 0.0, None
            consumers.append(Consumer(weight, units))
        if part is not None:  # as in the paper: in units of the consumer's own output
            part = part / energy if energy > 0 else torch.zeros_like(part)
            total = part if total is None else total + part
        if site.op in seen.zeros:
            zeros.append(_unit_means(seen.zeros[site.op], units, group.channels))
    return GroupStatistics(
        name=group.name,
        channels=group.channels,
        gram=total,
        consumers=tuple(consumers),
        filters=_filters(group, tensors),
        zeros=torch.stack(zeros).mean(0) if zeros else None,
        bn_scale=_bn_scale(model, group, tensors),
        seed=seed,
    )


def site_gram(site: Site, group: ChannelGroup, seen: Observations, weight: Tensor) -> Tensor | None:
    """ThiNet's gram of one consumer over the units of a group, None where it was not measured.

    Args:
        weight: the consumer's, dense over groups.
    """
    if site.op in seen.moments:
        moments, units = seen.moments[site.op], torch.tensor(site.units)
        found = _about_zero(gram(moments.covariance(), weight), weight, moments.mean)
        return fold_units(found, units, group.channels)
    if site.op in seen.parts:
        return seen.parts[site.op].gram(group.name)
    return seen.grams.get((site.op, group.name))


def _varying(moments: Moments) -> Tensor:
    """The (d, d) covariance, exactly 0 for what is constant but for rounding."""
    covariance = moments.covariance()
    variance = covariance.diagonal()
    constant = variance <= CONSTANT * (variance.abs() + moments.mean.square())
    if bool(constant.any()):
        covariance.masked_fill_(constant, 0).masked_fill_(constant[:, None], 0)
    return covariance


def _about_zero(centred: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
    """The (C, C) gram of a layer's inputs from that of their deviations from the mean."""
    parts = (weight.detach().double().flatten(1) * mean).view(*weight.shape[:2], -1).sum(2)
    return centred + parts.T @ parts


def _unit_means(values: Tensor, units: Tensor, count: int) -> Tensor:
    member = units >= 0
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, units[member], values[member])
    return sums / torch.bincount(units[member], minlength=count).clamp_min(1)


def _by_unit(tensor: Tensor, dim: int, units: tuple[int, ...]) -> Tensor | None:
    """(units, entries) where every unit has equally many entries along the dimension."""
    owner = torch.tensor(units, device=tensor.device)
    member = torch.nonzero(owner >= 0).squeeze(1)
    place = member[owner[member].argsort(stable=True)]
    rows = tensor.movedim(dim, 0)[place].flatten(1) if tensor.ndim > 1 else tensor[place][:, None]
    sizes = torch.bincount(owner[member])
    return rows.reshape(len(sizes), -1) if len(sizes.unique()) == 1 else None


def _filters(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Of its producers; where no weight only produces (a tied decoder), of those that consume."""
    made = [m for m in group.members if m.role == "produces"]
    made = made or [m for m in group.members if m.role == "consumes"]
    found = (_by_unit(tensors[m.parameter], m.dim, m.units) for m in made)
    return tuple(f for f in found if f is not None)


def _bn_scale(
    model: nn.Module, group: ChannelGroup, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    """The largest scale of any BatchNorm on the group's channels: what keeps a unit alive."""
    scales: list[Tensor] = []
    for member in group.members:
        path, _, leaf = member.parameter.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(path), _NormBase):
            rows = _by_unit(tensors[member.parameter].abs(), member.dim, member.units)
            if rows is not None and len(rows) == group.channels:
                scales.append(rows.amax(1))
    return torch.stack(scales).amax(0) if scales else None
