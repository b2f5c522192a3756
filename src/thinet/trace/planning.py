"""From units to keep to a plan: which entries of which parameters stay, and which attributes follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from thinet.plan import Plan
from thinet.surgery.apply import named_tensors
from thinet.surgery.attributes import attribute_changes
from thinet.trace.groups import Analysis
from thinet.trace.labels import Vector
from thinet.types import Slice


def removed_classes(analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> Vector:
    """A mask over labels: true where the class goes."""
    gone = np.zeros(analysis.labeller.classes.count, dtype=bool)
    for name, units in keep.items():
        roots = analysis.roots[name]
        stays = np.zeros(len(roots), dtype=bool)
        stays[list(units)] = True
        gone[roots[~stays]] = True
    return gone


def make_plan(analysis: Analysis, model: nn.Module, keep: Mapping[str, Sequence[int]]) -> Plan:
    """The plan that keeps these units (sorted indices) and removes the rest of each named group."""
    gone = removed_classes(analysis, keep)
    classes = analysis.labeller.classes
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(model)}
    kept: list[Slice] = []
    for slot in analysis.slots:
        stays = ~gone[classes.find(slot.labels)]
        if not stays.all():
            indices = tuple(np.flatnonzero(stays).tolist())
            kept.append(Slice(slot.parameter, slot.dim, indices))
            shapes[slot.parameter][slot.dim] = len(indices)
    cut = {piece.parameter for piece in kept}
    whole = frozenset(
        key.rpartition(":")[0]
        for key, choice in analysis.labeller.made.items()
        if choice == "whole" and key.endswith(":groups")
    )
    new_shapes = {name: tuple(shapes[name]) for name in cut}
    return Plan(
        keep={name: tuple(int(u) for u in units) for name, units in keep.items()},
        kept=tuple(kept),
        attributes=attribute_changes(model, new_shapes, whole),
    )
