"""A program for a batch of another size, brought into the steps of the first one.

What torch runs for a reshape depends on strides: a tensor that lies in one piece is viewed, another
is copied and then viewed, and with a single image many lie in one piece that otherwise do not (a
linear layer on the positions of a map). All batches move through one sequence of operations, so
such a copy is put in or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils._pytree import tree_flatten, tree_map

from thinet.trace.program import Leaves, Op, Program, Value

COPY, COPIED, VIEW = "aten.clone", "aten._unsafe_view", "aten.view"


def aligned(program: Program, first: Program) -> Program | None:
    """The program with the operations and value numbers of the first; None if it is another."""
    if program.loops or first.loops:
        return None
    names = {name: value_id for value_id, name in first.names.items()}
    known = {value_id: names[name] for value_id, name in program.names.items() if name in names}
    storages = {v.id: v.storage for op in first.ops for v in (*op.inputs(), *op.outputs())}
    steps = _steps(program.ops, first.ops)
    if steps is None:
        return None
    for op, like in steps:
        ours, theirs = _values(op), _values(like)
        if len(ours) != len(theirs):
            return None
        for value, other in zip(ours, theirs, strict=True):
            if known.setdefault(value.id, other.id) != other.id:
                return None

    def renamed(x: Any) -> Any:
        if not isinstance(x, Value) or x.id not in known:
            return x
        return Value(known[x.id], x.shape, x.dtype, storages.get(known[x.id], x.storage))

    ops = tuple(
        replace(
            op,
            index=like.index,
            args=tree_map(renamed, op.args),
            kwargs=tree_map(renamed, op.kwargs),
            result=tree_map(renamed, op.result),
            leaves=replace(op.leaves, values=[renamed(v) for v in op.leaves.values]),
            made=[renamed(v) for v in op.made],
        )
        for op, like in steps
    )
    return replace(
        program,
        ops=ops,
        inputs=tree_map(renamed, program.inputs),
        outputs=tree_map(renamed, program.outputs),
        parameters={key: renamed(value) for key, value in program.parameters.items()},
        names={known.get(value_id, value_id): name for value_id, name in program.names.items()},
        constants={known.get(i, i): tensor for i, tensor in program.constants.items()},
        called=tuple((path, tree_map(renamed, made)) for path, made in program.called),
        taken=tuple(renamed(value) for value in program.taken),
    )


def _steps(ours: Sequence[Op], theirs: Sequence[Op]) -> list[tuple[Op, Op]] | None:
    """Our operations, each beside the one of theirs whose place it takes; None if that fails."""
    steps: list[tuple[Op, Op]] = []
    left, at = iter(ours), 0
    for op in left:
        like = theirs[at : at + 2]
        if like and op.func is like[0].func:
            steps.append((op, like[0]))
            at += 1
        elif [o.name for o in like] == [COPY, COPIED] and op.name == VIEW:
            steps.extend(zip(_with_a_copy(op, *like), like, strict=True))
            at += 2
        elif like and like[0].name == VIEW and op.name == COPY:
            after = next(left, None)
            if after is None or after.name != COPIED or after.args[0] is not op.result:
                return None
            steps.append((_without_a_copy(op, after, like[0]), like[0]))
            at += 1
        else:
            return None
    return steps if at == len(theirs) else None


def _with_a_copy(view: Op, copy: Op, copied: Op) -> tuple[Op, Op]:
    """A view as a copy and a view of that, as others have it."""
    given = view.args[0]
    between = Value(-1 - view.index, given.shape, given.dtype, -1 - view.index)
    return (
        replace(
            copy, args=(given, *copy.args[1:]), result=between,
            leaves=replace(copy.leaves, values=[given]), made=[between],
        ),
        replace(
            copied, args=(between, view.args[1]), result=view.result,
            leaves=Leaves([between], view.leaves.numbers, copied.leaves.settings), made=view.made,
        ),
    )  # fmt: skip


def _without_a_copy(copy: Op, copied: Op, view: Op) -> Op:
    """A copy and its view as a view alone; it is a copy yet where it must be one."""
    given = copy.args[0]
    return replace(
        view, args=(given, copied.args[1]), result=copied.result,
        leaves=Leaves([given], copied.leaves.numbers, view.leaves.settings), made=copied.made,
    )  # fmt: skip


def _values(op: Op) -> list[Value]:
    return [*op.inputs(), *(v for v in tree_flatten(op.result)[0] if isinstance(v, Value))]
