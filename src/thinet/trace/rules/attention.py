"""Fused attention: query and key agree in their last axis, value brings its own."""

from __future__ import annotations

from math import prod

import numpy as np

from thinet.trace.labels import FIXED, Axis, Labeller, Mixing, labelled
from thinet.trace.program import Op, Value


def scaled_dot_product(labels: Labeller, op: Op) -> None:
    query, key, value = (labels.of(v) for v in op.args[:3])
    out, *others = op.outputs()
    lead: list[Axis] = []
    for dim, axes in enumerate(zip(query[:-2], key[:-2], value[:-2], strict=True)):
        sizes = [v.shape[dim] for v in op.args[:3]]
        # Grouped queries: several heads in a row share one key and value.
        spread = [
            np.repeat(axis, sizes[0] // n) if isinstance(axis, np.ndarray) else axis
            for axis, n in zip(axes, sizes, strict=True)
        ]
        lead.append(labels.join_all(spread, op.where))
    _add_mask(labels, op, lead)
    shared = labels.join(query[-1], key[-1], op.where)
    if op.kwargs.get("scale") is None:
        shared = labels.lock(shared, f"{op.where} takes its scale from the width of a head")
    for axis in (query[-2], key[-2], value[-2]):
        labels.lock(axis, f"{op.where} attends over it")
    labels.set(out, [*lead, FIXED, value[-1]])
    for other in others:  # the log of the sums, beside random state
        summed = len(other.shape) == len(lead) + 1
        labels.set(other, (*lead, FIXED) if summed else (FIXED,) * len(other.shape))
    q, k, v = op.args[:3]
    assert isinstance(q, Value) and isinstance(k, Value) and isinstance(v, Value)
    sizes = [*q.shape[:-2], q.shape[-2] * k.shape[-2]]
    for axis, width in ((shared, q.shape[-1]), (value[-1], v.shape[-1])):
        axes = [*lead, FIXED, axis]
        times = prod(n for n, a in zip([*sizes, width], axes, strict=True) if not labelled(a))
        factors = tuple(a for a in axes if labelled(a))
        labels.mixings.append(Mixing(op, axis, FIXED, FIXED, factors, times))


def _add_mask(labels: Labeller, op: Op, lead: list[Axis]) -> None:
    """Join a mask, (..., l, l) with axes that broadcast, with the leading axes of the scores."""
    mask = op.kwargs.get("attn_mask", op.args[3] if len(op.args) > 3 else None)
    if not isinstance(mask, Value):
        return
    axes = labels.of(mask)
    for axis in axes[-2:]:
        labels.lock(axis, f"{op.where} attends over it")
    for back in range(3, min(len(axes), len(lead) + 2) + 1):
        if mask.shape[-back] > 1:
            lead[2 - back] = labels.join(lead[2 - back], axes[-back], op.where)


RULES = {
    f"aten.{name}": scaled_dot_product
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "scaled_dot_product_attention",
    )
}
