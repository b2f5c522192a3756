"""Cut a copy without weights, trace it again, and compare with what the labels say.

Every operation of the cut copy must have the results whose labels are those of the original less
the removed ones, and the same scalar arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from thinet.plan import AttributeChange
from thinet.surgery.apply import apply_plan, set_attributes
from thinet.trace.decisions import Decisions
from thinet.trace.groups import Analysis
from thinet.trace.labels import FIXED, Axis, Classes, Labeller, Vector
from thinet.trace.planning import followed_changes, make_plan, removed_classes
from thinet.trace.record import (
    EnoughError,
    Op,
    Program,
    StoppedError,
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
        *"native_layer_norm native_group_norm arange convolution affine_grid_generator".split(),
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


@dataclass(frozen=True, eq=False)
class Trial:
    """A copy without data, cut to `keep`, to be traced: which labels are gone from it.

    `told` are the attributes that the new shapes tell; those that are only learned are still old.
    """

    keep: Mapping[str, Sequence[int]]
    model: nn.Module
    gone: Vector
    told: frozenset[tuple[str, str]]


def trial(analysis: Analysis, pristine: nn.Module, keep: Mapping[str, Sequence[int]]) -> Trial:
    """Cut a copy of the meta model to `keep`; attributes that the analysis has learned stay."""
    plan = make_plan(replace(analysis, followed=()), pristine, keep)
    model = meta_twin(pristine)
    apply_plan(model, plan)
    told = frozenset((change.module, change.attribute) for change in plan.attributes)
    return Trial(keep, model, removed_classes(analysis, keep), told)


def probe(
    analysis: Analysis, cut: Trial, inputs: Call, *, until: int | None = None
) -> Mismatch | None:
    """Trace a cut copy with the attributes learned so far; None where all agrees with the labels.

    The trace stops at the first operation that does not follow, or after number `until`.
    """
    learned = [
        AttributeChange(*change)
        for change in followed_changes(analysis, cut.model, cut.gone)
        if change[:2] not in cut.told
    ]
    before = 0
    for walk in (analysis.labeller, analysis.training):
        if walk is None or (until is not None and until < before):
            continue
        replica = meta_twin(cut.model)
        set_attributes(replica, learned)
        args = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
        comparison = _Comparison(walk, cut.gone, None if until is None else until - before)
        told = walk.program
        try:
            with nullcontext() if told.on_meta else Decisions(told.decisions):
                record_replica(replica, args, training=walk is analysis.training, watch=comparison)
            mismatch = comparison.finish(None)
        except StoppedError as error:
            mismatch = comparison.finish(error)
        if mismatch is not None:
            return replace(mismatch, index=before + mismatch.index)
        before = len(analysis.program.ops)
    return None


class _Comparison:
    """Walks a cut model's operations beside the original's while they are recorded."""

    def __init__(self, original: Labeller, gone: Vector, until: int | None) -> None:
        self.original = original
        self.gone = gone
        self.until = until
        self.classes = _Known(original.classes)
        self.ours = original.program.ops
        self.place = 0
        self.enough = False
        self.broken: Exception | None = None
        self.mismatch: Mismatch | None = None
        self.left: dict[int, tuple[Vector, Vector]] = {}

    def stays(self, axis: Vector) -> Vector:
        """The labels of an axis of the original that are not gone; the same array each time."""
        known = self.left.get(id(axis))
        if known is None:
            known = axis, axis[~self.gone[self.classes.find(axis)]]
            self.left[id(axis)] = known  # with the axis itself, so that its id stays its own
        return known[1]

    def begin(self, program: Program) -> None:
        original = self.original
        seeds = {
            name: tuple(
                self.stays(axis) if isinstance(axis, np.ndarray) else axis
                for axis in original.axes[value_id]
            )
            for value_id, name in original.program.names.items()
        }
        self.walk = Labeller(program, self.classes, RULES, seeds=seeds, original=original)
        self.walk.begin()

    def step(self, op: Op) -> None:
        """Compare the next operation.

        Raises:
            EnoughError: it does not follow, or all that was asked for does.
        """
        try:
            self._step(op)
        except Exception as error:  # the model's own code shall not catch it
            self.enough, self.broken = True, error
            raise EnoughError from error

    def _step(self, new: Op) -> None:
        while not self.enough and self.place < len(self.ours):
            old = self.ours[self.place]
            if self.until is not None and old.index > self.until:
                break
            if _alike(old, new):
                self.place += 1
                same = new if new.index == old.index else replace(new, index=old.index)
                self._compare(old, same)
                return
            # An axis of size one lets a reshape do without a copy, or need one.
            if new.name == COPY:
                self.walk.step(replace(new, index=-1))
                return
            if old.name != COPY:
                self._stop(
                    f"the forward code takes another way once channels are gone ({old.where} "
                    f"became {new.where})",
                    old,
                )
            self.place += 1
        if not self.enough and self.place == len(self.ours):
            self._ended("runs another number of operations once channels are gone")
        self.enough = True
        raise EnoughError

    def finish(self, stopped: StoppedError | None) -> Mismatch | None:
        """What was found in all."""
        if self.broken is not None:
            raise self.broken
        if not self.enough:
            if stopped is not None:
                self._ended(f"stops once channels are gone: {_first_line(stopped)}")
            elif self.place < len(self.ours):
                self._ended("runs another number of operations once channels are gone")
        return self.mismatch

    def _ended(self, what: str) -> None:
        self._stop(f"the forward code {what}", self.ours[min(self.place, len(self.ours) - 1)])

    def _stop(self, reason: str, at: Op, roots: frozenset[int] | None = None) -> None:
        self.enough = True
        roots = roots or _roots(self.original, at)
        self.mismatch = Mismatch(f"{reason} ({at.where})", at.module, roots, at.index)

    def _compare(self, old: Op, new: Op) -> None:
        reason = self._reason(old, new)
        if reason is not None:
            clashes = self.classes.clashes
            self._stop(
                reason, old, frozenset(np.concatenate(clashes).tolist()) if clashes else None
            )
            raise EnoughError

    def _reason(self, old: Op, new: Op) -> str | None:
        """Why an operation does not follow."""
        if not self._same_numbers(old, new):
            return "the forward code computes a number from the size"
        try:
            self.walk.step(new)
        except (ValueError, AssertionError, IndexError) as error:
            return f"the shapes no longer fit: {error}"
        if self.classes.clashes:
            return "the forward code takes channels by number"
        for before, after in zip(old.outputs(), new.outputs(), strict=True):
            found = self.walk.of(after)
            for dim, expected in enumerate(self.original.of(before)):
                reason = self._axis(expected, found[dim], before.shape[dim], after.shape[dim])
                if reason is not None:
                    return reason
        return None

    def _axis(self, expected: Axis, found: Axis, before: int, after: int) -> str | None:
        if not isinstance(expected, np.ndarray):
            if found is expected and found is FIXED and before != after:
                return f"a size of {before} became {after}"
            return None
        stays = self.stays(expected)
        if len(stays) != after:
            return f"a size of {before} became {after} and not {len(stays)}"
        if found is stays or not isinstance(found, np.ndarray):
            return None
        # Labels themselves and not only their classes: the order within a class matters too.
        # Labels of tensors made on the way are new each time; those of parameters are not.
        stored = self.original.stored
        wrong = (found != stays) & ((found < stored) | (stays < stored))
        if not wrong.any():
            return None
        met = self.classes.find(np.concatenate([found[wrong], stays[wrong]]))
        self.classes.clashes.append(met[met < self.classes.known])
        return "the forward code takes channels by number"

    def _same_numbers(self, old: Op, new: Op) -> bool:
        """Whether the numbers among the arguments that a cut must not change did not change."""
        if old.name == "aten.slice":
            return _numbers(old, _sliced(old, self.original)) == _numbers(
                new, _sliced(new, self.walk)
            )
        if old.numbers == new.numbers:
            return True
        follows = old.name in SIZES
        return follows and _numbers(old, follows) == _numbers(new, follows)


COPY = "aten.clone"
VIEWS = frozenset(("aten.view", "aten._unsafe_view", "aten._reshape_alias"))


def _alike(old: Op, new: Op) -> bool:
    same = old.func is new.func or (old.name in VIEWS and new.name in VIEWS)
    return same and old.module == new.module


def _sliced(op: Op, labeller: Labeller) -> bool:
    """Whether the axis that a slice is taken of has labels."""
    axes = labeller.of(op.args[0])
    return isinstance(axes[op.args[1] if len(op.args) > 1 else 0], np.ndarray)


def _numbers(op: Op, sizes_follow: bool) -> list[float]:
    return [x for x in op.numbers if isinstance(x, float)] if sizes_follow else op.numbers


def _roots(labeller: Labeller, op: Op) -> frozenset[int]:
    met: set[int] = set()
    for value in [*op.inputs(), *op.outputs()]:
        for axis in labeller.axes.get(value.id, ()):
            if isinstance(axis, np.ndarray):
                met.update(labeller.classes.find(axis).tolist())
    return frozenset(met)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
