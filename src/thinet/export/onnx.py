"""ONNX files, for runtimes that know no torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from thinet.calibrate.batches import images_in
from thinet.errors import ExportError, MissingExtraError, OptionError
from thinet.export.check import (
    TOLERANCE,
    Exported,
    check_arguments,
    first_line,
    kept_if_right,
    largest_error,
    written_bytes,
)
from thinet.export.program import Captured, capture
from thinet.types import ExampleInputs, tensors_in

OPSET = 20
"""Operators of ONNX 1.15 (2023), which the runtimes of today have."""
FIRST_OPSET = 18
"""torch's exporter writes this; for an older one it keeps it and only warns."""


def to_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model as an ONNX file, checked by onnx and run by onnxruntime against the model.

    The model is left as it was; it is exported in evaluation mode, on the CPU.

    Args:
        model: dense or cut.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        path: ends with .onnx; an existing file is replaced. Weights of more than 2 GB lie beside
            it, as ONNX wants.
        opset: version of ONNX's operators, from 18.
        dynamic_batch: the first dimension of the inputs, named `batch`, may be any later; it is
            tried with three sizes. False fixes it to that of the example inputs.
        tolerance: largest difference, relative to the largest number of an output.

    Raises:
        MissingExtraError: onnx, onnxruntime or onnxscript is not installed.
        ExportError: the model cannot be exported, the file is not valid or differs from the model,
            or cannot be written. Nothing is left behind.
        OptionError: the name does not end with .onnx, or there is no such opset.
    """
    target = Path(path)
    check_arguments(target, ".onnx", tolerance)
    onnx, runtime, _ = (_installed(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    newest: int = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not FIRST_OPSET <= opset <= newest:
        raise OptionError(
            f"opset {opset!r} cannot be written; torch {torch.__version__} and onnx "
            f"{onnx.__version__} know {FIRST_OPSET} to {newest}"
        )
    found = capture(model, example_inputs, dynamic_batch=dynamic_batch)
    program = _translated(found, opset, type(model).__name__)
    with kept_if_right(target) as unfinished:
        program.save(unfinished)
        _check_file(onnx, unfinished, opset)
        error = _compared(runtime, unfinished, found, tolerance)
        size = written_bytes(unfinished)
    return Exported(target, error, tuple(map(images_in, found.tried)), size, opset)


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} is needed to write and check ONNX files and cannot be imported ({error}): "
            "pip install thinet[export]"
        ) from error


def _translated(found: Captured, opset: int, name: str) -> Any:
    try:
        with warnings.catch_warnings():
            # of torch's own tree library, and of several inputs with one batch
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            warnings.filterwarnings("ignore", ".*axis name: batch will not be used", UserWarning)
            return torch.onnx.export(
                found.program, dynamo=True, dynamic_shapes=found.shapes, opset_version=opset,
                verbose=False,
            )  # fmt: skip
    # the exporter raises errors of many kinds; the message says which model it was
    except Exception as error:
        cause = error.__cause__ or error
        raise ExportError(
            f"torch.onnx cannot translate {name} ({first_line(cause)}); an exported program may "
            "do instead"
        ) from error


def _check_file(onnx: Any, path: Path, opset: int) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"onnx finds the file invalid ({first_line(error)}); no file was kept"
        ) from error
    stated = {
        entry.domain: entry.version
        for entry in onnx.load(str(path), load_external_data=False).opset_import
    }
    if stated.get("") != opset:
        raise ExportError(
            f"torch.onnx could not convert the model to opset {opset}, it would be "
            f"{stated.get('')}; no file was kept. Ask for that one"
        )


def _compared(runtime: Any, path: Path, found: Captured, tolerance: float) -> float:
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # onnxruntime's errors have no common class of their own
    except Exception as error:
        raise ExportError(
            f"onnxruntime {runtime.__version__} cannot load the file ({first_line(error)}); no "
            "file was kept. An older opset may do"
        ) from error
    names: list[str] = [value.name for value in session.get_inputs()]

    def run(given: ExampleInputs) -> Sequence[torch.Tensor]:
        tensors = tensors_in(given)
        if len(tensors) != len(names):
            raise ExportError(
                f"the ONNX file has {len(names)} inputs ({', '.join(names)}), the model was given "
                f"{len(tensors)} tensors; leave out the inputs that it does not use"
            )
        try:
            outputs: list[np.ndarray] = session.run(
                None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            )
        except Exception as error:
            raise ExportError(
                f"onnxruntime cannot run the file on a batch of {images_in(given)} "
                f"({first_line(error)}); no file was kept"
            ) from error
        return [torch.from_numpy(output) for output in outputs]

    return largest_error(
        found.model, found.tried, run, what="the ONNX file", tolerance=tolerance
    )  # fmt: skip
