"""What models return, read as logits: plain tensors, tuples, and outputs with named fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from thinet.errors import DataError, ModelError
from thinet.logits import find_logits
from thinet.observe import running


def output_of(model: nn.Module, images: torch.Tensor, where: str) -> Any:
    """What the model returns.

    Raises:
        ModelError: it does not run on these images.
    """
    shape = tuple(images.shape)
    with running(
        ModelError, f"{where}: {type(model).__name__} does not run on images of shape {shape}"
    ):
        return model(images)


def logits_of(output: Any) -> torch.Tensor:
    """The logits (images, classes) in what a model returned.

    A tensor is taken as it is; of an output with a field `logits` that field; of a tuple the first.

    Raises:
        ModelError: none of these is a float tensor of two dimensions.
    """
    found = find_logits(output)
    if found is None:
        raise ModelError(
            f"the model returned {_kind(output)}; logits are needed: a tensor (images, classes), a "
            "tuple that begins with one, or an output with a field `logits`"
        )
    if found.ndim != 2 or not found.is_floating_point():
        raise ModelError(
            f"the model returned {found.dtype} of shape {tuple(found.shape)}; logits of shape "
            "(images, classes) are needed"
        )
    return found


def auxiliary_of(output: Any, logits: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Weights and logits of the auxiliary classifiers of a model in training mode.

    The fields of the output whose names begin with `aux` and that are shaped as its `logits`:
    weight 0.3 each where there are two (GoogLeNet, Szegedy et al. 2015, section 5), 0.4 for one
    (Inception v3, as in torchvision).
    """
    names = output._fields if hasattr(output, "_fields") else getattr(output, "__dict__", {})
    heads = [getattr(output, name) for name in names if name.startswith("aux")]
    heads = [h for h in heads if isinstance(h, torch.Tensor) and h.shape == logits.shape]
    return [(0.3 if len(heads) > 1 else 0.4, head) for head in heads]


def check_targets(targets: torch.Tensor, classes: int, images: int, where: str) -> None:
    """Labels that are whole numbers in range(classes), one an image, or a `DataError`."""
    if targets.ndim != 1 or len(targets) != images or targets.is_floating_point():
        raise DataError(
            f"{where}: labels of shape {tuple(targets.shape)} and {targets.dtype} for {images} "
            "images; one whole number an image is needed"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{where}: label {low if low < 0 else high} is out of range; the model has {classes} "
            f"classes, so labels are 0 .. {classes - 1}"
        )


def _kind(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(map(repr, output)) or 'nothing'}"
    return f"an object of type {type(output).__name__}"
