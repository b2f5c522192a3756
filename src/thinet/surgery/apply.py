"""Apply a plan to a model, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from thinet.errors import CheckpointError
from thinet.paths import named_modules
from thinet.plan import AttributeChange, Plan
from thinet.surgery.replace import replace
from thinet.types import Slice

_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has, such as the list of its tensors."""


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Replace the model's own modules and cut its tensors and attributes as the plan says.

    Raises:
        CheckpointError: the plan was made for another model; nothing is changed then.
    """
    put_back = replace(model, plan.replaced)
    try:
        _cut(model, plan)
    except CheckpointError:
        put_back()
        raise


def _cut(model: nn.Module, plan: Plan) -> None:
    named = dict(named_tensors(model))
    cut: set[tuple[str, int]] = set()
    for piece in plan.kept:
        tensor = named.get(piece.parameter)
        if tensor is None or not 0 <= piece.dim < tensor.ndim:
            raise CheckpointError(
                f"the plan cuts {piece.parameter} along dimension {piece.dim}, which this "
                f"{type(model).__name__} does not have; give the dense model that the plan was "
                "made for"
            )
        if piece.indices and max(piece.indices) >= tensor.shape[piece.dim]:
            raise CheckpointError(
                f"the plan keeps index {max(piece.indices)} of {piece.parameter} along dimension "
                f"{piece.dim}, but it has only {tensor.shape[piece.dim]}; give the dense model "
                "that the plan was made for, uncut"
            )
        if (piece.parameter, piece.dim) in cut:
            raise CheckpointError(
                f"the plan cuts {piece.parameter} along dimension {piece.dim} twice, which no "
                "plan of thinet does; do not use this file"
            )
        cut.add((piece.parameter, piece.dim))
    modules = named_modules(model)
    for change in plan.attributes:
        module = _module(model, modules, change.module)
        if module is None:
            raise CheckpointError(
                f"the plan sets {change.attribute} of {change.module}, a module that this "
                f"{type(model).__name__} does not have"
            )
        kind = type(module)
        parts = (module._parameters, module._buffers, module._modules)
        if (
            change.attribute.startswith("__")
            or change.attribute in _OWN
            or callable(getattr(kind, change.attribute, None))
            or any(change.attribute in part for part in parts)
        ):
            raise CheckpointError(
                f"the plan sets {change.attribute} of {change.module or 'the model'}, which no "
                "plan of thinet does; do not use this file"
            )
    install(model, {id(named[name]): new for name, new in sliced(named, plan.kept).items()})
    set_attributes(model, plan.attributes)


def install(model: nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put new tensors in the places of old ones, which are named by their `id`; ties stay."""
    for module in named_modules(model).values():
        for store in cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers)):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in new:
                    store[name] = new[id(tensor)]


def allocate(model: nn.Module) -> None:
    """Give tensors without data memory on the CPU, each one once, so that tied ones stay tied.

    `nn.Module.to_empty` makes a new parameter in each place that holds one.
    """
    empty = [tensor for _, tensor in named_tensors(model) if tensor.is_meta]
    if not empty:
        return
    install(model, {id(old): _like(old, torch.empty_like(old, device="cpu")) for old in empty})
    for module in named_modules(model).values():
        if type(module)._apply is not nn.Module._apply:
            # such modules keep lists of their tensors, and make them anew in `_apply`
            module._apply(lambda tensor: tensor)


def named_tensors(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and buffers with dotted names; a tied tensor once, by its first name."""
    seen: set[int] = set()
    modules = list(named_modules(model).items())
    for stores in ([m._parameters for _, m in modules], [m._buffers for _, m in modules]):
        for (path, _), store in zip(modules, stores, strict=True):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{path}.{name}" if path else name, tensor


def sliced(named: dict[str, torch.Tensor], kept: Iterable[Slice]) -> dict[str, torch.Tensor]:
    """New tensors, each with what its slices keep, of the same kind as the old."""
    cuts: dict[str, list[Slice]] = {}
    for piece in kept:
        cuts.setdefault(piece.parameter, []).append(piece)
    return {name: _sliced(named[name], pieces) for name, pieces in cuts.items()}


def _sliced(old: torch.Tensor, pieces: Iterable[Slice]) -> torch.Tensor:
    if old.is_meta:
        sizes = {piece.dim: len(piece.indices) for piece in pieces}
        return resized(old, [sizes.get(dim, size) for dim, size in enumerate(old.shape)])
    new = old.detach()
    for piece in pieces:
        index = torch.tensor(piece.indices, dtype=torch.long, device=old.device)
        new = new.index_select(piece.dim, index)
    return _like(old, new.contiguous(memory_format=memory_format(old)))


def resized(old: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor without data like another without data, of another shape."""
    form = memory_format(old)
    return _like(old, torch.empty(shape, dtype=old.dtype, device="meta", memory_format=form))


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new.requires_grad_(old.requires_grad)


def memory_format(tensor: torch.Tensor) -> torch.memory_format:
    """The order of a tensor's dimensions in memory, as `contiguous` takes it."""
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def set_attributes(model: nn.Module, changes: Iterable[AttributeChange]) -> None:
    modules = named_modules(model)
    for change in changes:
        module, value = _module(model, modules, change.module), change.value
        assert module is not None, change
        old = getattr(module, change.attribute, None)
        if isinstance(old, list) and isinstance(value, tuple):
            setattr(module, change.attribute, list(value))
        else:
            setattr(module, change.attribute, value)


def _module(model: nn.Module, named: Mapping[str, nn.Module], path: str) -> nn.Module | None:
    """A module by any of its paths, of which `named` has the first."""
    if path in named:
        return named[path]
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
