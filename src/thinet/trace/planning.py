"""From units to keep to a plan: which entries stay, and which attributes follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from thinet.plan import AttributeChange, Plan, Replacement
from thinet.surgery.apply import named_tensors
from thinet.surgery.attributes import attribute_changes
from thinet.surgery.explicit import explicit_class
from thinet.surgery.replace import EXPLICIT
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
    tensors = dict(named_tensors(model))
    shapes: dict[str, list[int]] = {}
    kept: list[Slice] = []
    going = gone[classes.find(np.arange(analysis.labeller.stored, dtype=np.int64))]
    before = np.concatenate([[0], np.cumsum(going)])
    for slot in analysis.slots:
        end = slot.start + slot.size
        if before[end] > before[slot.start]:
            indices = tuple(np.flatnonzero(~going[slot.start : end]).tolist())
            kept.append(Slice(slot.parameter, slot.dim, indices))
            shape = shapes.setdefault(slot.parameter, list(tensors[slot.parameter].shape))
            shape[slot.dim] = len(indices)
    whole = frozenset(
        key.rpartition(":")[0]
        for key, choice in analysis.labeller.made.items()
        if choice == "whole" and key.endswith(":groups")
    )
    new_shapes = {name: tuple(shape) for name, shape in shapes.items()}
    table = attribute_changes(model, new_shapes, whole)
    known = {(change.module, change.attribute) for change in table}
    changes = [c for c in followed_changes(analysis, model, gone) if c[:2] not in known]
    attributes = (*table, *(AttributeChange(*change) for change in changes))
    return Plan(
        keep={name: tuple(int(u) for u in units) for name, units in keep.items()},
        kept=tuple(kept),
        attributes=attributes,
        replaced=explicit_modules(model, [*shapes, *(f"{c.module}." for c in attributes)]),
    )


def followed_changes(
    analysis: Analysis, model: nn.Module, gone: Vector
) -> list[tuple[str, str, int | tuple[int, ...]]]:
    """(module, attribute, new value) of the attributes that count channels of which some go."""
    changed: dict[tuple[str, str], int | tuple[int, ...]] = {}
    for followed in analysis.followed:
        stays = int((~gone[analysis.labeller.classes.find(followed.labels)]).sum())
        if stays == len(followed.labels):
            continue
        key = followed.module, followed.attribute
        if followed.place is None:
            changed[key] = stays
        else:
            old = changed.get(key, getattr(model.get_submodule(followed.module), key[1]))
            assert isinstance(old, (list, tuple))
            changed[key] = tuple(
                stays if place == followed.place else value for place, value in enumerate(old)
            )
    return [(module, attribute, value) for (module, attribute), value in changed.items()]


def explicit_modules(model: nn.Module, touched: Sequence[str]) -> tuple[Replacement, ...]:
    """Modules that derive their sizes and have a name in them that is cut."""
    return tuple(
        Replacement(path, EXPLICIT)
        for path, module in model.named_modules()
        if explicit_class(module) is not None
        and any(name.startswith(f"{path}." if path else "") for name in touched)
    )
