"""Convolutions and matrix products: what mixes channels and what makes new ones."""

from __future__ import annotations

from math import prod

import numpy as np

from thinet.trace.labels import FIXED, Axis, Labeller, Mixing, Vector, labelled
from thinet.trace.program import Op, Value


def convolution(labels: Labeller, op: Op) -> None:
    x, weight, bias = op.args[:3]
    transposed, groups = op.args[6], op.args[8]
    (out,) = op.outputs()
    unbatched = len(x.shape) == len(weight.shape) - 1
    channel = 0 if unbatched else 1
    source = labels.of(x)[channel]
    for axis in labels.of(weight)[2:]:
        labels.lock(axis, f"it is a kernel size of {op.where}")
    first, second = labels.of(weight)[:2]
    made, mixed = (second, first) if transposed else (first, second)
    mixes = True
    if groups == 1:
        joined = labels.join(source, mixed, op.where)
        axis: Axis = made
        per_group: Axis = joined
    else:
        free = labelled(source)
        source = labels.vector(source, x.shape[channel], f"{op.where} mixes a fixed axis")
        if isinstance(first, np.ndarray):
            axis, per_group, mixes = _grouped(labels, op, source, weight, groups, transposed, free)
        else:  # such as a weight for each image, images being the groups
            labels.lock(source, f"{op.where} has a weight whose axes are not a layer's own")
            labels.lock(second, f"{op.where} has a weight whose axes are not a layer's own")
            axis, per_group, mixes = FIXED, FIXED, False
    if bias is not None:
        axis = labels.join(axis, labels.of(bias)[0], op.where)
    axes = list(labels.of(x))
    axes[channel] = axis
    for dim in range(channel + 1, len(axes)):
        axes[dim] = labels.lock(axes[dim], f"{op.where} slides over it")
    labels.set(out, axes)
    spatial = prod(x.shape[channel + 1 :] if transposed else out.shape[channel + 1 :])
    batch = 1 if unbatched else out.shape[0]
    kernel = prod(weight.shape[2:])
    factors = (axis, per_group)
    sizes = (out.shape[channel], x.shape[channel] // groups)
    fixed = prod(n for n, factor in zip(sizes, factors, strict=True) if not labelled(factor))
    labels.mixings.append(
        Mixing(
            op=op,
            source=source if mixes else FIXED,
            weight=mixed if mixes else FIXED,
            out=axis,
            factors=tuple(factor for factor in factors if labelled(factor)),
            times=batch * spatial * kernel * fixed,
        )
    )


def _grouped(
    labels: Labeller,
    op: Op,
    source: Vector,
    weight: Value,
    groups: int,
    transposed: bool,
    free: bool,
) -> tuple[Axis, Axis, bool]:
    """A grouped convolution loses whole groups, or the same index of every group.

    Returns the axis it makes, the axis that each group contracts, and whether it mixes channels
    of a group that can be cut.
    """
    first, second = labels.of(weight)[:2]
    assert isinstance(first, np.ndarray)
    per_in = len(source) // groups
    # Transposed weights are (in, out / groups, ...), plain ones (out, in / groups, ...).
    per_out = weight.shape[1] if transposed else weight.shape[0] // groups
    default = "whole" if free and groups >= per_in else "within"
    mode = labels.choose(op, "groups", default)
    rows = source.reshape(groups, per_in)
    if mode == "whole":
        reason = f"it is the width of one group of {op.where}"
        labels.lock(second, reason)
        own = labels.tie(first.reshape(groups, -1))
        theirs = labels.tie(rows)
        labels.classes.unify(own, theirs)
        if transposed:  # each input channel of a group is contracted for all outputs of the group
            return np.repeat(own, per_out), FIXED, False
        return first, second, False
    tied_in = labels.tie(np.ascontiguousarray(rows.T))
    if transposed:
        inside = labels.tie(np.ascontiguousarray(first.reshape(groups, per_in).T))
        labels.classes.unify(inside, tied_in)
        assert isinstance(second, np.ndarray)
        return np.tile(second, groups), inside, True
    labels.tie(np.ascontiguousarray(first.reshape(groups, per_out).T))
    return first, labels.join(tied_in, second, op.where), True


def matmul(labels: Labeller, op: Op) -> None:
    """mm, bmm and their forms with an addend: (.., n, k) x (.., k, m)."""
    operands = op.inputs()
    a, b = operands[-2], operands[-1]
    (out,) = op.outputs()
    left, right = labels.of(a), labels.of(b)
    shared = labels.join(left[-1], right[0 if len(right) == 1 else -2], op.where)
    if len(right) == 1 and labels.is_static(a) and labels.is_static(b) and labelled(shared):
        # Such as the spectral norm of a weight, by which all of it is divided.
        assert isinstance(shared, np.ndarray)
        labels.classes.normalise(shared, f"{op.where} sums over it to compute a weight")
    batch: list[Axis] = []
    if len(left) == 3:
        batch = [labels.join(left[0], right[0], op.where)]
    axes = [*batch, *left[len(batch) : -1], *(right[-1:] if len(right) > 1 else ())]
    for addend in operands[:-2]:
        for back, axis in enumerate(reversed(labels.of(addend)), start=1):
            if back <= len(axes) and addend.shape[-back] == out.shape[-back]:
                axes[-back] = labels.join(axes[-back], axis, op.where)
    labels.set(out, axes)
    # The static operand is the weight; its free axis is what the layer makes.
    source, weight, made = shared, FIXED, FIXED
    if labels.is_static(b):
        source, weight = left[-1], right[0 if len(right) == 1 else -2]
        made = right[-1] if len(right) > 1 else FIXED
    elif labels.is_static(a):
        source, weight = right[0 if len(right) == 1 else -2], left[-1]
        made = left[-2] if len(left) > 1 else FIXED
    factors = [*axes, shared]
    sizes = [*out.shape, a.shape[-1]]
    times = prod(n for n, axis in zip(sizes, factors, strict=True) if not labelled(axis))
    labels.mixings.append(
        Mixing(op, source, weight, made, tuple(f for f in factors if labelled(f)), times)
    )


def embedding(labels: Labeller, op: Op) -> None:
    weight, index = op.inputs()[:2]
    rows, made = labels.of(weight)
    labels.lock(rows, f"{op.where} looks entries up by number")
    (out,) = op.outputs()
    labels.set(out, (*(FIXED for _ in index.shape), made))
    labels.mixings.append(Mixing(op, FIXED, FIXED, made, (), 0))


def embedding_bag(labels: Labeller, op: Op) -> None:
    """Entries of a table (rows, c), summed, averaged or compared by bags: (bags, c)."""
    rows, made = labels.of(op.inputs()[0])
    labels.lock(rows, f"{op.where} looks entries up by number")
    out, *others = op.outputs()
    labels.set(out, (FIXED, made))
    for other in others:  # of each bag, and for the largest of each channel where it was found
        labels.set(
            other, (FIXED, made) if other.shape == out.shape else (FIXED,) * len(other.shape)
        )
    labels.mixings.append(Mixing(op, FIXED, FIXED, made, (), 0))


STRIDE = 16
"""Bytes that strides of a product by groups are multiples of."""


def grouped_matmul(labels: Labeller, op: Op) -> None:
    """Experts: rows (t, k) times the matrix (g, k, m) of the expert that each row is sent to.

    The kernels want strides of 16 bytes, so as many neighbours as make them go together.
    """
    a, b = op.args[:2]
    (out,) = op.outputs()
    if len(a.shape) != 2 or len(b.shape) != 3:
        labels.refuse(op, f"{op.where} multiplies shapes {a.shape} and {b.shape} by groups")
        return
    rows, left = labels.of(a)
    experts, right, made = labels.of(b)
    labels.lock(rows, f"{op.where} sends its entries to experts by number")
    labels.lock(experts, f"{op.where} picks experts by number")
    shared = labels.join(left, right, op.where)
    for bias in op.inputs()[3:]:
        made = labels.join(made, labels.of(bias)[-1], op.where)
    together = max(STRIDE // a.dtype.itemsize, 1)
    for axis in (shared, made):
        if isinstance(axis, np.ndarray) and len(axis) % together == 0:
            labels.tie(axis.reshape(-1, together))
    labels.set(out, (FIXED, made))
    factors, sizes = (shared, made), (a.shape[1], b.shape[2])
    times = a.shape[0] * prod(n for n, f in zip(sizes, factors, strict=True) if not labelled(f))
    labels.mixings.append(
        Mixing(op, left, right, made, tuple(f for f in factors if labelled(f)), times)
    )


BILINEAR = [[1, 3], [0], [1, 2], [2, 3]]
"""The axes by which `F.bilinear` lays its three operands beside each other and sums."""


def bilinear(labels: Labeller, op: Op) -> None:
    """(n, a), weight (m, a, b) and (n, b) to (n, m): all products of two inputs, weighed."""
    first, weight, second = op.args[:3]
    if list(op.args[3:7]) != BILINEAR:
        labels.refuse(op, f"{op.where} is another product of three than that of nn.Bilinear")
        return
    made, *inner = labels.of(weight)
    rows = labels.join(labels.of(first)[0], labels.of(second)[0], op.where)
    (out,) = op.outputs()
    labels.set(out, (rows, made))
    given = labels.of(first)[1], labels.of(second)[1]
    joined = [labels.join(a, b, op.where) for a, b in zip(given, inner, strict=True)]
    factors, sizes = (made, *joined), weight.shape
    fixed = prod(n for n, axis in zip(sizes, factors, strict=True) if not labelled(axis))
    moving = tuple(axis for axis in factors if labelled(axis))
    work = (moving, first.shape[0] * fixed), ((), 0)  # counted once
    for source, mixed, (axes, times) in zip(given, inner, work, strict=True):
        labels.mixings.append(Mixing(op, source, mixed, made, axes, times))


RULES = {
    "aten._trilinear": bilinear,
    "aten._grouped_mm": grouped_matmul,
    "aten.convolution": convolution,
    "aten._convolution": convolution,
    **{f"aten.{n}": matmul for n in ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm")},
    "aten.addmm_": matmul,
    "aten.baddbmm_": matmul,
    "aten.embedding": embedding,
    "aten._embedding_bag": embedding_bag,
    "aten._embedding_bag_forward_only": embedding_bag,
}
