"""Two layers with a path of their own between them: what one makes, the other alone mixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinet.calibrate.layers import Layer
from thinet.trace.interpret import storages_written
from thinet.trace.program import Program, values_of


@dataclass(frozen=True, eq=False)
class Pair:
    """A producer and the only layer that its outputs reach before they go on.

    Attributes:
        ops: the operations from the producer through the consumer, in order. Convolutions with
            groups may lie between.
        needs: operations that must have run before these can.
    """

    producer: Layer
    consumer: Layer
    ops: tuple[int, ...]
    needs: tuple[int, ...]


def find_pairs(
    program: Program, layers: Mapping[int, Layer], dependencies: Sequence[set[int]]
) -> dict[int, Pair]:
    """All pairs by the operation of their producer.

    Args:
        layers: of the program.
        dependencies: of its operations.
    """
    returned = {value.id for value in values_of(program.outputs)}
    ends = {i: layer for i, layer in layers.items() if layer.geometry.groups == 1}
    found: dict[int, Pair] = {}
    for producer in ends.values():
        pair = _from(producer, program, ends, dependencies, returned)
        if pair is not None:
            found[producer.op] = pair
    return found


def _from(
    producer: Layer,
    program: Program,
    ends: Mapping[int, Layer],
    dependencies: Sequence[set[int]],
    returned: set[int],
) -> Pair | None:
    ops = [producer.op]
    reached = {producer.y.id}
    foreign = {value.storage for value in program.ops[producer.op].inputs()}
    consumer: Layer | None = None
    for op in program.ops[producer.op + 1 :]:
        read = {value.id for value in op.inputs()} & reached
        if not read:
            continue
        foreign |= {v.storage for v in op.inputs() if v.id not in reached}
        if foreign & storages_written(op):
            return None
        end = ends.get(op.index)
        if end is None:
            ops.append(op.index)
            reached.update(value.id for value in op.outputs())
        elif consumer is not None or read != {end.x.id}:
            return None
        else:
            consumer = end
            ops.append(op.index)
    if consumer is None or reached & returned or ops[-1] != consumer.op:
        return None
    needs = sorted({n for index in ops for n in dependencies[index]} - set(ops))
    return Pair(producer, consumer, tuple(ops), tuple(needs))
