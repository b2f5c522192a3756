"""A forward pass written down: values, operations, and the program that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from thinet.trace.decisions import Decision


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A tensor of the program. Values of one `storage` are views of the same memory."""

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int

    def __repr__(self) -> str:
        return f"%{self.id}{list(self.shape)}"


@dataclass(slots=True)
class Leaves:
    """What a nest of arguments holds, in order: values, numbers, and settings of other kinds.

    `hidden` are numbers that the forward code has put into tensors, where no operation shows them.
    """

    values: list[Value] = field(default_factory=list)
    numbers: list[complex] = field(default_factory=list)
    settings: list[Any] = field(default_factory=list)
    hidden: tuple[complex, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One aten operation; tensors among its arguments and results are `Value`s.

    Attributes:
        name: such as `aten.convolution`, without the overload.
        args, kwargs: the arguments, tensors replaced by values.
        result: what it returned, likewise.
        module: path of the module that runs it.
        leaves: all that is in the arguments, in order.
        made: the values in the result.
    """

    index: int
    func: torch._ops.OpOverload
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    module: str
    leaves: Leaves = field(repr=False)
    made: list[Value] = field(repr=False)

    @property
    def where(self) -> str:
        """For messages: the operation and the module that runs it."""
        return f"{self.name} in {self.module or 'the model itself'}"

    def inputs(self) -> list[Value]:
        return self.leaves.values

    def outputs(self) -> list[Value]:
        return self.made

    @property
    def numbers(self) -> list[complex]:
        """The numbers among the arguments, in order."""
        return self.leaves.numbers


@dataclass(frozen=True, eq=False)
class Loop:
    """Operations `start` to `stop` (not itself) are PyTorch's own loop over time steps.

    `settings` are those of its arguments that are no tensors.
    """

    start: int
    stop: int
    settings: tuple[Any, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """Every operation of one forward pass, in order.

    Attributes:
        inputs: the example inputs' arguments, tensors replaced by values (args, kwargs).
        outputs: what the model returned, tensors replaced by values.
        parameters: by its id, the value of each parameter and buffer.
        names: by value id, the first dotted name of each.
        constants: value id to a tensor that is none of these (made in the model's constructor).
        called: for each module call, its path and the values it returned.
        on_meta: whether it was recorded without computing anything.
        training: whether it was recorded in training mode.
        decisions: what was decided by data, where it was not on meta.
        loops: by the number of its first operation, each of PyTorch's own loops.
    """

    ops: tuple[Op, ...]
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: Any
    parameters: Mapping[int, Value]
    names: Mapping[int, str]
    constants: Mapping[int, torch.Tensor]
    called: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    on_meta: bool = True
    training: bool = False
    decisions: tuple[Decision, ...] = field(default=(), repr=False)
    loops: Mapping[int, Loop] = field(default_factory=dict, repr=False)

    @cached_property
    def by_module(self) -> Mapping[str, Sequence[Op]]:
        """The operations that each module itself runs, by its path."""
        found: dict[str, list[Op]] = {}
        for op in self.ops:
            found.setdefault(op.module, []).append(op)
        return found

    @property
    def unused(self) -> list[str]:
        """Parameters and buffers that no operation reads."""
        read = {value.id for op in self.ops for value in op.inputs()}
        return [name for value_id, name in self.names.items() if value_id not in read]


def values_of(tree: Any) -> list[Value]:
    """The values in a nest of arguments, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Value)]


def plain(tree: Any) -> Any:
    """Outputs as tuples, lists and dicts, whatever classes the model wraps them in."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(plain(value) for value in tree)
    if hasattr(tree, "__dataclass_fields__"):
        return {key: plain(getattr(tree, key)) for key in tree.__dataclass_fields__}
    return tree
