"""Fused attention: query and key agree in their last axis, value brings its own."""

from __future__ import annotations

import numpy as np

from thinet.trace.labels import FIXED, Labeller, Mixing
from thinet.trace.record import Op, Value


def scaled_dot_product(labels: Labeller, op: Op) -> None:
    query, key, value = (labels.of(v) for v in op.args[:3])
    out, *others = op.outputs()
    lead = []
    for dim, axes in enumerate(zip(query[:-2], key[:-2], value[:-2], strict=True)):
        sizes = [v.shape[dim] for v in op.args[:3]]
        # Grouped queries: several heads in a row share one key and value.
        spread = [
            np.repeat(axis, sizes[0] // n) if isinstance(axis, np.ndarray) else axis
            for axis, n in zip(axes, sizes, strict=True)
        ]
        lead.append(labels.join_all(spread, op.where))
    shared = labels.join(query[-1], key[-1], op.where)
    if op.kwargs.get("scale") is None:
        shared = labels.lock(shared, f"{op.where} takes its scale from the width of a head")
    for axis in (query[-2], key[-2], value[-2]):
        labels.lock(axis, f"{op.where} attends over it")
    labels.set(out, [*lead, FIXED, value[-1]])
    for other in others:  # the log of the sums, beside random state
        summed = len(other.shape) == len(lead) + 1
        labels.set(other, (*lead, FIXED) if summed else (FIXED,) * len(other.shape))
    q, v = op.args[0], op.args[2]
    assert isinstance(q, Value) and isinstance(v, Value)
    times = q.shape[0] * q.shape[-2] * op.args[1].shape[-2]
    for axis in (shared, value[-1]):
        labels.mixings.append(Mixing(op, axis, FIXED, FIXED, (lead[-1], axis), times))


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
