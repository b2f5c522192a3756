"""Run the original with the removed channels silenced where they are read.

By definition what a cut computes, however a layer's weights are made: where an operation contracts
channels, the removed ones are zero. Slower than zero weights (`thinet.verify.silenced`), which are
no answer where a weight is computed from several parameters or divided by its own norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from thinet.trace.groups import Analysis
from thinet.trace.interpret import Execution
from thinet.trace.planning import removed_classes
from thinet.trace.program import Op
from thinet.types import ExampleInputs


def run_silenced(
    model: nn.Module,
    inputs: ExampleInputs,
    analysis: Analysis,
    keep: Mapping[str, Sequence[int]],
) -> Any:
    """What the model returns on the inputs when consumers read zeros for all but `keep`.

    Raises:
        CalibrationError: the model's operations cannot be run one by one.
    """
    execution = _Silencing(model, _silent(analysis, keep))
    with execution.started([inputs]) as lane:
        for index in range(len(lane.program.ops)):
            lane.step(index)
        return lane.outputs()[0]


_Places = list[tuple[int, int, torch.Tensor]]
"""Number of an operation's input, dimension, and the indices along it that are silent."""


def _silent(analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> dict[int, _Places]:
    labeller, gone = analysis.labeller, removed_classes(analysis, keep)
    classes = labeller.classes
    found: dict[int, _Places] = {}
    for mixing in labeller.mixings:
        if not isinstance(mixing.source, np.ndarray):
            continue
        read = classes.find(mixing.source)
        if not gone[read].any():
            continue
        silent = torch.from_numpy(np.flatnonzero(gone[read]))
        places = found.setdefault(mixing.op.index, [])
        for number, value in enumerate(mixing.op.inputs()):
            if labeller.is_static(value):
                continue
            for dim, axis in enumerate(labeller.of(value)):
                if isinstance(axis, np.ndarray) and np.array_equal(classes.find(axis), read):
                    places.append((number, dim, silent))
    return found


class _Silencing(Execution):
    def __init__(self, model: nn.Module, silent: Mapping[int, _Places]) -> None:
        super().__init__(model)
        self._silent = silent

    def compute(self, op: Op, env: Any, *, over: bool = False) -> None:
        kept: dict[int, torch.Tensor] = {}
        for number, dim, indices in self._silent.get(op.index, ()):
            value = op.inputs()[number].id
            kept.setdefault(value, env[value])
            env[value] = env[value].index_fill(dim, indices.to(env[value].device), 0)
        super().compute(op, env)
        for value, tensor in kept.items():  # others read it as it was
            env[value] = tensor
