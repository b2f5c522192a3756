"""Run a program on real tensors, one operation at a time over several batches at once.

Running the operations and not the module lets the library look at any of them, bring forward what a
later one needs, and change a weight before it is used, all in one forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from thinet.errors import CalibrationError, TraceError
from thinet.observe import plain_attention, preserved_rng
from thinet.store import Store
from thinet.surgery.apply import named_tensors
from thinet.trace.aligned import aligned
from thinet.trace.environment import Environment
from thinet.trace.in_place import IN_PLACE, overwriting
from thinet.trace.program import Op, Program, Value, values_of
from thinet.trace.record import StoppedError, describe, record, record_replica
from thinet.trace.replica import real_replica
from thinet.types import ExampleInputs, as_call

Observer = Callable[[Op, Sequence[Environment]], None]


class Execution:
    """Programs of one model, recorded once for each shape of batch.

    Attributes:
        tensors: the model's parameters and buffers by name; a repair replaces entries.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.tensors: dict[str, torch.Tensor] = {
            name: tensor.detach() for name, tensor in named_tensors(model)
        }
        self._programs: dict[tuple[tuple[int, ...], ...], Program] = {}
        self._over: dict[int, frozenset[int]] = {}

    def over(self, program: Program) -> frozenset[int]:
        """Operations of one of these programs that may write over their first input."""
        if id(program) not in self._over:
            self._over[id(program)] = overwriting(program)
        return self._over[id(program)]

    def program(self, inputs: ExampleInputs) -> Program:
        """The program for inputs of this shape.

        Raises:
            CalibrationError: the model does not run on inputs of this shape, or runs other
                operations on them.
        """
        key = tuple(
            tuple(x.shape) for x in tree_flatten(as_call(inputs))[0] if isinstance(x, torch.Tensor)
        )
        if key not in self._programs:
            program = self._recorded(inputs)
            first = next(iter(self._programs.values()), program)
            if [op.func for op in first.ops] != [op.func for op in program.ops]:
                program = aligned(program, first)
            if program is None:
                raise CalibrationError(
                    f"a calibration batch ({describe(inputs)}) takes another way through the "
                    "model than the first batch; calibrate with batches of one size"
                )
            self._programs[key] = program
        return self._programs[key]

    def _recorded(self, inputs: ExampleInputs) -> Program:
        try:
            program = record(self._model, inputs)
            if any(tensor.is_meta for tensor in program.constants.values()):
                # Tensors made in forward code have their numbers only where it really runs.
                with preserved_rng():
                    program = record_replica(*real_replica(self._model, inputs))
        except (TraceError, StoppedError) as error:
            raise CalibrationError(
                f"{type(self._model).__name__} does not run on a calibration batch "
                f"({describe(inputs)}): {error.__cause__ or error}; give batches like the example "
                "inputs: tensors, (inputs, target) pairs or dicts of keyword inputs"
            ) from error
        return program

    def run(
        self,
        batches: Sequence[ExampleInputs],
        *,
        before: Observer | None = None,
        after: Observer | None = None,
        order: Sequence[int] | None = None,
        meet: Collection[int] | None = None,
        store: Store | None = None,
    ) -> list[Any]:
        """Move all batches forward together.

        Args:
            before: called before each operation with the tensors that it will read.
            after: called after each operation, before what is no longer needed is freed.
            order: indices of all operations in the order to run them; by default as recorded.
            meet: operations before which all batches wait for each other; from one of them to the
                next each batch goes alone, and `before` is called for these only. By default
                each operation.
            store: where the tensors of waiting batches rest.

        Returns:
            The outputs of each batch.

        Raises:
            CalibrationError: a batch does not fit the model.
        """
        with self.started(batches, store) as lane:
            indices = order if order is not None else range(len(lane.program.ops))
            for stretch in _stretches(indices, meet):
                met = meet is None or stretch[0] in meet
                lane.go(stretch, before=before if met else None, after=after)
            return lane.outputs()

    @contextmanager
    def started(
        self, batches: Sequence[ExampleInputs], store: Store | None = None
    ) -> Iterator[Lane]:
        """All batches at the start of the program, to be moved forward as one likes.

        Raises:
            CalibrationError: a batch does not fit the model.
        """
        programs = [self.program(batch) for batch in batches]
        with torch.no_grad(), preserved_rng(), plain_attention():
            torch.manual_seed(0)  # what a forward draws is the same in each run
            envs = [self._begin(p, b, store) for p, b in zip(programs, batches, strict=True)]
            yield Lane(self, programs, envs)

    def _begin(self, program: Program, batch: ExampleInputs, store: Store | None) -> Environment:
        env: dict[int, torch.Tensor] = {}
        changed, turned = _changed(program), _channels_last(program)
        for value, leaf in zip(
            tree_flatten(program.inputs)[0], tree_flatten(as_call(batch))[0], strict=True
        ):
            if isinstance(value, Value):
                leaf = leaf.detach()
                if turned and leaf.ndim == 4 and leaf.device.type == "cpu":
                    leaf = leaf.contiguous(memory_format=torch.channels_last)
                env[value.id] = leaf.clone() if value.id in changed else leaf
        device = next(iter(env.values())).device
        for value_id, tensor in program.constants.items():
            env[value_id] = tensor.to(device, copy=value_id in changed)
        for value_id in changed & program.names.keys():
            env[value_id] = self.tensors[program.names[value_id]].clone()
        return Environment(program, env, self.tensors, store)

    def compute(self, op: Op, env: dict[int, torch.Tensor], *, over: bool = False) -> None:
        """Run one operation on one batch's tensors.

        Args:
            over: it may write over its first input, which is gone then.
        """

        def real(x: Any) -> Any:
            if isinstance(x, Value):
                return env[x.id]
            if isinstance(x, torch.device) and x.type == "meta":
                return device
            return x

        device = next(iter(self.tensors.values())).device
        over = over and device.type == "cpu"
        args, kwargs = tree_map(real, (op.args, op.kwargs))
        result = _call(op, IN_PLACE[op.name] if over else op.func, args, kwargs)
        if over:
            del env[op.args[0].id]
        for value, tensor in zip(tree_flatten(op.result)[0], tree_flatten(result)[0], strict=True):
            if isinstance(value, Value):
                env[value.id] = tensor
            elif isinstance(value, (bool, int, float)) and value != tensor:
                raise CalibrationError(
                    f"{op.where} asks for a number of its input, which was {value} when the "
                    f"model was recorded and is {tensor} in this batch; calibration needs a "
                    "forward that does the same for every batch (no .item(), no bool of a tensor)"
                )


class Lane:
    """Batches on their way through a program, all at the same operation.

    Attributes:
        program: that of the first batch.
        envs: the tensors of each batch that are still needed.
        done: indices of the operations that have run.
    """

    def __init__(
        self, execution: Execution, programs: Sequence[Program], envs: Sequence[Environment]
    ) -> None:
        self.program, self.envs = programs[0], envs
        self.done: set[int] = set()
        self._execution, self._programs = execution, programs
        self._uses = [_uses(program) for program in programs]
        self._over = [execution.over(program) for program in programs]

    def step(
        self, index: int, *, before: Observer | None = None, after: Observer | None = None
    ) -> None:
        """Run one operation in all batches and free what no later one reads."""
        self.go([index], before=before, after=after)

    def go(
        self,
        indices: Sequence[int],
        *,
        before: Observer | None = None,
        after: Observer | None = None,
    ) -> None:
        """Run a stretch of operations batch by batch and free what no later one reads.

        Args:
            before: called once, before the first operation.
            after: called once; what the stretch has read is freed then, if it was not written
                over (see `overwriting`).
        """
        if before is not None:
            before(self.program.ops[indices[0]], self.envs)
        batches = zip(self._programs, self.envs, self._uses, self._over, strict=True)
        for program, env, left, over in batches:
            ops = [program.ops[index] for index in indices]
            env.wake(ops)
            for op in ops:
                self._execution.compute(op, env, over=op.index in over)
                if after is None:
                    _free(op, env, left)
            env.rest()
        if after is not None:
            after(self.program.ops[indices[-1]], self.envs)
            for program, env, left in zip(self._programs, self.envs, self._uses, strict=True):
                env.wake([program.ops[index] for index in indices])
                for index in indices:
                    _free(program.ops[index], env, left)
                env.rest()
        self.done.update(indices)

    def try_ops(
        self, number: int, indices: Sequence[int], given: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """What some operations would make of one batch; nothing of it is kept.

        Args:
            number: the batch.
            indices: operations in order; what they read has been made, by them or before.
            given: tensors that stand in for others, by value id.
        """
        env = _Tried(given, self.envs[number])
        for index in indices:
            self._execution.compute(self._programs[number].ops[index], env)
        return env

    def outputs(self) -> list[Any]:
        """What the model returns for each batch, once all has run."""
        return [
            tree_map(lambda x, env=env: env[x.id] if isinstance(x, Value) else x, p.outputs)
            for p, env in zip(self._programs, self.envs, strict=True)
        ]


class _Tried(dict[int, torch.Tensor]):
    """Tensors that are tried on top of a batch's own."""

    def __init__(self, given: Mapping[int, torch.Tensor], below: Environment) -> None:
        super().__init__(given)
        self._below = below

    def __missing__(self, key: int) -> torch.Tensor:
        return self._below[key]


def _call(op: Op, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        # Strides differ from those of the recording where a kernel chose another memory format.
        if op.name in ("aten.view", "aten._unsafe_view"):
            return args[0].reshape(args[1])
        if (plain := _plainly_laid_out(op, (args, kwargs))) is not None:
            with suppress(RuntimeError):
                return function(*plain[0], **plain[1])
        raise CalibrationError(
            f"{op.where} cannot run on a calibration batch: {error}; give batches of the "
            "type, shape and values that the model accepts"
        ) from error


def _plainly_laid_out(op: Op, given: Any) -> Any:
    """What an operation is given, all contiguous; None if it is or if it is written into."""
    leaves = [leaf for leaf in tree_flatten(given)[0] if isinstance(leaf, torch.Tensor)]
    if storages_written(op) or all(leaf.is_contiguous() for leaf in leaves):
        return None
    return tree_map(lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x, given)


def _stretches(order: Sequence[int], meet: Collection[int] | None) -> list[list[int]]:
    """The order in pieces, each from one meeting to before the next."""
    stretches: list[list[int]] = []
    for index in order:
        if meet is None or index in meet or not stretches:
            stretches.append([])
        stretches[-1].append(index)
    return stretches


def _free(op: Op, env: Environment, left: Counter[int]) -> None:
    """Forget what no later operation reads."""
    touched = {value.id for value in op.inputs()}
    left.subtract(touched)
    for value_id in touched | {value.id for value in op.outputs()}:
        if left[value_id] <= 0:
            env.pop(value_id, None)


def _channels_last(program: Program) -> bool:
    """Whether images had better have their channels together: convolutions on a CPU are faster
    then, and a position's channels are read at once.

    Not where memory is written into of which there is a view: with other strides that may be a
    copy.
    """
    viewed: set[int] = set()
    for op in program.ops:
        if not viewed.isdisjoint(written := storages_written(op)):
            return False
        viewed |= {v.storage for v in op.outputs()} & {v.storage for v in op.inputs()} - written
    return any(op.name == "aten.convolution" for op in program.ops) and not any(
        "as_strided" in op.name for op in program.ops
    )


def _uses(program: Program) -> Counter[int]:
    """How many operations read each value; outputs are read once more."""
    uses: Counter[int] = Counter()
    for op in program.ops:
        uses.update({value.id for value in op.inputs()})
    uses.update({value.id for value in values_of(program.outputs)})
    return uses


def dependencies(program: Program) -> list[set[int]]:
    """For each operation, the earlier ones that must have run: its inputs' and its memory's.

    Where memory is written in place, everything that touches it keeps its order.
    """
    maker: dict[int, int] = {}
    written: dict[int, int] = {}
    read: dict[int, set[int]] = {}
    found: list[set[int]] = []
    for op in program.ops:
        needs = {maker[v.id] for v in op.inputs() if v.id in maker}
        storages = {v.storage for v in op.inputs()}
        needs |= {written[s] for s in storages if s in written}
        for s in storages_written(op):
            needs |= read.get(s, set())
            written[s] = op.index
            read[s] = set()
        for s in storages:
            read.setdefault(s, set()).add(op.index)
        for v in op.outputs():
            maker.setdefault(v.id, op.index)
        needs.discard(op.index)
        found.append(needs)
    return found


def storages_written(op: Op) -> set[int]:
    """Memory that an operation writes into."""
    if op.name == "aten.native_batch_norm":  # its schema does not say so
        return {v.storage for v in values_of(op.args[3:5])} if op.args[5] else set()
    if not op.func._schema.is_mutable:
        return set()
    given = dict(zip((a.name for a in op.func._schema.arguments), op.args, strict=False))
    given |= op.kwargs
    return {
        value.storage
        for argument in op.func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in values_of(given.get(argument.name))
    }


def _changed(program: Program) -> set[int]:
    """Values that were there before the first operation and whose memory some operation writes."""
    written = {storage for op in program.ops for storage in storages_written(op)}
    given = program.names.keys() | program.constants.keys()
    given |= {value.id for value in values_of(program.inputs)}
    return {
        value.id
        for op in program.ops
        for value in op.inputs()
        if value.storage in written and value.id in given
    }
