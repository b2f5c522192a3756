"""What is written is run and compared with the model before it gets its name."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from thinet.calibrate.batches import images_in
from thinet.errors import ExportError, OptionError
from thinet.gap import relative_gap
from thinet.observe import preserved_rng
from thinet.types import ExampleInputs, call, tensors_in

TOLERANCE = 1e-3
"""Largest difference of a float32 output, relative to the largest number in it."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: where it is.
        error: largest difference from the torch model's outputs, relative to the largest number of
            each output, over all batches that were tried.
        batches: sizes of these batches; several where the batch is dynamic.
        bytes: size of the file, and of the weights beside it if it has such.
        opset: version of ONNX's operators, None for an exported program.
    """

    path: Path
    error: float
    batches: tuple[int, ...]
    bytes: int
    opset: int | None = None


def check_arguments(path: Path, suffix: str, tolerance: float) -> None:
    """Raise what is wrong with them before any work is done."""
    if path.suffix != suffix:
        raise OptionError(f"{path}: the name must end with {suffix}")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}; make it, or choose another")
    if not 0 < tolerance < 1:
        raise OptionError(f"tolerance lies between 0 and 1, got {tolerance!r}")


def resized(inputs: ExampleInputs, batch: int) -> ExampleInputs:
    """The inputs with `batch` examples, those there are taken in turns; on the CPU."""
    size = images_in(inputs)

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        return leaf[torch.arange(batch) % size] if has_batch(leaf, size) else leaf

    return tree_map(taken, inputs)


def has_batch(leaf: Any, size: int) -> bool:
    """Whether a tensor's first dimension counts the examples."""
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == size


def largest_error(
    model: nn.Module,
    inputs: Sequence[ExampleInputs],
    run: Callable[[ExampleInputs], Sequence[torch.Tensor]],
    *,
    what: str,
    tolerance: float,
) -> float:
    """The largest relative difference between the model and what `run` gives, over all inputs.

    Raises:
        ExportError: it is above the tolerance, or the outputs are of other numbers or shapes.
    """
    worst = 0.0
    for given in inputs:
        batch = images_in(given)
        with torch.no_grad(), preserved_rng():
            wanted = tensors_in(call(model, given))
            got = run(given)
        shapes = [[tuple(t.shape) for t in outputs] for outputs in (wanted, got)]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"{what} gives outputs of shapes {shapes[1]} on a batch of {batch}, the model "
                f"{shapes[0]}; no file was kept"
            )
        for number, (ours, theirs) in enumerate(zip(wanted, got, strict=True)):
            if ours.numel() and ours.is_floating_point() and not bool(ours.isfinite().any()):
                raise ExportError(
                    f"output {number} of the model itself holds no finite number on a batch of "
                    f"{batch}, so there is nothing to compare; check its weights and the example "
                    "inputs. No file was kept"
                )
            gap = relative_gap(ours, theirs)
            if not gap <= tolerance:
                raise ExportError(
                    f"output {number} of {what} differs from the model's by {gap:.2g} of its "
                    f"largest number on a batch of {batch} (allowed are {tolerance:g}); no file "
                    "was kept. Raise tolerance if the model's own numbers are that rough"
                )
            worst = max(worst, gap)
    return worst


@contextmanager
def kept_if_right(path: Path) -> Iterator[Path]:
    """A name in a hidden folder beside `path`; at the end of the block what was written moves.

    Weights that are too large for the file lie beside it under a name that begins with its own.

    Raises:
        ExportError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder) / path.name
            for written in sorted(Path(folder).iterdir(), reverse=True):  # the file itself last
                written.replace(path.with_name(written.name))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error


def written_bytes(unfinished: Path) -> int:
    """Size of all that was written in the hidden folder."""
    return sum(written.stat().st_size for written in unfinished.parent.iterdir())


def first_line(error: BaseException) -> str:
    """An error of another library in one line, without colours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = re.sub(r"\x1b\[[0-9;]*m", "", lines[0])[:300] if lines else "no reason given"
    return f"{type(error).__name__}: {said}"
