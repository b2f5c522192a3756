"""Pooling, resizing and padding: they work on the last dimensions and leave the channels."""

from __future__ import annotations

import numpy as np

from thinet.trace.labels import FIXED, Labeller
from thinet.trace.program import Op, Value

POOLS = """
max_pool{n}d_with_indices max_pool{n}d avg_pool{n}d _adaptive_avg_pool{n}d adaptive_avg_pool{n}d
adaptive_max_pool{n}d reflection_pad{n}d replication_pad{n}d fractional_max_pool{n}d
""".split()

RESIZES = {
    "upsample_nearest1d": 1,
    "upsample_linear1d": 1,
    "_upsample_nearest_exact1d": 1,
    "upsample_nearest2d": 2,
    "_upsample_nearest_exact2d": 2,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_nearest3d": 3,
    "_upsample_nearest_exact3d": 3,
    "upsample_trilinear3d": 3,
}


def sliding(labels: Labeller, op: Op, last: int) -> None:
    x: Value = op.args[0]
    axes = list(labels.of(x))
    for dim in range(len(axes) - last, len(axes)):
        axes[dim] = labels.lock(axes[dim], f"{op.where} slides over it")
    for out in op.outputs():
        labels.set(out, axes)


def _over_last(n: int):
    return lambda labels, op: sliding(labels, op, n)


def constant_pad(labels: Labeller, op: Op) -> None:
    """Padded entries are constants that nothing can take away."""
    x, amounts = op.args[0], op.args[1]
    axes = list(labels.of(x))
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back], amounts[2 * back + 1]
        dim = len(axes) - 1 - back
        if before == after == 0 or axes[dim] is FIXED:
            continue
        reason = f"{op.where} pads it with constants"
        kept = labels.vector(axes[dim], x.shape[dim], reason)
        kept = kept[max(-before, 0) : len(kept) - max(-after, 0)]
        pieces = [labels.vector(FIXED, max(n, 0), reason) for n in (before, after)]
        axes[dim] = np.concatenate([pieces[0], kept, pieces[1]])
    labels.set(op.outputs()[0], axes)


def unpool(labels: Labeller, op: Op) -> None:
    """Entries put back at the places that a pooling remembers, channel by channel."""
    x, places = op.args[0], op.args[1]
    space = 3 if op.name.endswith("3d") else 2
    axes = [
        labels.join(a, b, op.where) for a, b in zip(labels.of(x), labels.of(places), strict=True)
    ]
    for dim in range(len(axes) - space, len(axes)):
        axes[dim] = labels.lock(axes[dim], f"{op.where} puts entries along it by number")
    labels.set(op.outputs()[0], axes)


RULES = {
    "aten.max_unpool2d": unpool,
    "aten.max_unpool3d": unpool,
    **{f"aten.{name.format(n=n)}": _over_last(n) for name in POOLS for n in (1, 2, 3)},
    **{f"aten.{name}": _over_last(n) for name, n in RESIZES.items()},
    "aten.constant_pad_nd": constant_pad,
}
