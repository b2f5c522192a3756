"""The frozen data that the rest of the library passes around."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from thinet.errors import IndicesError

ExampleInputs = torch.Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor, a tuple of positional inputs or a dict of keyword inputs."""

Role = Literal["produces", "consumes", "follows"]


def as_call(inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which to call the model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """All tensors in a nest of tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def cloned(tree: Any) -> Any:
    """The same nest with clones of its tensors, for forward code that may work in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def call(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Run the model on example inputs of any of the accepted forms."""
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


@dataclass(frozen=True)
class Slice:
    """Entries of one parameter or buffer along one dimension."""

    parameter: str
    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """One dimension of a parameter or buffer that carries channels of a group.

    `units[i]` is the unit of the group that index `i` belongs to, -1 where it is not of the group.
    """

    parameter: str
    dim: int
    role: Role
    units: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """A place where a module mixes channels of a group: the layer i+1 of ThiNet.

    `op` is the index of the operation in the traced program. `units[c]` is the unit of the group
    that input channel `c` of the operation belongs to, -1 where it is not of the group.
    """

    op: int
    module: str
    parameter: str | None
    units: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several tensors that can only be removed together, unit by unit.

    Attributes:
        name: dotted name of the first producer, unique in the model.
        channels: number of units that can go one by one.
        locked: None, or why nothing here may be cut (operation and module path).
        producers: dotted names of the modules whose filters make these channels.
        consumers: dotted names of the modules that mix these channels.
        members: all dimensions of parameters and buffers that carry these channels.
        sites: the operations behind `consumers`.
        normalised_over: None, or the normalisation that mixes these channels' statistics, so that
            removing one changes the others.
    """

    name: str
    channels: int
    locked: str | None
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    members: tuple[Member, ...]
    sites: tuple[Site, ...] = ()
    normalised_over: str | None = None

    def slices(self, channels: Iterable[int]) -> tuple[Slice, ...]:
        """What `cut` takes away with these units.

        Args:
            channels: unit indices in `range(self.channels)`, each at most once.

        Returns:
            One `Slice` for each parameter dimension that loses entries.

        Raises:
            IndicesError: an index is repeated or out of range.
        """
        chosen = set(check_indices(self, channels, empty=True))
        found = []
        for member in self.members:
            indices = tuple(i for i, unit in enumerate(member.units) if unit in chosen)
            if indices:
                found.append(Slice(member.parameter, member.dim, indices))
        return tuple(found)


def check_indices(group: ChannelGroup, indices: Iterable[int], *, empty: bool = False) -> list[int]:
    """The indices as sorted plain ints, or an `IndicesError` that names the group."""
    where = f"group {group.name!r} ({group.channels} channels)"
    if isinstance(indices, torch.Tensor):
        indices = indices.tolist()
    try:
        indices = list(indices)
        plain = [int(i) for i in indices]
    except (TypeError, ValueError, OverflowError) as error:
        raise IndicesError(f"{where}: indices must be integers, got {indices!r}") from error
    kinds = (bool, np.bool_)
    if any(isinstance(i, kinds) or p != i for i, p in zip(indices, plain, strict=True)):
        raise IndicesError(f"{where}: indices must be integers, got {indices!r}")
    if not plain and not empty:
        raise IndicesError(f"{where}: no index given; keep at least one channel")
    bad = [i for i in plain if not 0 <= i < group.channels]
    if bad:
        raise IndicesError(f"{where}: index {bad[0]} is out of range 0..{group.channels - 1}")
    if len(set(plain)) != len(plain):
        twice = next(i for i in plain if plain.count(i) > 1)
        raise IndicesError(f"{where}: index {twice} is given more than once")
    return sorted(plain)


@dataclass(frozen=True)
class ModuleCount:
    """Cost of one module, its children not included. One multiply-add is one MAC."""

    macs: int
    params: int


@dataclass(frozen=True)
class Counts:
    """Cost of a model on one example input.

    `macs` counts one multiply-add as one; biases, norms, activations and pooling are not counted.
    `params` counts the elements of all parameters once, tied ones included once.
    """

    macs: int
    params: int
    by_module: Mapping[str, ModuleCount]


Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""
