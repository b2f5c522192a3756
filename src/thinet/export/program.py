"""torch's own format: an exported program (.pt2), which `torch.export.load` reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from thinet.calibrate.batches import images_in
from thinet.errors import ExportError
from thinet.export.check import (
    TOLERANCE,
    Exported,
    check_arguments,
    first_line,
    has_batch,
    kept_if_right,
    largest_error,
    resized,
    written_bytes,
)
from thinet.trace.record import check_model
from thinet.trace.replica import copied
from thinet.types import ExampleInputs, as_call, call, tensors_in

BATCH = "batch"
"""Name of the dynamic dimension."""


@dataclass(frozen=True)
class Captured:
    """A model as torch's exporter sees it, and the inputs to try the result on.

    Attributes:
        model: a copy on the CPU, in evaluation mode.
        program: the `torch.export.ExportedProgram`.
        shapes: the dynamic dimensions by name, None where the batch is fixed.
        tried: example inputs of different batch sizes, or those given where the batch is fixed.
    """

    model: nn.Module
    program: Any
    shapes: Any
    tried: tuple[ExampleInputs, ...]


def capture(model: nn.Module, example_inputs: ExampleInputs, *, dynamic_batch: bool) -> Captured:
    """The model's forward as an exported program.

    Raises:
        ExportError: torch's exporter cannot follow the model; says what it says.
        OptionError: it is no module.
    """
    check_model(model)
    size = images_in(example_inputs)
    # torch.export takes a batch of 0 or 1 for a constant
    given = resized(example_inputs, max(size, 2) if dynamic_batch else size)
    ours = copied(model).cpu().eval()
    args, kwargs = as_call(given)
    names, dims = _dynamic(given, BATCH), _dynamic(given, torch.export.Dim(BATCH))
    try:
        program = torch.export.export(
            ours, args, kwargs, dynamic_shapes=dims if dynamic_batch else None, strict=False
        )
    # the exporter raises errors of many kinds; the message says which model it was
    except Exception as error:
        fixed = "; with dynamic_batch=False the batch stays as it is here, if that is the reason"
        hint = fixed if dynamic_batch else ""
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__} ({first_line(error)}){hint}"
        ) from error
    sizes = (1, images_in(given), images_in(given) + 1) if dynamic_batch else (size,)
    tried = tuple(resized(given, n) for n in dict.fromkeys(sizes))
    return Captured(ours, program, names if dynamic_batch else None, tried)


def to_exported_program(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model as an exported program (.pt2), loaded again and compared with the model.

    `torch.export.load(path).module()` runs it without the model's class. The model is left as it
    was; it is exported in evaluation mode, on the CPU.

    Args:
        model: dense or cut.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        path: ends with .pt2; an existing file is replaced.
        dynamic_batch: the first dimension of the inputs may be any later; it is tried with three
            sizes. False fixes it to that of the example inputs.
        tolerance: largest difference, relative to the largest number of an output.

    Raises:
        ExportError: the model cannot be exported, the file differs from it, or cannot be written.
            Nothing is left behind.
        OptionError: the name does not end with .pt2.
    """
    target = Path(path)
    check_arguments(target, ".pt2", tolerance)
    found = capture(model, example_inputs, dynamic_batch=dynamic_batch)
    with kept_if_right(target) as unfinished:
        torch.export.save(found.program, unfinished)
        loaded = torch.export.load(unfinished).module()
        error = largest_error(
            found.model, found.tried, lambda given: tensors_in(call(loaded, given)),
            what="the exported program", tolerance=tolerance,
        )  # fmt: skip
        size = written_bytes(unfinished)
    return Exported(target, error, tuple(map(images_in, found.tried)), size)


def _dynamic(inputs: ExampleInputs, dimension: Any) -> Any:
    """In the structure of the arguments: the dimension where it counts examples, None elsewhere."""
    size = images_in(inputs)
    args, kwargs = as_call(inputs)
    return tree_map(
        lambda leaf: {0: dimension} if has_batch(leaf, size) else None, kwargs if kwargs else args
    )
