"""The order in which a program's operations run where some should come before their turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thinet.calibrate.layers import Layer
from thinet.trace.program import Program


def in_order(
    program: Program, needs: Sequence[set[int]], first: Mapping[int, Sequence[int]]
) -> list[int]:
    """All operations as recorded, but before each one those named for it, where that is possible.

    Args:
        needs: of each operation, those that must have run (`trace.interpret.dependencies`).
        first: operation to others that should have run before it; one that needs it, or something
            that waits for it, keeps its place.
    """
    done: set[int] = set()
    waiting: set[int] = set()
    order: list[int] = []

    def visit(index: int) -> None:
        if index in done:
            return
        for need in sorted(needs[index]):
            visit(need)
        waiting.add(index)
        for source in first.get(index, ()):
            if source not in done and not any(behind(needs, source, w) for w in waiting):
                visit(source)
        waiting.remove(index)
        if index not in done:
            done.add(index)
            order.append(index)

    for op in program.ops:
        visit(op.index)
    return order


def behind(needs: Sequence[set[int]], later: int, earlier: int) -> bool:
    """Whether one operation needs another to have run."""
    pending, met = [later], set[int]()
    while pending:
        index = pending.pop()
        if index == earlier:
            return True
        fresh = {n for n in needs[index] if n >= earlier} - met
        met |= fresh
        pending.extend(fresh)
    return False


def shortcut_source(program: Program, layer: Layer) -> int | None:
    """The operation after which a layer's shortcut is as it will be added, if it has one."""
    if layer.shortcut is None or layer.add is None:
        return None
    storage = layer.shortcut.storage
    writers = (
        op.index
        for op in program.ops[: layer.add]
        if any(value.storage == storage for value in op.outputs())
    )
    return max(writers, default=layer.op)
