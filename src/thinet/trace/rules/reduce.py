"""Sums, means, extremes and scans over dimensions."""

from __future__ import annotations

import numpy as np

from thinet.trace.labels import FIXED, Axis, Labeller
from thinet.trace.program import Op, Value

REDUCING = """
all amax amin any argmax argmin count_nonzero linalg_vector_norm logsumexp max mean median min
norm prod std std_mean sum var var_mean nansum nanmean aminmax
""".split()

SCANNING = "cumsum cumprod cummax cummin logcumsumexp sort topk".split()

COUNTING = "histc bincount nonzero _unique2 unique_dim unique_consecutive".split()


def _dims(op: Op, rank: int) -> list[int]:
    """The dimensions that an operation reduces: by name, else the first integers given."""
    names = [a.name for a in op.func._schema.arguments]
    given = dict(zip(names, op.args, strict=False)) | op.kwargs
    dims = given.get("dim", given.get("axis"))
    if dims is None or dims == []:
        return list(range(rank))
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)]


def reducing(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    if len(op.inputs()) > 1:  # max(a, b) is not a reduction
        axes = labels.of(x)
        for out in op.outputs():
            for value in op.inputs():
                axes = tuple(labels.join(a, b, op.where) for a, b in zip(axes, labels.of(value)))
            labels.set(out, axes)
        return
    rank = len(x.shape)
    dims = _dims(op, rank)
    axes = labels.of(x)
    for dim in dims:
        over(labels, op, axes[dim])
    kept = [axes[d] for d in range(rank) if d not in dims]
    held = [FIXED if d in dims else axes[d] for d in range(rank)]
    for out in op.outputs():
        if len(out.shape) == rank and rank != len(kept):
            labels.set(out, held)
        elif len(out.shape) == len(kept):
            labels.set(out, kept)
        else:
            labels.set(out, (FIXED,) * len(out.shape))


def scanning(labels: Labeller, op: Op) -> None:
    """The place along the dimension matters, so nothing of it may go."""
    x: Value = op.args[0]
    dim = next((a for a in op.args[1:] if isinstance(a, int)), -1)
    if op.name == "aten.topk":
        dim = op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", -1)
    axes = list(labels.of(x))
    if axes:
        axes[dim] = labels.lock(axes[dim], f"{op.where} depends on the order along it")
    for out in op.outputs():
        labels.set(out, axes)


def counting(labels: Labeller, op: Op) -> None:
    """histc, bincount, unique: what comes out has nothing of the order of what goes in."""
    for value in op.inputs():
        labels.lock_all(value, f"{op.where} counts its values")
    for out in op.outputs():
        labels.set(out, (FIXED,) * len(out.shape))


def distances(labels: Labeller, op: Op) -> None:
    """(.., n, k) and (.., m, k) to (.., n, m)."""
    left, right = (labels.of(v) for v in op.inputs()[:2])
    over(labels, op, labels.join(left[-1], right[-1], op.where))
    (out,) = op.outputs()
    lead = [FIXED] * (len(out.shape) - 2)
    for axis in (*left[:-2], *right[:-2]):
        labels.lock(axis, f"{op.where} repeats it where it must")
    labels.set(out, (*lead, left[-2], right[-2]))


def over(labels: Labeller, op: Op, axis: Axis) -> None:
    if isinstance(axis, np.ndarray):
        labels.classes.normalise(axis, f"{op.where} reduces over it")


RULES = {
    **{f"aten.{name}": reducing for name in REDUCING},
    **{f"aten.{name}": scanning for name in SCANNING},
    "aten._euclidean_dist": distances,
    "aten._cdist_forward": distances,
    **{f"aten.{name}": counting for name in COUNTING},
}
