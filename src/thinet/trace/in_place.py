"""Operations that may write over what they read, because nothing else ever reads it.

The memory is at hand then, while a new tensor of an activation's size costs the system's work of
giving it: a BatchNorm over a large batch takes a fifth of the time, and gives the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from thinet.trace.program import Op, Program, values_of

FRESH = frozenset(
    "aten." + name for name in ("convolution", "mm", "addmm", "bmm", "native_batch_norm", "add")
)
"""Operations whose result is never a view."""


def _norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if rest[2].dtype != x.dtype:  # the form with `out` knows one precision only
        return torch.ops.aten.native_batch_norm(x, *rest)
    saved = x.new_empty(0), x.new_empty(0)
    return torch.ops.aten.native_batch_norm.out(
        x, *rest, out=x, save_mean=saved[0], save_invstd=saved[1]
    )


IN_PLACE: Mapping[str, Callable[..., Any]] = {
    "aten.native_batch_norm": _norm,
    "aten.relu": torch.relu_,
}
"""Operations in the memory of their first input, by name."""


def overwriting(program: Program) -> frozenset[int]:
    """Indices of the operations that alone read the whole memory of their first input."""
    reads: Counter[int] = Counter()
    values: dict[int, set[int]] = {}
    maker: dict[int, Op] = {}
    for op in program.ops:
        reads.update({value.storage for value in op.inputs()})
        for value in (*op.inputs(), *op.outputs()):
            values.setdefault(value.storage, set()).add(value.id)
        for value in op.outputs():
            maker.setdefault(value.id, op)
    reads.update({value.storage for value in values_of(program.outputs)})

    def alone(op: Op) -> bool:
        x = op.args[0]
        made = x.id in maker and maker[x.id].name in FRESH
        return made and reads[x.storage] == 1 and len(values[x.storage]) == 1

    return frozenset(
        op.index
        for op in program.ops
        if op.name in IN_PLACE and not (op.name == "aten.native_batch_norm" and op.args[5])
        if not op.kwargs and alone(op)
    )
