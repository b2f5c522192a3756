"""Putting tensors together and taking them apart."""

from __future__ import annotations

import numpy as np

from thinet.trace.labels import FIXED, Axis, Labeller, labelled
from thinet.trace.program import Op, Value
from thinet.trace.rules.indexing import torn


def cat(labels: Labeller, op: Op) -> None:
    tensors: list[Value] = [v for v in op.args[0] if v.shape != (0,)]
    (out,) = op.outputs()
    dim = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(out.shape)
    axes: list[Axis] = []
    for d in range(len(out.shape)):
        parts = [labels.of(v)[d] for v in tensors]
        if d != dim:
            axes.append(labels.join_all(parts, op.where))
        elif any(labelled(part) for part in parts):
            reason = f"{op.where} puts it beside channels that may not be cut"
            vectors = [
                labels.vector(part, v.shape[d], reason)
                for part, v in zip(parts, tensors, strict=True)
            ]
            axes.append(np.concatenate(vectors))
        else:
            axes.append(FIXED)
    labels.set(out, axes)


def stack(labels: Labeller, op: Op) -> None:
    tensors: list[Value] = op.args[0]
    (out,) = op.outputs()
    dim = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(out.shape)
    axes = [
        labels.join_all([labels.of(v)[d] for v in tensors], op.where)
        for d in range(len(out.shape) - 1)
    ]
    labels.set(out, [*axes[:dim], FIXED, *axes[dim:]])


def split(labels: Labeller, op: Op) -> None:
    """split, chunk and their kin: consecutive pieces.

    Pieces that are asked for by number or by one size stay equal only if the same index of each
    goes: they are "tied". With a list of sizes each goes by itself, "free", while that follows.
    """
    x: Value
    x, sizes, *rest = op.args
    dim = (rest[0] if rest else op.kwargs.get("dim", 0)) % len(x.shape)
    axes = labels.of(x)
    axis = axes[dim]
    pieces = op.outputs()
    start = 0
    equal = len({piece.shape[dim] for piece in pieces}) == 1
    default = "tied" if isinstance(sizes, int) else "free"
    if isinstance(axis, np.ndarray) and equal and labels.choose(op, "split", default) == "tied":
        labels.tie(np.ascontiguousarray(axis.reshape(len(pieces), -1).T))
    for piece in pieces:
        end = start + piece.shape[dim]
        part = axis
        if isinstance(axis, np.ndarray):
            part = axis[start:end]
            places = np.arange(len(axis))
            torn(labels, op, axis, (places >= start) & (places < end))
        labels.set(piece, (*axes[:dim], part, *axes[dim + 1 :]))
        start = end


def unbind(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    dim = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(x.shape)
    axes = labels.of(x)
    labels.lock(axes[dim], f"{op.where} takes it apart one by one")
    for piece in op.outputs():
        labels.set(piece, (*axes[:dim], *axes[dim + 1 :]))


def glu(labels: Labeller, op: Op) -> None:
    """The first half is gated by the second: index i goes with index n / 2 + i."""
    x: Value = op.args[0]
    dim = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", -1)) % len(x.shape)
    axes = list(labels.of(x))
    axis = axes[dim]
    if isinstance(axis, np.ndarray):
        axes[dim] = labels.tie(np.ascontiguousarray(axis.reshape(2, -1).T))
    labels.set(op.outputs()[0], axes)


RULES = {
    "aten.cat": cat,
    "aten.concat": cat,
    "aten.stack": stack,
    "aten.split": split,
    "aten.split_with_sizes": split,
    "aten.chunk": split,
    "aten.unsafe_split": split,
    "aten.unsafe_split_with_sizes": split,
    "aten.unsafe_chunk": split,
    "aten.tensor_split": split,
    "aten.unbind": unbind,
    "aten.glu": glu,
}
