"""A forward pass written down: values, operations, and the program that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
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
        taken: values whose numbers the forward code takes out as an array or a list.
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
    taken: tuple[Value, ...] = ()

    @property
    def leaving(self) -> list[Value]:
        """The values that others than operations see: outputs, and those taken out as numbers."""
        return [*values_of(self.outputs), *self.taken]

    @cached_property
    def unseen(self) -> str | None:
        """Why some outputs may not be among the values, if so."""
        leaves = tree_flatten(self.outputs)[0]
        for leaf in leaves:
            of_objects = isinstance(leaf, np.ndarray) and leaf.dtype.hasobject
            if of_objects or not isinstance(leaf, (Value, *BARE)):
                return (
                    f"the model returns an object of class {type(leaf).__name__}, into which "
                    "tracing cannot look; return tensors in tuples, lists, dicts or plain objects"
                )
        arrays = self.taken and any(isinstance(leaf, np.ndarray) for leaf in leaves)
        if not arrays and not values_of(self.outputs):
            return (
                "the model returns no tensor on the example inputs, so tracing cannot see what "
                "must stay; return its outputs as tensors"
            )
        return None

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


BARE = (
    *(int, float, complex, str, bytes, type(None), type, np.generic, np.ndarray),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""What outputs may hold beside tensors; arrays are made of what is taken out of them."""


FED_BACK = ("transformers.cache_utils", "Cache")
"""The class, by module and name, of what a language model returns for its own next step."""


def plain(tree: Any, _seen: dict[int, Any] | None = None) -> Any:
    """Outputs as tuples and dicts, whatever classes the model wraps them in.

    Objects become dicts of their attributes; those met before become None, and so does a cache of
    keys and values, which goes back into the model and has its sizes from there.
    """
    seen = {} if _seen is None else _seen
    if any((base.__module__, base.__name__) == FED_BACK for base in type(tree).__mro__):
        return None
    if isinstance(tree, Mapping):
        more = {k: v for k, v in _attributes(tree).items() if tree.get(k) is not v}
        both = [*tree.items(), *((f".{name}", value) for name, value in more.items())]
        return {key: plain(value, seen) for key, value in both}
    if isinstance(tree, (tuple, list)):
        return tuple(plain(value, seen) for value in (*tree, *_attributes(tree).values()))
    if isinstance(tree, (torch.Tensor, Value, *BARE)) or not _is_open(type(tree)):
        return tree
    if id(tree) in seen:
        return None
    seen[id(tree)] = tree  # so that its id stays its own
    return {name: plain(value, seen) for name, value in _attributes(tree).items()}


def _attributes(thing: object) -> dict[str, Any]:
    """What an object holds in its `__dict__` and its slots."""
    state: Any = object.__getstate__(thing)
    both = state if isinstance(state, tuple) else (state,)
    return {name: value for part in both if part for name, value in part.items()}


def _is_open(kind: type) -> bool:
    """Whether objects of this class hold nothing but attributes, as no iterator or function does.

    Their size tells, as it tells `copy.copy`: a word for each slot, and where they lie in the
    object itself, one for all other attributes and one for weak references.
    """
    words = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    for base in kind.__mro__:
        named = vars(base).get("__slots__", ())
        slots = (named,) if isinstance(named, str) else tuple(named)
        words += sum(not name.endswith("__") for name in slots)
    most = object.__basicsize__ + words * tuple.__itemsize__
    return kind.__basicsize__ <= most and not kind.__itemsize__
