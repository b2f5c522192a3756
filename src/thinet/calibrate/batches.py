"""Calibration data as a checked list of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_structure

from thinet.errors import CalibrationError
from thinet.types import ExampleInputs, as_call, tensors_in


def calibration_inputs(
    calibration: Iterable[Any], *, device: torch.device, like: ExampleInputs | None = None
) -> list[ExampleInputs]:
    """The inputs of all batches, on the device; targets are left out.

    Args:
        calibration: batches: tensors, (inputs, target) pairs, or dicts of keyword inputs.
        like: example inputs. Where these are several positional ones, a batch that is nested as
            they are is all inputs, and one with an entry more has its target last.

    Raises:
        CalibrationError: there is no batch, no image in one, or a value that is not finite.
    """
    return [inputs for inputs, _ in calibration_pairs(calibration, device=device, like=like)]


def calibration_pairs(
    calibration: Iterable[Any], *, device: torch.device, like: ExampleInputs | None = None
) -> list[tuple[ExampleInputs, torch.Tensor | None]]:
    """As `calibration_inputs`, each with its targets, or None where a batch has none."""
    if isinstance(calibration, torch.Tensor):
        calibration = [calibration]
    try:
        batches = list(calibration)
    except TypeError as error:
        raise CalibrationError(
            f"calibration must be an iterable of batches, got {type(calibration).__name__}"
        ) from error
    found: list[tuple[ExampleInputs, torch.Tensor | None]] = []
    for number, batch in enumerate(batches):
        inputs, target = _parted(batch, like)
        _check_settings(inputs, like, number)
        tensors = tensors_in(as_call(inputs))
        if not tensors:
            raise CalibrationError(
                f"calibration batch {number} is {type(batch).__name__} without a tensor; give "
                "tensors, (inputs, target) pairs or dicts of keyword inputs"
            )
        for tensor in tensors:
            if tensor.numel() == 0:
                raise CalibrationError(
                    f"calibration batch {number} is empty (shape {tuple(tensor.shape)})"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {number} holds NaN or infinite values; check how the "
                    "images are read and normalised"
                )
        moved = _moved(inputs, device)
        found.append((moved, target.to(device) if isinstance(target, torch.Tensor) else None))
    if not found:
        raise CalibrationError("the calibration data is empty; give at least one batch of images")
    return found


def _check_settings(inputs: Any, like: ExampleInputs | None, number: int) -> None:
    """See that a batch takes the way through the forward code that the example inputs take."""
    if not isinstance(like, Mapping):
        return
    given = inputs if isinstance(inputs, Mapping) else {}
    settings = [k for k, v in like.items() if v is not None and not tensors_in(v)]
    missing = [name for name in settings if name not in given]
    if missing:
        raise CalibrationError(
            f"calibration batch {number} lacks {', '.join(missing)}, which the example inputs "
            "have; give dicts of the same keyword inputs, so that the same forward code is run"
        )


def images_in(inputs: ExampleInputs) -> int:
    """The batch size: the first dimension of the first tensor that has one."""
    shapes = [x.shape for x in tensors_in(as_call(inputs)) if x.ndim]
    return shapes[0][0] if shapes else 1


def _parted(batch: Any, like: ExampleInputs | None) -> tuple[Any, Any]:
    """Inputs and target of a batch, None where it has none."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if isinstance(like, (tuple, list)) and len(like) > 1:
        form, given = tree_structure(tuple(like)), tuple(batch)
        if tree_structure(given) == form:
            return given, None
        if tree_structure(given[:-1]) == form:
            return given[:-1], given[-1]
    return (batch[0], batch[1]) if len(batch) == 2 else (batch, None)


def _moved(inputs: Any, device: torch.device) -> ExampleInputs:
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, inputs)
