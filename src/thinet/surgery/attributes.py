"""Module attributes that must follow the shapes of the parameters: one table, type to rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from thinet.paths import named_modules
from thinet.plan import AttributeChange

Shape = tuple[int, ...]
Attributes = dict[str, int | tuple[int, ...]]
Rule = Callable[[nn.Module, Mapping[str, Shape], bool], Attributes]
"""(module, new shapes of its own parameters, whole groups go) to new attribute values."""


def conv(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    assert isinstance(module, _ConvNd)
    out, per_group = shapes["weight"][:2]
    groups = module.groups
    if whole:
        groups = out * groups // module.out_channels
    return {"out_channels": out, "in_channels": per_group * groups, "groups": groups}


def conv_transpose(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    assert isinstance(module, _ConvTransposeNd)
    ins, per_group = shapes["weight"][:2]
    groups = module.groups
    if whole:
        groups = ins * groups // module.in_channels
    return {"in_channels": ins, "out_channels": per_group * groups, "groups": groups}


def linear(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]}


def norm(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    return {"num_features": next(iter(shapes.values()))[0]}


def layer_norm(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    return {"normalized_shape": shapes["weight"]}


def group_norm(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    assert isinstance(module, nn.GroupNorm)
    channels = shapes["weight"][0]
    groups = module.num_groups * channels // module.num_channels if whole else module.num_groups
    return {"num_channels": channels, "num_groups": groups}


def transposed_linear(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    """GPT-2's `Conv1D`: (in, out)."""
    return {"nx": shapes["weight"][0], "nf": shapes["weight"][1]}


def embedding(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    return {"embedding_dim": shapes["weight"][1]}


def cell(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}


def prelu(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    return {"num_parameters": shapes["weight"][0]}


def bilinear(module: nn.Module, shapes: Mapping[str, Shape], whole: bool) -> Attributes:
    out, first, second = shapes["weight"]
    return {"out_features": out, "in1_features": first, "in2_features": second}


TABLE: tuple[tuple[type[nn.Module] | str, Rule], ...] = (
    (_ConvTransposeNd, conv_transpose),
    (_ConvNd, conv),
    (nn.Linear, linear),
    ("transformers.pytorch_utils.Conv1D", transposed_linear),
    (_NormBase, norm),
    (nn.LayerNorm, layer_norm),
    (nn.RMSNorm, layer_norm),
    (nn.GroupNorm, group_norm),
    (nn.Embedding, embedding),
    (nn.EmbeddingBag, embedding),
    (nn.RNNCellBase, cell),
    (nn.PReLU, prelu),
    (nn.Bilinear, bilinear),
)
"""Classes, or full names of classes of packages that need not be installed."""


def rule_for(module: nn.Module) -> Rule | None:
    return _rule(type(module))


@cache
def _rule(kind: type[nn.Module]) -> Rule | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    return next(
        (rule for k, rule in TABLE if (k == name if isinstance(k, str) else issubclass(kind, k))),
        None,
    )


def _computed_from(module: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensor that a computed weight has its shape from, under the name of the weight.

    Parametrizations keep it in a module of their own, torch's older `weight_norm` and
    `spectral_norm` in the layer, as `weight_v` and `weight_orig`.
    """
    if hasattr(module, "parametrizations"):
        stored = [*module.get_submodule("parametrizations.weight").parameters()]
    else:
        stored = [own[name] for name in ("weight_orig", "weight_v") if name in own][:1]
    # The largest: a norm beside it may have as many dimensions.
    return {"weight": max(stored, key=lambda p: (p.ndim, p.numel()))} if stored else {}


def attribute_changes(
    model: nn.Module, shapes: Mapping[str, Shape], whole: frozenset[str]
) -> tuple[AttributeChange, ...]:
    """The attributes that differ once the parameters have their new shapes.

    Args:
        shapes: the new shape of every parameter or buffer that is cut, by its first name.
        whole: paths of modules that lose whole groups and not an index of every group.
    """
    from thinet.surgery.apply import named_tensors

    first_name = {id(tensor): name for name, tensor in named_tensors(model)}
    cut = {key for key, name in first_name.items() if name in shapes}
    changes: list[AttributeChange] = []
    for path, module in named_modules(model).items():
        rule = rule_for(module)
        if rule is None:
            continue
        own = {
            name: tensor
            for store in (module._parameters, module._buffers)
            for name, tensor in store.items()
            if tensor is not None and tensor.ndim > 0
        }
        if "weight" not in own:
            own |= _computed_from(module, own)
        if cut.isdisjoint(id(tensor) for tensor in own.values()):
            continue
        names = {name: first_name[id(tensor)] for name, tensor in own.items()}
        new = {name: shapes.get(names[name], tuple(own[name].shape)) for name in own}
        for attribute, value in rule(module, new, path in whole).items():
            if getattr(module, attribute) != value:
                changes.append(AttributeChange(path, attribute, value))
    return tuple(changes)
