"""What calibration holds at once, where memory is bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from thinet.calibrate.batches import images_in
from thinet.calibrate.layers import Layer
from thinet.calibrate.moments import sum_bytes
from thinet.calibrate.patches import BLOCK
from thinet.calibrate.rows import WIDEST, positions_in
from thinet.dual import most_rows, system_bytes
from thinet.store import GIB, Store
from thinet.trace.environment import peak_bytes
from thinet.trace.interpret import Execution
from thinet.types import ExampleInputs, as_call, tensors_in

SYSTEMS = 4
"""Matrices as large as the largest second moments that selection and repair hold at once."""

ENTRY = 8  # bytes of a float64


def parts_that_fit(ops: Sequence[int], columns: Mapping[int, int], room: int) -> list[list[int]]:
    """The consumers in parts whose moments fit into memory together, in order."""
    passes: list[list[int]] = [[]]
    left = room
    for op in sorted(ops):
        size = sum_bytes(columns[op])
        if size > left and passes[-1]:
            passes.append([])
            left = room
        passes[-1].append(op)
        left -= size
    return passes


def leave_room(
    store: Store,
    execution: Execution,
    batches: Sequence[ExampleInputs],
    layers: Mapping[int, Layer],
) -> int:
    """Leave to the work itself what no store can spare; returns the least-squares systems' part.

    Args:
        layers: of the model that runs.

    Raises:
        OptionError: the store's bound is less than that.
    """
    largest = max(batches, key=images_in)
    entries = (math.prod(v.y.shape) // v.outputs * v.columns for v in layers.values())
    widest = max((v.columns for v in layers.values() if v.columns <= WIDEST), default=0)
    systems = SYSTEMS * ENTRY * widest**2
    over_rows = (
        system_bytes(min(positions_in(v, batches), most_rows(v.columns)), v.columns, v.outputs)
        for v in layers.values()
        if v.columns > WIDEST
    )
    calls = [as_call(batch) for batch in batches]
    parts = {
        "the calibration images": sum(tensor.nbytes for tensor in tensors_in(calls)),
        f"what the model computes for {images_in(largest)} images at a time": peak_bytes(
            execution.program(largest)
        ),
        "the inputs of a layer in rows": 3 * 4 * min(max(entries, default=0), BLOCK),
        "the largest least-squares system": max(systems, *over_rows, 0),
        "the smaller model": sum(tensor.nbytes for tensor in execution.tensors.values()),
    }
    text = ", ".join(f"{size / GIB:.3g} for {name}" for name, size in parts.items())
    store.set_aside(
        sum(parts.values()), f"{text}; calibrate in smaller batches or with fewer images"
    )
    return systems
