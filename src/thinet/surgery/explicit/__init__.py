"""Modules that state their sizes, in place of those that derive them from the residual stream.

`C // num_heads` in forward code ties the attention's inner width to the width of its input. Such a
module takes another class, with the same parameters, buffers, hooks and names, and with its sizes
as attributes. It computes the same, and its heads can be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from thinet.surgery.explicit.multihead import ExplicitMultiheadAttention
from thinet.surgery.explicit.windows import (
    ExplicitRelativeAttention,
    ExplicitShiftedWindowAttention,
)

EXPLICIT: Mapping[str, Any] = {
    "torch.nn.modules.activation.MultiheadAttention": ExplicitMultiheadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ExplicitShiftedWindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ExplicitShiftedWindowAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": ExplicitRelativeAttention,
}
"""Class by its full name to the class that takes its place. Subclasses are not touched."""


def explicit_class(module: nn.Module) -> Any:
    """The class that can take the place of this module's own, or None."""
    kind = type(module)
    return EXPLICIT.get(f"{kind.__module__}.{kind.__qualname__}")


def make_explicit(module: nn.Module) -> Callable[[], None]:
    """Let one module state its sizes, in place; returns a function that undoes it."""
    new, old, before = explicit_class(module), type(module), dict(module.__dict__)
    if new is None:
        raise ValueError(f"there is no explicit form of {old.__name__}")
    for name, value in new.sizes(module).items():
        module.__dict__[name] = value
    module.__class__ = new

    def undo() -> None:
        module.__class__ = old
        module.__dict__.clear()
        module.__dict__.update(before)

    return undo


def all_explicit(model: nn.Module) -> None:
    """Let every module of a copy state its sizes."""
    for module in model.modules():
        if explicit_class(module) is not None:
            make_explicit(module)
