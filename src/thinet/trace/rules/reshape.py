"""Views: transposed, merged and split axes."""

from __future__ import annotations

from math import prod

import numpy as np

from thinet.trace.labels import ANY, FIXED, Axis, Labeller, Vector, labelled
from thinet.trace.program import Op, Value

LARGEST = 1 << 24  # labels in one merged axis, beyond which it is locked


def permute(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    axes = labels.of(x)
    labels.set(op.outputs()[0], [axes[d] for d in op.args[1]])


def transpose(labels: Labeller, op: Op) -> None:
    axes = list(labels.of(op.args[0]))
    if op.name in ("aten.t", "aten.t_"):
        axes.reverse()
    elif axes:
        a, b = op.args[1], op.args[2]
        axes[a], axes[b] = axes[b], axes[a]
    labels.set(op.outputs()[0], axes)


def movedim(labels: Labeller, op: Op) -> None:
    axes = labels.of(op.args[0])
    rank = len(axes)
    source, target = ([d % rank for d in ([a] if isinstance(a, int) else a)] for a in op.args[1:3])
    order = [d for d in range(rank) if d not in source]
    for place, d in sorted(zip(target, source, strict=True)):
        order.insert(place, d)
    labels.set(op.outputs()[0], [axes[d] for d in order])


def unsqueeze(labels: Labeller, op: Op) -> None:
    (out,) = op.outputs()
    axes = list(labels.of(op.args[0]))
    axes.insert(op.args[1] % len(out.shape), FIXED)
    labels.set(out, axes)


def squeeze(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    rank = len(x.shape)
    given = op.args[1] if len(op.args) > 1 else list(range(rank))
    dims = {d % rank for d in ([given] if isinstance(given, int) else given)} if rank else set()
    axes = [a for d, a in enumerate(labels.of(x)) if d not in dims or x.shape[d] != 1]
    labels.set(op.outputs()[0], axes)


def reshape(labels: Labeller, op: Op) -> None:
    x, (out,) = op.inputs()[0], op.outputs()
    axes: list[Axis] = [FIXED] * len(out.shape)
    if op.index not in labels.blocks:
        labels.blocks[op.index] = blocks(x.shape, out.shape)
    for before, after in labels.blocks[op.index]:
        made = _block(
            labels,
            op,
            [x.shape[d] for d in before],
            [labels.of(x)[d] for d in before],
            [out.shape[d] for d in after],
            after[0] if after else len(out.shape) + before[0],  # a number of its own
        )
        for d, axis in zip(after, made, strict=True):
            axes[d] = axis
    labels.set(out, axes)


def blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with equal products; axes of size 1 pair up or stand alone."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ours, theirs = [i] if i < len(before) else [], [j] if j < len(after) else []
        left = before[i] if ours else 1
        right = after[j] if theirs else 1
        i, j = i + len(ours), j + len(theirs)
        if left != right and 1 in (left, right):
            # A lone axis of size 1 belongs to nobody; the other side waits for its partner.
            if left == 1 and ours:
                j -= len(theirs)
                theirs, right = [], 1
            elif right == 1 and theirs:
                i -= len(ours)
                ours, left = [], 1
        while left != right:
            if left < right and i < len(before):
                ours.append(i)
                left *= before[i]
                i += 1
            elif j < len(after):
                theirs.append(j)
                right *= after[j]
                j += 1
            else:  # sizes with a zero
                return [(list(range(len(before))), list(range(len(after))))]
        found.append((ours, theirs))
    return found


def _block(
    labels: Labeller,
    op: Op,
    before: list[int],
    axes: list[Axis],
    after: list[int],
    first: int,
) -> list[Axis]:
    if prod(before) != prod(after):
        raise ValueError(f"{before} does not become {after}")
    if len(before) == len(after) == 1:
        return axes
    named = [d for d, axis in enumerate(axes) if labelled(axis)]
    if not named:
        free = bool(axes) and all(axis is ANY for axis in axes)
        return [ANY if free else FIXED for _ in after]
    if not 0 < prod(before) <= LARGEST:
        what = "merges it into a huge axis" if prod(before) else "reshapes a tensor of no entries"
        for axis in axes:
            labels.lock(axis, f"{op.where} {what}")
        return [FIXED for _ in after]
    if len(named) > 1:
        named = _keep_one(labels, op, before, axes, named, first)
    place = named[0]
    vector = axes[place]
    assert isinstance(vector, np.ndarray)
    shape = [1] * len(before)
    shape[place] = before[place]
    full = np.broadcast_to(vector.reshape(shape), before).reshape(after or [1])
    return _split(labels, op, full, after, first)


def _keep_one(
    labels: Labeller, op: Op, before: list[int], axes: list[Axis], named: list[int], first: int
) -> list[int]:
    """Two labelled axes merge: one stays prunable, the others are locked."""
    key = (op.index, -1 - first)
    kept = labels.decided.get(key)
    if kept is None:
        varying = [d for d in named if before[d] > 1] or named[:1]
        if len(varying) > 1:
            varying = [d for d in varying if not labels.is_locked(axes[d])] or varying
        kept = labels.decided[key] = _chosen(labels, op, before, varying)
    for d in named:
        if d != kept:
            labels.lock(axes[d], f"{op.where} merges it with another prunable axis")
    return [kept]


def _split(labels: Labeller, op: Op, full: Vector, after: list[int], first: int) -> list[Axis]:
    """One axis becomes several, the first of which is dimension `first` of the result."""
    if len(after) == 1:
        return [full]
    key = (op.index, first)
    if key not in labels.decided:
        labels.decided[key] = _prunable(labels, op, full, after, first)
    kept = labels.decided[key]
    if kept is None:
        labels.lock(full.reshape(-1), f"{op.where} takes it apart")
        return [FIXED for _ in after]
    rows = np.moveaxis(full, kept, 0).reshape(after[kept], -1)
    labels.tie(np.ascontiguousarray(rows))
    made: list[Axis] = [FIXED for _ in after]
    index = tuple(slice(None) if d == kept else 0 for d in range(len(after)))
    made[kept] = np.ascontiguousarray(full[index])
    return made


def _prunable(labels: Labeller, op: Op, full: Vector, after: list[int], first: int) -> int | None:
    """Which of the axes that labels are laid out along stays prunable."""
    roots = labels.classes.find(np.ascontiguousarray(full))
    varying = [d for d in range(len(after)) if (roots != roots.take([0], axis=d)).any()]
    if len(varying) > 1:
        apart = {d - first for d in _taken_apart(labels.original or labels, op.index)}
        varying = [d for d in varying if d not in apart] or varying
    return _chosen(labels, op, after, varying) if varying else None


def _chosen(labels: Labeller, op: Op, sizes: list[int], varying: list[int]) -> int:
    """Which of several axes stays prunable: the heads of attention, else the largest."""
    if len(varying) == 1:
        return varying[0]
    largest = max(varying, key=lambda d: sizes[d])
    heads = op.module in labels.attending or largest == varying[0]
    choice = labels.choose(op, "layout", "outer" if heads else "inner")
    return varying[0] if choice == "outer" else varying[-1]


MOVES = frozenset(f"aten.{name}" for name in ("permute", "transpose", "clone", "_to_copy"))


def _taken_apart(labels: Labeller, index: int) -> set[int]:
    """Dimensions whose entries are picked one by one later: queries, keys and values stacked."""
    found: set[int] = set()
    (value,) = labels.program.ops[index].outputs()
    pending = [(value, list(range(len(value.shape))))]
    while pending:
        current, origin = pending.pop()
        for op in labels.readers.get(current.id, ()):
            if op.args[0] is not current:
                continue
            if op.name in ("aten.unbind", "aten.select"):
                found.add(origin[op.args[1] if len(op.args) > 1 else 0])
            elif op.name in MOVES:
                order = list(origin)
                if op.name == "aten.permute":
                    order = [origin[d] for d in op.args[1]]
                elif op.name == "aten.transpose":
                    a, b = op.args[1], op.args[2]
                    order[a], order[b] = order[b], order[a]
                pending.append((op.outputs()[0], order))
    return found


def as_strided(labels: Labeller, op: Op) -> None:
    """Only the harmless use: the same shape again."""
    x, (out,) = op.inputs()[0], op.outputs()
    if x.shape == out.shape:
        labels.set(out, labels.of(x))
    else:
        labels.refuse(op, f"{op.where} reads memory by strides")


def pixel_shuffle(labels: Labeller, op: Op) -> None:
    """Channels (c, r, r) become (c) and two finer axes of space: all r * r of one c go together."""
    x, (out,) = op.inputs()[0], op.outputs()
    axes = list(labels.of(x))
    if isinstance(axes[-3], np.ndarray):
        axes[-3] = labels.tie(axes[-3].reshape(out.shape[-3], -1))
    _fix_space(labels, op, axes)
    labels.set(out, axes)


def pixel_unshuffle(labels: Labeller, op: Op) -> None:
    x, (out,) = op.inputs()[0], op.outputs()
    axes = list(labels.of(x))
    if isinstance(axes[-3], np.ndarray):
        axes[-3] = np.repeat(axes[-3], out.shape[-3] // x.shape[-3])
    _fix_space(labels, op, axes)
    labels.set(out, axes)


def channel_shuffle(labels: Labeller, op: Op) -> None:
    """Channels (groups, each) become (each, groups): the same index of every group goes."""
    x, groups = op.args[0], op.args[1]
    axes = list(labels.of(x))
    if isinstance(axes[1], np.ndarray):
        columns = np.ascontiguousarray(axes[1].reshape(groups, -1).T)
        labels.tie(columns)
        axes[1] = columns.reshape(-1)
    labels.set(op.outputs()[0], axes)


def _fix_space(labels: Labeller, op: Op, axes: list[Axis]) -> None:
    for dim in (-1, -2):
        axes[dim] = labels.lock(axes[dim], f"{op.where} works on it as space")


def repeat(labels: Labeller, op: Op) -> None:
    """Whole copies one after another: the labels repeat."""
    x, (out,) = op.inputs()[0], op.outputs()
    lead = len(out.shape) - len(x.shape)
    axes: list[Axis] = [ANY] * lead
    for axis, times in zip(labels.of(x), op.args[1][lead:], strict=True):
        axes.append(np.tile(axis, times) if isinstance(axis, np.ndarray) else axis)
    labels.set(out, axes)


RULES = {
    "aten.permute": permute,
    "aten.transpose": transpose,
    "aten.transpose_": transpose,
    "aten.t": transpose,
    "aten.t_": transpose,
    "aten.movedim": movedim,
    "aten.unsqueeze": unsqueeze,
    "aten.unsqueeze_": unsqueeze,
    "aten.squeeze": squeeze,
    "aten.squeeze_": squeeze,
    **{
        f"aten.{name}": reshape
        for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
    },
    "aten.as_strided": as_strided,
    "aten.as_strided_": as_strided,
    "aten.pixel_shuffle": pixel_shuffle,
    "aten.pixel_unshuffle": pixel_unshuffle,
    "aten.channel_shuffle": channel_shuffle,
    "aten.native_channel_shuffle": channel_shuffle,
    "aten.repeat": repeat,
}
