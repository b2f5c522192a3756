"""Copies of a model to trace: without data where that will do, so that no weight is copied."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from thinet.errors import TraceError
from thinet.observe import preserved_rng
from thinet.paths import named_modules
from thinet.surgery.explicit import all_explicit
from thinet.types import ExampleInputs, as_call, cloned

Call = tuple[tuple[Any, ...], dict[str, Any]]


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes and no data; the model's own are never copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        stores: list[Iterable[Any]] = [
            module._parameters.values(),
            module._buffers.values(),
            module.__dict__.values(),
        ]
        for tensor in (t for store in stores for t in store if isinstance(t, torch.Tensor)):
            if id(tensor) not in memo:
                memo[id(tensor)] = _to_meta(tensor)
    return copied(model, memo)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy`, with an error that says what could not be copied.

    Weights that are computed before each forward (torch's older weight_norm) are copied as numbers.
    What a module has worked out from its weights and keeps (the biases of an attention) is of the
    old sizes: modules that forget it when their tensors are replaced are made to forget it.
    """
    memo = {} if memo is None else memo
    for value in [v for module in model.modules() for v in vars(module).values()]:
        for tensor in _kept(value) if type(value) is dict else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        with preserved_rng():  # a module's own __deepcopy__ may draw
            new = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); thinet never changes the model it "
            "is given, so copy.deepcopy(model) must work: remove what blocks it (open files, "
            "generators, non-leaf tensors kept as attributes)"
        ) from error
    for module in new.modules():
        if type(module)._apply is not nn.Module._apply and any(
            _kept(value)
            for name, value in vars(module).items()
            if type(value) is dict and name not in _OWN
        ):
            module._apply(lambda tensor: tensor)
    return new


_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _kept(value: dict[Any, Any]) -> list[torch.Tensor]:
    return [tensor for tensor in value.values() if isinstance(tensor, torch.Tensor)]


def meta_twin(replica: nn.Module) -> nn.Module:
    """A copy of a model without data that shares its tensors; quicker than `copied`."""
    modules = list(named_modules(replica).values())
    stores = [store for m in modules for store in (m._parameters, m._buffers)]
    tensors = [tensor for store in stores for tensor in store.values() if tensor is not None]
    if not all(t.is_meta for t in tensors) or any(
        hasattr(type(m), "__deepcopy__") for m in modules
    ):
        return copied(replica)
    memo: dict[int, Any] = {id(m): type(m).__new__(type(m)) for m in modules}
    memo.update({id(tensor): tensor for tensor in tensors})
    for module in modules:
        state = memo[id(module)].__dict__
        state.update(module.__dict__)
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in SIMPLE:
                continue
            if kind in EMPTIED and not value:
                state[name] = kind()
            elif name in ("_parameters", "_buffers"):
                state[name] = kind(value)
            elif name == "_modules":
                state[name] = kind({k: m if m is None else memo[id(m)] for k, m in value.items()})
            elif kind is not tuple or not SIMPLE.issuperset(map(type, value)):
                state[name] = copy.deepcopy(value, memo)
    return memo[id(replica)]


SIMPLE = frozenset((int, float, str, bool, type(None), torch.dtype))
EMPTIED = frozenset((dict, OrderedDict, set, list))


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        # Frozen or not: torch multiplies by a frozen weight in other operations, and what a layer
        # is shall not depend on it.
        return nn.Parameter(empty, requires_grad=_can_be_trained(tensor))
    return empty


def _can_be_trained(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def meta_replica(model: nn.Module, inputs: ExampleInputs) -> tuple[nn.Module, Call]:
    """A copy of the model and of its inputs without data."""
    replica = meta_copy(model)
    all_explicit(replica)
    return replica, tree_map(
        lambda leaf: _to_meta(leaf) if isinstance(leaf, torch.Tensor) else leaf, as_call(inputs)
    )


def real_replica(model: nn.Module, inputs: ExampleInputs) -> tuple[nn.Module, Call]:
    """A full copy of the model and of its inputs."""
    replica = copied(model)
    for parameter in filter(_can_be_trained, replica.parameters()):
        parameter.requires_grad_(True)  # as in `meta_copy`
    all_explicit(replica)
    return replica, cloned(as_call(inputs))
