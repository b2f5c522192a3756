"""See that a cut model computes what the original computes with the same channels silenced."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from thinet.errors import CalibrationError, VerificationError
from thinet.gap import largest, relative_gap
from thinet.observe import evaluating, module_calls, preserved_rng
from thinet.silenced_run import run_silenced
from thinet.trace.groups import Analysis
from thinet.trace.planning import removed_classes
from thinet.trace.program import plain, values_of
from thinet.trace.replica import copied
from thinet.types import ExampleInputs, as_call, cloned, tensors_in

TOLERANCE = 1e-4
"""Largest difference in float32, relative to the largest output."""


def verify_cut(
    model: nn.Module,
    small: nn.Module,
    inputs: ExampleInputs,
    analysis: Analysis,
    keep: Mapping[str, Sequence[int]],
) -> None:
    """Compare both models on the example inputs.

    Networks with wild statistics amplify rounding: where float32 disagrees, float64 decides, and
    last the original with its activations silenced operation by operation (`silenced_run`).
    Groups that a normalisation couples are not exact by nature and are left out.

    Raises:
        VerificationError: they differ; the text names the first module whose output does. Or there
            is nothing to compare, as no output is finite.
    """
    coupled = {g.name for g in analysis.groups if g.normalised_over is not None}
    if coupled.intersection(keep):
        return
    silent = silenced(model, analysis, keep)
    expected = _run(silent, inputs)[0]
    if not _tells(expected) and not _tells(_run(model, inputs)[0]):
        raise VerificationError(UNTOLD)
    if _gap(expected, small, inputs) <= TOLERANCE:
        return
    silent, exact_small = silent.double(), copied(small).double()
    wide = tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        as_call(inputs),
    )
    wide_inputs: ExampleInputs = wide[0] if not wide[1] else wide[1]
    expected = _run(silent, wide_inputs)[0]
    gap = _gap(expected, exact_small, wide_inputs)
    if gap <= TOLERANCE * 1e-2:
        return
    # A weight that is computed from several parameters is not silenced by zeros in one of them.
    try:
        expected = run_silenced(copied(model).double(), wide_inputs, analysis, keep)
    except CalibrationError:
        pass
    else:
        if _gap(expected, exact_small, wide_inputs) <= TOLERANCE * 1e-2:
            return
    if not _tells(expected):
        raise VerificationError(UNTOLD)
    where = _first_different(silent, exact_small, wide_inputs, analysis, keep)
    raise VerificationError(
        f"the cut model differs from the silenced original by {gap:.2g} of the largest output, "
        f"first in {where}; nothing was returned. Leave out the groups that touch this module, "
        "and please report the model"
    )


UNTOLD = (
    "the cut could not be verified: on the example inputs the model gives no finite number to "
    "compare; nothing was returned. Give example inputs that are finite and look like data (in "
    "which a detector finds something), check the weights for NaN, or pass verify=False"
)


def silenced(model: nn.Module, analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the model in which the removed channels reach no consumer.

    The consumers' weights for them are zero; channels that meet in a product of two activations
    are silenced where they are made.
    """
    silent = copied(model)
    named = dict(silent.named_parameters()) | dict(silent.named_buffers())
    with torch.no_grad():
        for group in analysis.groups:
            if group.name not in keep:
                continue
            gone = set(range(group.channels)) - set(keep[group.name])
            between = any(site.parameter is None for site in group.sites)
            for member in group.members:
                if member.role == "consumes" or between:
                    rows = [i for i, unit in enumerate(member.units) if unit in gone]
                    index = torch.tensor(rows, device=named[member.parameter].device)
                    if rows:
                        named[member.parameter].index_fill_(member.dim, index, 0)
    return silent


def _run(model: nn.Module, inputs: ExampleInputs) -> tuple[Any, list[tuple[str, Any]]]:
    """What the model returns, and what each of its modules does.

    Run is a copy: a forward may count, average or keep what it sees.
    """
    args, kwargs = cloned(as_call(inputs))
    model = copied(model)
    with (
        torch.no_grad(),
        preserved_rng(),
        evaluating(model),
        warnings.catch_warnings(),
        module_calls(model) as (_, calls),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        output = model(*args, **kwargs)
    return output, calls


def _numbers(outputs: Any) -> list[torch.Tensor]:
    """All numbers in what a model returns, in order: its tensors, arrays and bare numbers."""
    found: list[torch.Tensor] = []
    for leaf in tree_flatten(plain(outputs))[0]:
        if isinstance(leaf, torch.Tensor):
            found.append(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf)
        elif isinstance(leaf, (int, float, complex, np.ndarray, np.generic)):
            array = np.ascontiguousarray(leaf)
            if array.dtype.kind in NUMERIC:
                found += _numbers(torch.tensor(array))
    return found


NUMERIC = "biufc"
"""Kinds of numpy's numbers."""


def _tells(outputs: Any) -> bool:
    """Whether there is a number in them to compare; what is not floating point always is one."""
    return any(bool(x.isfinite().any()) for x in _numbers(outputs))


def _gap(expected: Any, small: nn.Module, inputs: ExampleInputs) -> float:
    """The largest difference of any output, relative to that output's largest entry.

    Infinite where the outputs are of other shapes, or hold nothing to compare.
    """
    try:
        found, _ = _run(small, inputs)
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run on the example inputs: {error}; nothing was returned. "
            "Please report the model"
        ) from error
    ours, theirs = _numbers(expected), _numbers(found)
    if [x.shape for x in ours] != [x.shape for x in theirs] or not _tells(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.is_floating_point():
            worst = max(worst, relative_gap(a, b))
        elif not torch.equal(a, b):
            worst = float("inf")
    return worst


def _first_different(
    silent: nn.Module,
    small: nn.Module,
    inputs: ExampleInputs,
    analysis: Analysis,
    keep: Mapping[str, Sequence[int]],
) -> str:
    """The path of the first module whose output is not the original's less the removed channels."""
    labeller, gone = analysis.labeller, removed_classes(analysis, keep)
    _, ours = _run(silent, inputs)
    _, theirs = _run(small, inputs)
    traced = analysis.program.called
    for (path, values), (_, a), (_, b) in zip(traced, ours, theirs, strict=False):
        for value, left, right in zip(
            values_of(values), tensors_in(plain(a)), tensors_in(plain(b)), strict=False
        ):
            for dim, axis in enumerate(labeller.of(value)):
                if isinstance(axis, np.ndarray):
                    stays = np.flatnonzero(~gone[labeller.classes.find(axis)])
                    left = left.index_select(dim, torch.from_numpy(stays).to(left.device))
            close = left.shape == right.shape and torch.allclose(
                left, right, rtol=1e-6, atol=1e-6 * largest(left), equal_nan=True
            )
            if not close:
                return path or "the model's own output"
    return "no module that could be told apart"
