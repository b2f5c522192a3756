"""A cut model's operations beside the original's.

Every operation of the cut copy must have the results whose labels are those of the original less
the removed ones, and the same scalar arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import numpy as np

from thinet.trace.labels import FIXED, Axis, Classes, Labeller, Mask, Vector
from thinet.trace.program import Loop, Op, Program, Value
from thinet.trace.record import EnoughError, StoppedError
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
        apart = left != right
        if not np.count_nonzero(apart):
            return
        new = (left >= self.known) | (right >= self.known)
        clash = apart & ~new
        if np.count_nonzero(clash):
            self.clashes.append(np.concatenate([left[clash], right[clash]]))
        super().unify(a[new], b[new])

    def lock(self, labels: Vector, reason: str) -> None:
        pass

    def normalise(self, labels: Vector, reason: str) -> None:
        pass


class Comparison:
    """Walks a cut model's operations beside the original's while they are recorded.

    Args:
        original: the walk of the uncut model.
        left: for each of its labels, whether it is still there.
        cut: names of the parameters and buffers that lost some.
        until: number of the last operation to compare; None for all.
    """

    def __init__(
        self, original: Labeller, left: Mask, cut: frozenset[str], until: int | None
    ) -> None:
        self.original = original
        self.cut = cut
        self.left = left
        self.until = until
        self.classes = _Known(original.classes)
        self.ours = original.program.ops
        self.place = 0
        self.enough = False
        self.within: Loop | None = None  # whose one step is running
        self.broken: Exception | None = None
        self.mismatch: Mismatch | None = None
        self.remaining: dict[int, tuple[Vector, Vector]] = {}

    def stays(self, axis: Vector) -> Vector:
        """The labels of an axis of the original that are not gone; the same array each time."""
        known = self.remaining.get(id(axis))
        if known is None:
            left = self.left[axis]
            known = axis, axis if left.all() else axis[left]
            self.remaining[id(axis)] = known  # with the axis itself, so that its id stays its own
        return known[1]

    def _left(self, axis: Axis) -> Axis:
        return self.stays(axis) if isinstance(axis, np.ndarray) else axis

    def begin(self, program: Program) -> None:
        original = self.original
        seeds = {name: original.axes[key] for key, name in original.program.names.items()}
        for name in self.cut.intersection(seeds):
            seeds[name] = tuple(map(self._left, seeds[name]))
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

    def loop(self, inputs: Sequence[Value], settings: tuple[Any, ...]) -> Loop | None:
        """The original's loop that one on these inputs may stand for; else its operations tell."""
        loop = self.original.program.loops.get(self.place)
        if loop is None or self.enough or (self.until is not None and self.until < loop.stop - 1):
            return None
        if settings != loop.settings or len(inputs) != len(loop.inputs):
            return None
        if all(map(self._follows, loop.inputs, inputs)):
            self.within = loop
        return self.within

    def passed(self, loop: Loop, outputs: Sequence[Value]) -> None:
        """Go on behind a loop, a single step of which has run."""
        for before, after in zip(loop.outputs, outputs, strict=True):
            axes = tuple(map(self._left, self.original.axes[before.id]))
            sizes = (len(a) if isinstance(a, np.ndarray) else n for a, n in zip(axes, before.shape))
            if after.shape != tuple(sizes):
                self._stop(
                    f"a result of sizes {list(before.shape)} became one of {list(after.shape)}",
                    self.ours[loop.stop - 1],
                )
                raise EnoughError
            self.walk.axes[after.id] = axes
            if before.id in self.original.static:
                self.walk.static.add(after.id)
        self.place, self.within = loop.stop, None

    def _follows(self, before: Value, after: Value) -> bool:
        """Whether a value has the sizes and labels that are left of the original's."""
        axes = self.walk.axes.get(after.id, ())
        if len(axes) != len(before.shape):
            return False
        for dim, expected in enumerate(self.original.axes[before.id]):
            found = self._axis(expected, axes[dim], before.shape[dim], after.shape[dim])
            if isinstance(found, str):
                return False
            if isinstance(expected, np.ndarray) and isinstance(found, np.ndarray):
                self.classes.unify(found, self.stays(expected))  # new labels, with what they meet
        return not self.classes.clashes

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
        place = self.place if self.within is None else self.within.stop - 1
        self._stop(f"the forward code {what}", self.ours[min(place, len(self.ours) - 1)])

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
        if self._untouched(old, new):
            for before, after in zip(old.outputs(), new.outputs(), strict=True):
                self.walk.axes[after.id] = self.original.axes[before.id]
                if before.id in self.original.static:
                    self.walk.static.add(after.id)
            return None
        if not self._same_numbers(old, new):
            return "the forward code computes a number from the size"
        try:
            self.walk.step(new)
        except (ValueError, AssertionError, IndexError) as error:
            return f"the shapes no longer fit: {error}"
        if self.classes.clashes:
            return "the forward code takes channels by number"
        for before, after in zip(old.outputs(), new.outputs(), strict=True):
            expected, found = self.original.of(before), self.walk.of(after)
            if len(expected) != len(found):
                return f"a result of {len(expected)} axes became one of {len(found)}"
            axes = [*map(self._axis, expected, found, before.shape, after.shape)]
            for axis in axes:
                if isinstance(axis, str):
                    return axis
            self.walk.axes[after.id] = tuple(axes)  # type: ignore[arg-type]
        return None

    def _untouched(self, old: Op, new: Op) -> bool:
        """Whether an operation does the same as before, on labels of which none is gone.

        Such are most where few groups are cut; its results then have the labels of the original's.
        """
        if (
            old.numbers != new.numbers
            or old.leaves.hidden != new.leaves.hidden
            or old.leaves.settings != new.leaves.settings
        ):
            return False
        if not old.inputs() or len(old.inputs()) != len(new.inputs()):
            return False
        ours, theirs = self.original.axes, self.walk.axes
        for before, after in zip(old.inputs(), new.inputs(), strict=True):
            axes = theirs.get(after.id)
            if axes is None or before.shape != after.shape:
                return False
            if not all(map(is_, axes, ours[before.id])):
                return False
        for before, after in zip(old.outputs(), new.outputs(), strict=True):
            if before.shape != after.shape or (after.id in theirs and after not in new.inputs()):
                return False
            # What a new tensor is made for may lose some, though nothing that it is made from does.
            if any(isinstance(a, np.ndarray) and self.stays(a) is not a for a in ours[before.id]):
                return False
        return True

    def _axis(self, expected: Axis, found: Axis, before: int, after: int) -> Axis | str:
        """The axis to go on with, the expected one if it can be, or why it does not follow."""
        if not isinstance(expected, np.ndarray):
            if found is expected and found is FIXED and before != after:
                return f"a size of {before} became {after}"
            return found
        stays = self.stays(expected)
        if found is stays and len(stays) == after:
            return stays
        if len(stays) != after:
            return f"a size of {before} became {after} and not {len(stays)}"
        if not isinstance(found, np.ndarray):
            return found
        # Labels themselves and not only their classes: the order within a class matters too.
        # Labels of tensors made on the way are new each time; those of parameters are not.
        stored = self.original.stored
        differ = found != stays
        if not np.count_nonzero(differ):
            return stays
        wrong = differ & ((found < stored) | (stays < stored))
        if not wrong.any():
            return found
        met = self.classes.find(np.concatenate([found[wrong], stays[wrong]]))
        self.classes.clashes.append(met[met < self.classes.known])
        return "the forward code takes channels by number"

    def _same_numbers(self, old: Op, new: Op) -> bool:
        """Whether the numbers among the arguments that a cut must not change did not change."""
        if old.leaves.hidden != new.leaves.hidden:
            return False
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


def _numbers(op: Op, sizes_follow: bool) -> list[complex]:
    return [x for x in op.numbers if not isinstance(x, int)] if sizes_follow else op.numbers


def _roots(labeller: Labeller, op: Op) -> frozenset[int]:
    met: set[int] = set()
    for value in [*op.inputs(), *op.outputs()]:
        for axis in labeller.axes.get(value.id, ()):
            if isinstance(axis, np.ndarray):
                met.update(labeller.classes.find(axis).tolist())
    return frozenset(met)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
