"""Cut a copy without weights, trace it again, and compare with what the labels say.

Every operation of the cut copy must have the results whose labels are those of the original less
the removed ones, and the same scalar arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from thinet.surgery.apply import apply_plan
from thinet.trace.groups import Analysis
from thinet.trace.labels import Axis, Classes, Labeller, Vector
from thinet.trace.planning import make_plan, removed_classes
from thinet.trace.record import (
    Op,
    Program,
    StoppedError,
    Value,
    leaves_of,
    record_replica,
)
from thinet.trace.replica import Call, meta_twin
from thinet.trace.rules import RULES
from thinet.trace.rules.pointwise import NEW

SIZES = frozenset(
    f"aten.{name}"
    for name in (
        *NEW,
        *"view _unsafe_view reshape _reshape_alias expand repeat as_strided as_strided_".split(),
        *"split split_with_sizes chunk unsafe_split unsafe_split_with_sizes".split(),
        *"native_layer_norm native_group_norm arange convolution".split(),
    )
)
"""Operations whose integers are sizes, which follow a cut; those of all others must stay."""


@dataclass(frozen=True)
class Mismatch:
    """The first operation that does not follow a cut: why, its module, and the labels it meets.

    `index` is its number in the evaluation forward, or in the training forward after that.
    """

    reason: str
    module: str
    roots: frozenset[int]
    index: int

    @property
    def kind(self) -> str:
        """The reason without its numbers and places."""
        return "".join(c for c in self.reason.partition(" in ")[0] if not c.isdigit())


class _Known(Classes):
    """The classes of the original; what they say is checked and not changed.

    Labels made during the check fit whatever they meet first.
    """

    def __init__(self, original: Classes) -> None:
        super().__init__()
        self._parent = original._parent.copy()
        self.count = self.known = original.count
        self.clashes: list[Vector] = []

    def unify(self, a: Vector, b: Vector) -> None:
        left, right = self.find(a), self.find(b)
        new = (left >= self.known) | (right >= self.known)
        clash = (left != right) & ~new
        if clash.any():
            self.clashes.append(np.concatenate([left[clash], right[clash]]))
        super().unify(a[new], b[new])

    def lock(self, labels: Vector, reason: str) -> None:
        pass

    def normalise(self, labels: Vector, reason: str) -> None:
        pass


def probe(
    analysis: Analysis, pristine: nn.Module, inputs: Call, keep: Mapping[str, Sequence[int]]
) -> Mismatch | None:
    """Cut a copy of the meta model to `keep`, trace it and compare; None where all agrees."""
    plan = make_plan(analysis, pristine, keep)
    gone = removed_classes(analysis, keep)
    for walk in (analysis.labeller, analysis.training):
        if walk is None:
            continue
        replica = meta_twin(pristine)
        apply_plan(replica, plan)
        stopped: StoppedError | None = None
        args = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
        try:
            program = record_replica(replica, args, training=walk is analysis.training)
        except StoppedError as error:
            program, stopped = error.program, error
        mismatch = _compare(walk, program, stopped, gone)
        if mismatch is not None:
            before = len(analysis.program.ops) if walk is analysis.training else 0
            return replace(mismatch, index=before + mismatch.index)
    return None


def _compare(
    original: Labeller, program: Program, stopped: StoppedError | None, gone: Vector
) -> Mismatch | None:
    classes = _Known(original.classes)
    seeds: dict[str, tuple[Axis, ...]] = {}
    for value_id, name in original.program.names.items():
        axes = []
        for axis in original.axes[value_id]:
            assert isinstance(axis, np.ndarray)
            axes.append(axis[~gone[classes.find(axis)]])
        seeds[name] = tuple(axes)
    walk = Labeller(
        program,
        classes,
        RULES,
        choices=original.made,
        seeds=seeds,
        blocks=dict(original.blocks),
        decided=dict(original.decided),
    )
    walk.begin()
    walk.stored = original.stored
    walk.unread = original.unread
    ours, theirs = original.program.ops, program.ops
    i = j = 0
    while i < len(ours) and j < len(theirs):
        old, new = ours[i], theirs[j]
        if not _alike(old, new):
            if COPY in (old.name, new.name):
                # An axis of size one lets a reshape do without a copy, or need one.
                if new.name == COPY:
                    walk.step(replace(new, index=-1))
                    j += 1
                else:
                    i += 1
                continue
            return Mismatch(
                f"the forward code takes another way once channels are gone ({old.where} became "
                f"{new.where})",
                old.module,
                _roots(original, old),
                old.index,
            )
        reason = _step(walk, classes, original, old, replace(new, index=old.index), gone)
        if reason is not None:
            met = _roots(original, old)
            clash = frozenset(np.concatenate(classes.clashes).tolist()) if classes.clashes else None
            return Mismatch(f"{reason} ({old.where})", old.module, clash or met, old.index)
        i, j = i + 1, j + 1
    at = ours[min(i, len(ours) - 1)]
    if stopped is not None:
        what = f"stops once channels are gone: {_first_line(stopped)}"
    elif i < len(ours) or j < len(theirs):
        what = "runs another number of operations once channels are gone"
    else:
        return None
    reason = f"the forward code {what} ({at.where})"
    return Mismatch(reason, at.module, _roots(original, at), at.index)


COPY = "aten.clone"
VIEWS = frozenset(("aten.view", "aten._unsafe_view", "aten._reshape_alias"))


def _alike(old: Op, new: Op) -> bool:
    same = old.func is new.func or (old.name in VIEWS and new.name in VIEWS)
    return same and old.module == new.module


def _step(
    walk: Labeller, classes: _Known, original: Labeller, old: Op, new: Op, gone: Vector
) -> str | None:
    if _numbers(old, original) != _numbers(new, walk):
        return "the forward code computes a number from the size"
    try:
        walk.step(new)
    except (ValueError, AssertionError, IndexError) as error:
        return f"the shapes no longer fit: {error}"
    if classes.clashes:
        return "the forward code takes channels by number"
    for before, after in zip(old.outputs(), new.outputs(), strict=True):
        for dim, expected in enumerate(original.of(before)):
            found = walk.of(after)[dim]
            reason = _axis(classes, walk.stored, expected, found, before, after, dim, gone)
            if reason is not None:
                return reason
    return None


def _axis(
    classes: _Known,
    stored: int,
    expected: Axis,
    found: Axis,
    before: Value,
    after: Value,
    dim: int,
    gone: Vector,
) -> str | None:
    if not isinstance(expected, np.ndarray):
        if found is expected and before.shape[dim] != after.shape[dim] and repr(found) == "FIXED":
            return f"a size of {before.shape[dim]} became {after.shape[dim]}"
        return None
    stays = expected[~gone[classes.find(expected)]]
    if len(stays) != after.shape[dim]:
        return f"a size of {before.shape[dim]} became {after.shape[dim]} and not {len(stays)}"
    if isinstance(found, np.ndarray):
        # Labels themselves and not only their classes: the order within a class matters too.
        # Labels of tensors made on the way are new each time; those of parameters are not.
        wrong = (found != stays) & ((found < stored) | (stays < stored))
        if wrong.any():
            met = classes.find(np.concatenate([found[wrong], stays[wrong]]))
            classes.clashes.append(met[met < classes.known])
            return "the forward code takes channels by number"
    return None


def _numbers(op: Op, labeller: Labeller) -> list[float]:
    """The numbers among an operation's arguments that a cut must not change."""
    leaves = leaves_of((op.args, op.kwargs))
    numbers: list[float] = [
        x for x in leaves if isinstance(x, (int, float)) and not isinstance(x, bool)
    ]
    follows = op.name in SIZES
    if op.name == "aten.slice":
        axes = list(labeller.of(op.args[0]))
        follows = isinstance(axes[op.args[1] if len(op.args) > 1 else 0], np.ndarray)
    return [x for x in numbers if isinstance(x, float)] if follows else numbers


def _roots(labeller: Labeller, op: Op) -> frozenset[int]:
    met: set[int] = set()
    for value in [*op.inputs(), *op.outputs()]:
        for axis in labeller.axes.get(value.id, ()):
            if isinstance(axis, np.ndarray):
                met.update(labeller.classes.find(axis).tolist())
    return frozenset(met)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
