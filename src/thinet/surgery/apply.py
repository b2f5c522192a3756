"""Apply a plan to a model, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from thinet.errors import CheckpointError
from thinet.paths import named_modules
from thinet.plan import AttributeChange, Plan
from thinet.surgery.replace import replace
from thinet.types import Slice


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
    for piece in plan.kept:
        tensor = named.get(piece.parameter)
        if tensor is None or piece.dim >= tensor.ndim:
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
    for change in plan.attributes:
        if not _has_module(model, change.module):
            raise CheckpointError(
                f"the plan sets {change.attribute} of {change.module}, a module that this "
                f"{type(model).__name__} does not have"
            )
        kind = type(model.get_submodule(change.module))
        if change.attribute.startswith("__") or callable(getattr(kind, change.attribute, None)):
            raise CheckpointError(
                f"the plan sets {change.attribute} of {change.module or 'the model'}, which no "
                "plan of thinet does; do not use this file"
            )
    replaced = {id(named[name]): new for name, new in sliced(named, plan.kept).items()}
    for module in named_modules(model).values():
        for store in cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers)):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in replaced:
                    store[name] = replaced[id(tensor)]
    set_attributes(model, plan.attributes)


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
    made: dict[str, torch.Tensor] = {}
    for name, pieces in cuts.items():
        old = named[name]
        new = old.detach()
        for piece in pieces:
            index = _index(piece, old.device)
            new = new.index_select(piece.dim, index)
        new = new.contiguous(memory_format=_memory_format(old))
        if isinstance(old, nn.Parameter):
            made[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            made[name] = new.requires_grad_(old.requires_grad)
    return made


def _index(piece: Slice, device: torch.device) -> torch.Tensor:
    if device.type == "meta":
        return torch.empty(len(piece.indices), dtype=torch.long, device=device)
    return torch.tensor(piece.indices, dtype=torch.long, device=device)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    if tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if tensor.ndim == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def set_attributes(model: nn.Module, changes: Iterable[AttributeChange]) -> None:
    for change in changes:
        module, value = model.get_submodule(change.module), change.value
        old = getattr(module, change.attribute, None)
        if isinstance(old, list) and isinstance(value, tuple):
            setattr(module, change.attribute, list(value))
        else:
            setattr(module, change.attribute, value)


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
