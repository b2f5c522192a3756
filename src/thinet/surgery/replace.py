"""Modules that take the place of others: one table of named builders, so that a plan can say it.

A replacement is data (`thinet.plan.Replacement`): which module goes, which builder makes the new
one, and the numbers that the builder needs. Nothing of the old module is used but its device, so
a file that holds the plan and the weights is enough to make the network again. The one exception,
`explicit`, keeps the module with all it has and only lets it state its sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from thinet.errors import CheckpointError
from thinet.observe import preserved_rng
from thinet.plan import EXPLICIT, Replacement
from thinet.surgery.explicit import explicit_class, make_explicit
from thinet.surgery.thin_conv import thin_convolution

Builder = Callable[..., nn.Module]


def identity() -> nn.Module:
    """Nothing: the input goes through."""
    return nn.Identity()


def global_average_pool() -> nn.Module:
    """(n, c, h, w) -> (n, c, 1, 1), the mean of each map."""
    return nn.AdaptiveAvgPool2d(1)


def linear(in_features: int, out_features: int) -> nn.Module:
    """(n, in_features) -> (n, out_features), random weights that are the same each time."""
    with preserved_rng():
        torch.manual_seed(0)
        return nn.Linear(in_features, out_features)


BUILDERS: Mapping[str, Builder] = {
    "identity": identity,
    "global-average-pool": global_average_pool,
    "linear": linear,
    "thin-convolution": thin_convolution,
}
"""What can take a module's place, by the name that plans use."""


def replace(model: nn.Module, replacements: Iterable[Replacement]) -> Callable[[], None]:
    """Put the new modules into the model, in place; each in the old one's mode, on its device.

    Returns:
        A function that puts the old modules back.

    Raises:
        CheckpointError: the model has no such module, or there is no such builder; nothing is
            changed then.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        for step in reversed(undo):
            step()

    for replacement in replacements:  # one may lie within what an earlier one has put there
        try:
            module = _build(model, replacement, device)
        except CheckpointError:
            put_back()
            raise
        if replacement.builder == EXPLICIT:
            undo.append(make_explicit(module))
            continue
        path, _, name = replacement.module.rpartition(".")
        parent = model.get_submodule(path)
        undo.append(partial(parent.register_module, name, parent.get_submodule(name)))
        parent.register_module(name, module)
    return put_back


def _build(model: nn.Module, replacement: Replacement, device: torch.device) -> nn.Module:
    try:
        old = model.get_submodule(replacement.module)
    except AttributeError as error:
        raise CheckpointError(
            f"the plan replaces {replacement.module!r}, a module that this {type(model).__name__} "
            "does not have; give the dense model that the plan was made for"
        ) from error
    if replacement.builder == EXPLICIT:
        if explicit_class(old) is None:
            raise CheckpointError(
                f"the plan makes the sizes of {replacement.module or 'the model itself'!r} "
                f"explicit, but it is a {type(old).__name__}, which has no such form; give the "
                "dense model that the plan was made for"
            )
        return old
    if replacement.builder not in BUILDERS or not replacement.module:
        raise CheckpointError(
            f"the plan replaces {replacement.module!r} by {replacement.builder!r}; this version of "
            f"thinet replaces parts of a model by {', '.join(BUILDERS)}"
        )
    try:
        new = BUILDERS[replacement.builder](**replacement.options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the plan replaces {replacement.module!r} by {replacement.builder!r} with "
            f"{dict(replacement.options)}, which makes no module ({error})"
        ) from error
    dtype = next((p.dtype for p in old.parameters()), None)
    return new.to(device=device, dtype=dtype).train(old.training)
