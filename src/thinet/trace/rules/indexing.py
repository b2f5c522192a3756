"""Picking entries along dimensions, and changing their order."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from thinet.trace.labels import FIXED, Axis, Labeller, Vector
from thinet.trace.program import Op, Value


def _argument(op: Op, place: int, name: str, default: Any) -> Any:
    return op.args[place] if len(op.args) > place else op.kwargs.get(name, default)


def slice_(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    dim = _argument(op, 1, "dim", 0) % len(x.shape)
    start, end = _argument(op, 2, "start", None), _argument(op, 3, "end", None)
    step = _argument(op, 4, "step", 1)
    axes = list(labels.of(x))
    axis = axes[dim]
    if isinstance(axis, np.ndarray):
        end = None if end is not None and end >= sys.maxsize else end
        part = np.zeros(len(axis), dtype=bool)
        part[start:end:step] = True
        torn(labels, op, axis, part)
        axes[dim] = axis[part]
    labels.set(op.outputs()[0], axes)


def torn(labels: Labeller, op: Op, axis: Vector, part: np.ndarray) -> None:
    """Lock what an operation takes some entries of that have one label.

    Entries that a reshape has laid together cannot be told apart, so neither can it be seen whether
    the same ones are taken once others are gone; but where the same of each are taken they are.
    """
    inside = np.zeros(int(axis.max(initial=0)) + 1, dtype=bool)
    inside[axis[part]] = True
    both = axis[~part][inside[axis[~part]]]
    if len(both):
        taken = part[np.argsort(axis, kind="stable")]
        number = len(np.unique(axis))
        alike = len(axis) % number == 0 and (np.bincount(axis)[axis] == len(axis) // number).all()
        rows = taken.reshape(number, -1) if alike else taken[:, None]
        if not (rows == rows[0]).all():
            labels.lock(both, f"{op.where} takes apart what goes together")


def select(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    dim = op.args[1] % len(x.shape)
    axes = labels.of(x)
    labels.lock(axes[dim], f"{op.where} takes one entry of it by number")
    labels.set(op.outputs()[0], (*axes[:dim], *axes[dim + 1 :]))


def flip(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    axes = list(labels.of(x))
    for dim in op.args[1]:
        axis = axes[dim]
        axes[dim] = axis[::-1].copy() if isinstance(axis, np.ndarray) else axis
    labels.set(op.outputs()[0], axes)


def roll(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    axes = list(labels.of(x))
    dims = _argument(op, 2, "dims", [])
    if not dims:
        labels.refuse(op, f"{op.where} rolls the flattened tensor")
        return
    for shift, dim in zip(op.args[1], dims, strict=True):
        axis = axes[dim]
        if isinstance(axis, np.ndarray):
            if len(np.unique(axis)) < len(axis) and shift % len(axis):
                labels.lock(axis, f"{op.where} moves entries that go together past each other")
            axes[dim] = np.roll(axis, shift)
    labels.set(op.outputs()[0], axes)


def by_tensor(labels: Labeller, op: Op) -> None:
    """x[..., index, ...]: what is indexed by a tensor may not be cut, the rest passes through."""
    labels.set(op.outputs()[0], _picked(labels, op, op.args[0], op.args[1]))


def put_by_tensor(labels: Labeller, op: Op) -> None:
    """x[..., index, ...] = values: what is not indexed meets the values' last dimensions."""
    x, indices, values = op.args[:3]
    picked = _picked(labels, op, x, indices)
    for back, axis in enumerate(reversed(labels.of(values)), start=1):
        if values.shape[-back] > 1:
            labels.join(picked[-back], axis, op.where)
    indexed = _indexed(indices)[0]
    axes = [FIXED if d in indexed else axis for d, axis in enumerate(labels.of(x))]
    labels.set(op.outputs()[0], axes)


def _indexed(indices: list[Value | None]) -> tuple[list[int], int]:
    """The dimensions that are indexed, and how many take their place. A mask covers several."""
    dims: list[int] = []
    place, rank = 0, 0
    for index in indices:
        mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        covers = len(index.shape) if mask and index is not None else 1
        if index is not None:
            dims += range(place, place + covers)
            rank = max(rank, 1 if mask else len(index.shape))
        place += covers
    return dims, rank


def _picked(labels: Labeller, op: Op, x: Value, indices: list[Value | None]) -> list[Axis]:
    """The axes of x[..., index, ...]."""
    axes = labels.of(x)
    dims, rank = _indexed(indices)
    for dim in dims:
        labels.lock(axes[dim], f"{op.where} picks entries of it by number")
    for index in indices:
        if index is not None:
            labels.lock_all(index, f"{op.where} takes it for numbers of entries")
    rest = [axis for d, axis in enumerate(axes) if d not in dims]
    together = dims == list(range(dims[0], dims[-1] + 1)) if dims else True
    place = dims[0] if dims and together else 0
    return [*rest[:place], *([FIXED] * rank), *rest[place:]]


def index_select(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    dim = op.args[1] % len(x.shape)
    axes = list(labels.of(x))
    axes[dim] = labels.lock(axes[dim], f"{op.where} picks entries of it by number")
    labels.set(op.outputs()[0], axes)


def put_along(labels: Labeller, op: Op) -> None:
    """index_add, index_copy, index_fill: slices put along one dimension, the others meet."""
    x: Value = op.args[0]
    dim = op.args[1] % len(x.shape)
    others = [v for v in op.inputs()[1:] if len(v.shape) == len(x.shape)]
    axes = list(labels.of(x))
    for d in range(len(axes)):
        met = [axes[d], *(labels.of(v)[d] for v in others)]
        if d == dim:
            for axis in met:
                labels.lock(axis, f"{op.where} puts entries into it by number")
            axes[d] = FIXED
        else:
            axes[d] = labels.join_all(met, op.where)
    labels.set(op.outputs()[0], axes)


def gather(labels: Labeller, op: Op) -> None:
    """Entries along one dimension by number; along the others each entry stays in its place."""
    x, index = op.args[0], op.args[2]
    axes = _in_place(labels, op, [x, index])
    labels.set(op.outputs()[0], axes)


def scatter(labels: Labeller, op: Op) -> None:
    """The inverse of gather, with or without a source."""
    x: Value = op.args[0]
    values = [v for v in op.inputs() if len(v.shape) == len(x.shape)]
    labels.set(op.outputs()[0], _in_place(labels, op, values))


def _in_place(labels: Labeller, op: Op, values: list[Value]) -> list[Axis]:
    """Axes of tensors whose entries meet along all dimensions but `op.args[1]`."""
    rank = len(values[0].shape)
    dim = op.args[1] % rank if rank else 0
    axes: list[Axis] = []
    for d in range(rank):
        met = [labels.of(v)[d] for v in values]
        if d != dim and len({v.shape[d] for v in values}) == 1:
            axes.append(labels.join_all(met, op.where))
            continue
        for axis in met:
            labels.lock(axis, f"{op.where} picks entries of it by number")
        axes.append(FIXED)
    return axes


def triangle(labels: Labeller, op: Op) -> None:
    """tril and triu: the last two dimensions are positions."""
    x: Value = op.args[0]
    axes = list(labels.of(x))
    for dim in (-1, -2):
        axes[dim] = labels.lock(axes[dim], f"{op.where} depends on the order along it")
    labels.set(op.outputs()[0], axes)


RULES = {
    "aten.slice": slice_,
    "aten.select": select,
    "aten.flip": flip,
    "aten.roll": roll,
    "aten.index": by_tensor,
    "aten.index_put": put_by_tensor,
    "aten.index_put_": put_by_tensor,
    "aten._unsafe_index": by_tensor,
    "aten.index_select": index_select,
    **{f"aten.index_{n}{i}": put_along for n in ("add", "copy", "fill") for i in ("", "_")},
    "aten.gather": gather,
    **{
        f"aten.{n}{i}": scatter
        for n in ("scatter", "scatter_add", "scatter_reduce")
        for i in ("", "_")
    },
    "aten.tril": triangle,
    "aten.triu": triangle,
}
