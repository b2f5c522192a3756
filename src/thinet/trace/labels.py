"""Channels as labels: each index of each dimension gets a label, and operations join them.

A dimension of a value carries one of:
  - an integer vector, one label an index: these indices can go, if all of their class can;
  - `FIXED`: an axis that is never cut (batch, space, model inputs);
  - `ANY`: an axis made by expanding one entry, which fits whatever it meets.

Two labels that must go together are in one class of a union-find. What may not go is locked, with
the reason in words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from thinet.trace.program import Op, Program, Value, values_of

BY_NUMBER = frozenset(
    f"aten.{name}" for name in "slice select split split_with_sizes chunk roll flip narrow".split()
)
"""Operations that count along an axis."""

Vector = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Axis:
    """An axis without labels of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __len__(self) -> int:
        raise TypeError(f"a {self.name} axis has no labels")


FIXED: Final = _Axis("FIXED")
ANY: Final = _Axis("ANY")

Axis = Vector | _Axis
Axes = tuple[Axis, ...]


def labelled(axis: Axis) -> bool:
    return isinstance(axis, np.ndarray)


class Classes:
    """Union-find over labels, on whole vectors at a time.

    A class's root is its smallest label, so roots do not depend on the order of joining.
    """

    def __init__(self) -> None:
        self._parent: Vector = np.arange(1024, dtype=np.int64)
        self.count = 0
        self.locks: list[tuple[Vector, str]] = []
        self.normalised: list[tuple[Vector, str]] = []
        self.muted = False

    def fresh(self, n: int) -> Vector:
        """n new labels, each in a class of its own."""
        start, self.count = self.count, self.count + n
        if self.count > len(self._parent):
            size = max(self.count, 2 * len(self._parent))
            grown = np.arange(size, dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return np.arange(start, self.count, dtype=np.int64)

    def find(self, labels: Vector) -> Vector:
        """The root of each label."""
        roots = self._parent[labels]
        moved = False
        while True:
            above = self._parent[roots]
            if not np.count_nonzero(above != roots):
                break
            roots, moved = above, True
        if moved:
            self._parent[labels] = roots
        return roots

    def unify(self, a: Vector, b: Vector) -> None:
        """Join a[i] with b[i] for every i."""
        while True:
            left, right = self.find(a), self.find(b)
            apart = left != right
            if not np.count_nonzero(apart):
                return
            low = np.minimum(left[apart], right[apart])
            high = np.maximum(left[apart], right[apart])
            # Where one root meets several, the smallest wins and the next round joins the others.
            np.minimum.at(self._parent, high, low)

    def lock(self, labels: Vector, reason: str) -> None:
        """These may not be cut."""
        if not self.muted:
            self.locks.append((labels, reason))

    def normalise(self, labels: Vector, reason: str) -> None:
        """Removing one of these changes the others."""
        if not self.muted:
            self.normalised.append((labels, reason))


@dataclass
class Mixing:
    """An operation that contracts an activation's channels: a consumer's work.

    `source` is the activation's contracted axis and `weight` the same axis of the parameters (FIXED
    between two activations), `out` the axis that the parameters make. `factors` are the axes whose
    sizes multiply to its MACs, `times` the product of all sizes that never change.
    """

    op: Op
    source: Axis
    weight: Axis
    out: Axis
    factors: tuple[Axis, ...]
    times: int


@dataclass
class Labeller:
    """Walks a program once and fills in the axes of every value by one rule an operation.

    Attributes:
        choices: module path to what was chosen where a layout leaves a choice ("outer" or "inner"
            factor of a reshape kept prunable; "whole" or "within" for grouped convolutions).
        made: choices that this walk met, chosen by the caller or by default.
        blocks: for each reshape, by operation, which axes become which.
        decided: for each reshape, by operation and axis, which factor stays prunable (None: none);
            those of an `original` are kept to.
        stored: number of labels that parameters and buffers start with.
        original: for a cut model, the walk of the uncut one, whose decisions are kept to.
        loose: values with an `ANY` axis, by the memory that they are in.
    """

    program: Program
    classes: Classes
    rules: dict[str, Callable[[Labeller, Op], None]]
    choices: dict[str, str] = field(default_factory=dict)
    seeds: dict[str, Axes] | None = None
    axes: dict[int, Axes] = field(default_factory=dict)
    static: set[int] = field(default_factory=set)
    mixings: list[Mixing] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    blocks: dict[int, Any] = field(default_factory=dict)
    decided: dict[tuple[int, int], int | None] = field(default_factory=dict)
    stored: int = 0
    original: Labeller | None = None
    loose: dict[int, list[Value]] = field(default_factory=dict)

    def run(self) -> Labeller:
        self.begin()
        for op in self.program.ops:
            self.step(op)
        outputs = {value.id for value in values_of(self.program.outputs)}
        for value in self.program.leaving:
            self.axes.setdefault(value.id, (FIXED,) * len(value.shape))  # made by no operation
            taken = "the forward code takes its numbers out, as an array or a list"
            self.lock_all(value, "it is an output of the model" if value.id in outputs else taken)
        if self.program.unseen is not None:
            for value in self.program.parameters.values():
                self.lock_all(value, self.program.unseen)
        return self

    def begin(self) -> None:
        """Label what the model is given: inputs, parameters and buffers."""
        if self.original is not None:
            self.choices = self.original.made
            self.blocks, self.decided = dict(self.original.blocks), dict(self.original.decided)
            self.unread, self.attending = self.original.unread, self.original.attending
        args, kwargs = self.program.inputs
        for value in values_of((args, kwargs)):
            self.axes[value.id] = (FIXED,) * len(value.shape)
        for value_id, value in self.program.parameters.items():
            self.axes.setdefault(value_id, self._parameter_axes(value))
            self.static.add(value_id)
        sizes = (sum(value.shape) for value in self.program.parameters.values())
        self.stored = sum(sizes) if self.original is None else self.original.stored

    def step(self, op: Op) -> None:
        """Label the results of one operation."""
        for value in op.inputs():
            if value.id not in self.axes:  # a tensor attribute that nobody registered
                fresh = tuple(self.classes.fresh(n) for n in value.shape)
                self.axes[value.id] = fresh
                self.static.add(value.id)
                self.lock_all(
                    value,
                    f"{op.where} uses a tensor that is neither a parameter nor a buffer; register "
                    "it with register_buffer so that it can be cut",
                )
        if all(value.id in self.static for value in op.inputs()):
            self.static.update(value.id for value in op.outputs())
        rule = self.rules.get(op.name)
        # What nobody reads may change, as long as it still runs.
        self.classes.muted = op.index in self.unread
        if rule is None:
            self.refuse(op, f"there is no rule for {op.where} (see docs/adding-an-op.md)")
        else:
            self._by_rule(rule, op)
        self.classes.muted = False
        if self.loose and op.func._schema.is_mutable and op.inputs():
            self._written(op.inputs()[0])

    def _by_rule(self, rule: Callable[[Labeller, Op], None], op: Op) -> None:
        try:
            rule(self, op)
        except (ValueError, AssertionError, IndexError, TypeError):
            if self.original is not None:  # a cut model's shapes may no longer fit
                raise
            self.refuse(op, f"{op.where} was called in a way that its rule does not know")

    def _written(self, part: Value) -> None:
        """Entries of an `ANY` axis are no longer alike where a part of them is written."""
        for value in self.loose.get(part.storage, ()):
            if value.shape != part.shape:
                axes = (FIXED if axis is ANY else axis for axis in self.axes[value.id])
                self.axes[value.id] = tuple(axes)

    def _parameter_axes(self, value: Value) -> Axes:
        if self.seeds is not None:
            return self.seeds[self.program.names[value.id]]
        return tuple(self.classes.fresh(n) for n in value.shape)

    # What rules use

    def of(self, value: Value) -> Axes:
        return self.axes[value.id]

    def set(self, value: Value, axes: Iterable[Axis]) -> None:
        """Label a result; a value written in place keeps its labels and joins the new ones."""
        axes = tuple(axes)
        assert len(axes) == len(value.shape), (value, axes)
        if value.id in self.axes:
            self.axes[value.id] = tuple(
                self.join(old, new, "a write in place")
                for old, new in zip(self.axes[value.id], axes, strict=True)
            )
        else:
            self.axes[value.id] = axes
            if any(axis is ANY for axis in axes):
                self.loose.setdefault(value.storage, []).append(value)

    def join(self, a: Axis, b: Axis, where: str) -> Axis:
        """Unify two axes of equal size; what meets a fixed axis is locked."""
        if a is ANY:
            return b
        if b is ANY or a is b:
            return a
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            self.classes.unify(a, b)
            return a
        labels = a if isinstance(a, np.ndarray) else b
        if not isinstance(labels, np.ndarray):
            return FIXED
        self.classes.lock(labels, f"{where} joins it with an axis that may not be cut")
        # Labels of a tensor made from nothing, which no parameter shares, need no more care.
        return labels if (self.classes.find(labels) < self.stored).any() else FIXED

    def join_all(self, axes: Sequence[Axis], where: str) -> Axis:
        joined: Axis = ANY
        for axis in axes:
            joined = self.join(joined, axis, where)
        return joined

    def lock(self, axis: Axis, reason: str) -> Axis:
        """Lock the labels of an axis; the axis is fixed from here on."""
        if isinstance(axis, np.ndarray):
            self.classes.lock(axis, reason)
        return FIXED

    def is_locked(self, axis: Axis) -> bool:
        """Whether no entry of an axis could be cut even now."""
        if not isinstance(axis, np.ndarray) or not self.classes.locks:
            return not isinstance(axis, np.ndarray)
        locked = np.zeros(self.classes.count, dtype=bool)
        every = np.concatenate([vector.reshape(-1) for vector, _ in self.classes.locks])
        locked[self.classes.find(every)] = True
        return bool(locked[self.classes.find(axis)].all())

    def lock_all(self, value: Value, reason: str) -> None:
        for axis in self.of(value):
            self.lock(axis, reason)

    def refuse(self, op: Op, reason: str) -> None:
        """Lock everything that an operation touches; always sound."""
        for value in op.inputs():
            self.lock_all(value, reason)
        for value in op.outputs():
            if value.id not in self.axes:
                self.axes[value.id] = (FIXED,) * len(value.shape)

    def tie(self, labels: Vector) -> Vector:
        """Make the labels of each row of a matrix one class; returns the rows' labels."""
        first = np.ascontiguousarray(labels[..., :1])
        self.classes.unify(
            np.broadcast_to(first, labels.shape).reshape(-1).copy(), labels.reshape(-1).copy()
        )
        return first[..., 0]

    def choose(self, op: Op, kind: str, default: str) -> str:
        """The caller's choice for the module that runs this operation, or the default."""
        key = f"{op.module}:{kind}"
        self.made.setdefault(key, self.choices.get(key, default))
        return self.made[key]

    @cached_property
    def pieces(self) -> list[tuple[Op, Vector]]:
        """Operations that take some channels by number, with the labels of each piece."""
        found: list[tuple[Op, Vector]] = []
        for op in self.program.ops:
            if op.name in BY_NUMBER:
                given = [axis for axis in self.of(op.args[0]) if isinstance(axis, np.ndarray)]
                for out in op.outputs():
                    for axis in self.of(out):
                        if isinstance(axis, np.ndarray) and not any(axis is g for g in given):
                            found.append((op, axis))
        return found

    @cached_property
    def readers(self) -> dict[int, list[Op]]:
        """For each value id, the operations that read it."""
        found: dict[int, list[Op]] = {}
        for op in self.program.ops:
            for value in op.inputs():
                found.setdefault(value.id, []).append(op)
        return found

    @cached_property
    def unread(self) -> frozenset[int]:
        """Operations whose results reach no output, and that write nothing in place."""
        needed = {value.id for value in self.program.leaving}
        found: set[int] = set()
        for op in reversed(self.program.ops):
            made = {value.id for value in op.outputs()}
            if made and made.isdisjoint(needed) and not op.func._schema.is_mutable:
                found.add(op.index)
            else:
                needed.update(value.id for value in op.inputs())
        return frozenset(found)

    @cached_property
    def attending(self) -> frozenset[str]:
        """Modules that multiply activations with each other, as attention does."""
        products = ("bmm", "baddbmm", "scaled_dot_product")
        return frozenset(
            op.module for op in self.program.ops if any(p in op.name for p in products)
        )

    def vector(self, axis: Axis, size: int, reason: str) -> Vector:
        """An axis as labels: fixed ones become new locked labels."""
        if isinstance(axis, np.ndarray):
            return axis
        fresh = self.classes.fresh(size)
        if axis is FIXED:
            self.classes.lock(fresh, reason)
        return fresh

    def is_static(self, value: Value) -> bool:
        """Whether the value depends on parameters and constants only."""
        return value.id in self.static
