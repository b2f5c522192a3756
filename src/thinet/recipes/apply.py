"""Carry a recipe out: in one shot, and its replaced heads fitted by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from thinet.budget import Budget
from thinet.calibrate.batches import calibration_inputs
from thinet.calibrate.layers import find_layers
from thinet.count import count
from thinet.errors import CalibrationError
from thinet.lstsq import solve_full
from thinet.outcome import PruneResult
from thinet.plan import Plan, Replacement
from thinet.prune import prune
from thinet.prune_options import Repair, Sampling
from thinet.recipes import resolve
from thinet.recipes.recipe import Recipe
from thinet.repair import RepairSettings
from thinet.surgery.replace import replace
from thinet.trace.interpret import Environment, Execution
from thinet.trace.program import Op
from thinet.trace.replica import copied
from thinet.types import ExampleInputs, Progress

RIDGE = 1e-3
"""Pull of a new head's weights towards zero, relative to the mean diagonal of its system."""


def prune_by_recipe(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any],
    recipe: str | Recipe,
    *,
    keep: float | None = None,
    criterion: str = "thinet",
    repair: Repair = "full",
    repair_settings: RepairSettings | None = None,
    recalibrate: bool = False,
    sampling: Sampling = "exact",
    memory: float | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneResult:
    """All steps of a recipe in one shot, without training; `thinet.iterate` trains in between.

    Replaced modules come first; a new classifier is fitted by least squares to the dense network's
    outputs on the calibration images, so that the cut starts from a network that works.

    Args:
        recipe: a name of `thinet.recipes`, or a recipe that was worked out for this model.
        keep: in place of the recipe's own fraction, where it has one for all.
        calibration, criterion, ...: as for `thinet.prune`.

    Returns:
        As `thinet.prune`; the plan and the costs are relative to `model`.

    Raises:
        RecipeError, OptionError: see `thinet.recipes.resolve`; else as `thinet.prune`.
    """
    worked_out = resolve(recipe, model, example_inputs, keep=keep)
    batches = list(calibration)
    start = with_replaced(model, worked_out.replaced, batches, example_inputs)
    result = prune(
        start, example_inputs, batches, budget=Budget(keep=worked_out.keep), criterion=criterion,
        repair=repair, repair_settings=repair_settings, recalibrate=recalibrate,
        sampling=sampling, memory=memory, verify=verify, seed=seed, progress=progress,
    )  # fmt: skip
    before = count(model, example_inputs)
    plan = Plan(replaced=worked_out.replaced).then(result.plan)
    plan = changed(plan, settings={**plan.settings, "recipe": worked_out.name})
    report = changed(result.report, macs_before=before.macs, params_before=before.params)
    return PruneResult(result.model, plan, report)


def with_replaced(
    model: nn.Module,
    replacements: Sequence[Replacement],
    calibration: Iterable[Any],
    like: ExampleInputs | None = None,
) -> nn.Module:
    """A copy with modules replaced, new linear layers fitted to the given network's outputs.

    Args:
        calibration: batches, gone through only where there is something to fit.
        like: example inputs.

    Raises:
        CalibrationError: the data does not fit the model, or its outputs are no (n, classes).
    """
    if not replacements:
        return model
    new = copied(model)
    replace(new, replacements)
    for head in (r for r in replacements if r.builder == "linear"):
        device = next(model.parameters()).device
        batches = calibration_inputs(calibration, device=device, like=like)
        _fit(new, head.module, model, batches)
    return new


def _fit(model: nn.Module, path: str, target: nn.Module, batches: Sequence[ExampleInputs]) -> None:
    """Ridge regression of the target's outputs on the inputs of the linear layer at `path`."""
    ours, theirs = Execution(model), Execution(target)
    inputs: list[Tensor] = []

    def before(op: Op, envs: Sequence[Environment]) -> None:
        layer = layers.get(op.index)
        if layer is not None and layer.module == path:
            inputs.append(envs[0][layer.x.id].double())

    sums: tuple[Tensor, ...] | None = None
    rows = 0
    for batch in batches:
        layers = find_layers(ours.program(batch))
        ours.run([batch], before=before)
        ((y,), (x,)) = theirs.run([batch]), (inputs.pop(),)
        if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(x):
            raise CalibrationError(
                f"the new classifier {path} is fitted to outputs of shape (images, classes); the "
                f"network gives {tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__}"
            )
        y = y.double()
        found = (x.T @ x, x.sum(0), x.T @ y, y.sum(0))
        sums = found if sums is None else tuple(a + b for a, b in zip(sums, found))
        rows += len(x)
    assert sums is not None
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    second, mean, cross, y_mean = (part / rows for part in sums)
    weight, bias = solve_full(
        second, mean, cross, y_mean, torch.zeros_like(cross.T), ridge=RIDGE, name=path
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
