"""From units to keep to a plan: which entries stay, and which attributes follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from thinet.errors import NothingLeftError
from thinet.paths import named_modules
from thinet.plan import AttributeChange, Plan, Replacement
from thinet.surgery.apply import named_tensors
from thinet.surgery.attributes import attribute_changes
from thinet.surgery.explicit import explicit_class
from thinet.surgery.replace import EXPLICIT
from thinet.trace.groups import Analysis, Slot
from thinet.trace.labels import Mask
from thinet.types import Slice


def removed_classes(analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> Mask:
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
    shapes = shapes_left(analysis, dict(named_tensors(model)), gone)
    attributes = with_learned(told_attributes(analysis, model, shapes), analysis, model, gone)
    return Plan(
        keep={name: tuple(int(u) for u in units) for name, units in keep.items()},
        kept=kept_slices(analysis, gone),
        attributes=attributes,
        replaced=explicit_modules(model, [*shapes, *(f"{c.module}." for c in attributes)]),
    )


def kept_slices(analysis: Analysis, gone: Mask) -> tuple[Slice, ...]:
    """The indices that stay of every dimension of a parameter or buffer that loses some."""
    going, lost = _losing(analysis, gone)
    return tuple(
        Slice(
            slot.parameter,
            slot.dim,
            tuple(np.flatnonzero(~going[slot.start : slot.start + slot.size]).tolist()),
        )
        for slot, _ in lost
    )


def shapes_left(
    analysis: Analysis, tensors: Mapping[str, Tensor], gone: Mask
) -> dict[str, tuple[int, ...]]:
    """The new shape of every parameter and buffer that loses some."""
    shapes: dict[str, list[int]] = {}
    for slot, left in _losing(analysis, gone)[1]:
        shapes.setdefault(slot.parameter, list(tensors[slot.parameter].shape))[slot.dim] = left
    return {name: tuple(shape) for name, shape in shapes.items()}


def _losing(analysis: Analysis, gone: Mask) -> tuple[Mask, list[tuple[Slot, int]]]:
    """Which stored labels go, and the slots that lose some, with how many stay."""
    stored = np.arange(analysis.labeller.stored, dtype=np.int64)
    going = gone[analysis.labeller.classes.find(stored)]
    before = np.concatenate([[0], np.cumsum(going)]).tolist()
    counted = (
        (slot, before[slot.start + slot.size] - before[slot.start]) for slot in analysis.slots
    )
    return going, [(slot, slot.size - count) for slot, count in counted if count]


def told_attributes(
    analysis: Analysis, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[AttributeChange, ...]:
    """The attributes that the new shapes tell."""
    whole = frozenset(
        key.rpartition(":")[0]
        for key, choice in analysis.labeller.made.items()
        if choice == "whole" and key.endswith(":groups")
    )
    return attribute_changes(model, shapes, whole)


def with_learned(
    told: tuple[AttributeChange, ...], analysis: Analysis, model: nn.Module, gone: Mask
) -> tuple[AttributeChange, ...]:
    """The attributes that shapes tell, then the others that were seen to count channels."""
    known = {(change.module, change.attribute) for change in told}
    learned = followed_changes(analysis, model, gone)
    return (*told, *(AttributeChange(*change) for change in learned if change[:2] not in known))


def left_empty(analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> list[Emptied]:
    """What would be left with no channel: slices, pieces of splits, attributes that count some."""
    gone, classes = removed_classes(analysis, keep), analysis.labeller.classes
    counted = [(f"{f.module or 'the model'}.{f.attribute}", f.labels) for f in analysis.followed]
    taken = [(f"{op.where} takes", labels) for op, labels in analysis.labeller.pieces]
    found: list[Emptied] = []
    for what, labels in (*((f"{name} counts", labels) for name, labels in counted), *taken):
        roots = classes.find(labels)
        if len(roots) and gone[roots].all():
            units = {
                group.name: np.flatnonzero(np.isin(analysis.roots[group.name], roots)).tolist()
                for group in analysis.groups
            }
            found.append(Emptied(what, {name: some for name, some in units.items() if some}))
    return found


@dataclass(frozen=True)
class Emptied:
    """What a cut would leave nothing of, and the units of each group that it is made of."""

    what: str
    units: Mapping[str, Sequence[int]]


def check_left(analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> None:
    """See that forward code has a channel left of whatever it takes some of.

    Raises:
        NothingLeftError: it has not; `x[:, -0:]`, for one, is all of x, and few operations run on
            no channel.
    """
    for emptied in left_empty(analysis, keep):
        units = ", ".join(f"{name} {list(some)}" for name, some in emptied.units.items())
        raise NothingLeftError(
            f"nothing would be left of the channels that {emptied.what}; keep one of these units "
            f"at least: {units}"
        )


def followed_changes(
    analysis: Analysis, model: nn.Module, gone: Mask
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
        for path, module in named_modules(model).items()
        if explicit_class(module) is not None
        and any(name.startswith(f"{path}." if path else "") for name in touched)
    )
