"""Picking entries along dimensions, and changing their order."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

from thinet.trace.labels import FIXED, Axis, Labeller
from thinet.trace.record import Op, Value


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
        axes[dim] = axis[start:end:step]
    labels.set(op.outputs()[0], axes)


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
        axes[dim] = np.roll(axis, shift) if isinstance(axis, np.ndarray) else axis
    labels.set(op.outputs()[0], axes)


def by_tensor(labels: Labeller, op: Op) -> None:
    """x[..., index, ...]: what is indexed by a tensor may not be cut, the rest passes through."""
    x: Value = op.args[0]
    indices: list[Value | None] = list(op.args[1])
    axes = labels.of(x)
    (out,) = op.outputs()
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        labels.refuse(op, f"{op.where} picks entries by a mask")
        return
    indexed = [d for d, index in enumerate(indices) if index is not None]
    for dim in indexed:
        labels.lock(axes[dim], f"{op.where} picks entries of it by number")
    rank = max((len(i.shape) for i in indices if i is not None), default=0)
    together = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    rest: list[Axis] = [a for d, a in enumerate(axes) if d not in indexed]
    place = (indexed[0] if together else 0) if indexed else 0
    made = [*rest[:place], *([FIXED] * rank), *rest[place:]]
    labels.set(out, made)


def index_select(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    dim = op.args[1] % len(x.shape)
    axes = list(labels.of(x))
    axes[dim] = labels.lock(axes[dim], f"{op.where} picks entries of it by number")
    labels.set(op.outputs()[0], axes)


def gather(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    axes = labels.of(x)
    (out,) = op.outputs()
    for dim, axis in enumerate(axes):
        labels.lock(axis, f"{op.where} picks entries along dimension {dim} by number")
    labels.set(out, (FIXED,) * len(out.shape))


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
    "aten.index_select": index_select,
    "aten.gather": gather,
    "aten.tril": triangle,
    "aten.triu": triangle,
}
