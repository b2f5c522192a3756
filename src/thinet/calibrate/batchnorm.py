"""Re-estimate the statistics of BatchNorm layers on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thinet.calibrate.batches import calibration_inputs
from thinet.errors import CalibrationError
from thinet.observe import evaluating, preserved_rng, running
from thinet.surgery.apply import named_tensors
from thinet.trace.record import check_model, describe
from thinet.trace.replica import copied
from thinet.types import ExampleInputs, call


def recalibrate_bn(
    model: nn.Module, calibration: Iterable[Any], *, example_inputs: ExampleInputs | None = None
) -> nn.Module:
    """A copy whose BatchNorm layers have the statistics of the calibration data.

    Each layer normalises by the statistics of the batch while the data passes, as in training; its
    running mean and variance become those over all images and positions, every batch weighing as
    many rows as it has (fvcore's "precise BN", with the variance between batches included).

    Args:
        model: any model; without BatchNorm the copy is equal to it.
        calibration: batches of inputs, (input, target) pairs or dicts; large batches are better.
        example_inputs: of a model with several positional inputs, by which a batch (a, b) is told
            from an input and its target.

    Raises:
        CalibrationError: the data is empty or not finite, or does not fit the model.
        OptionError: the model is no module.
    """
    check_model(model)
    fresh = copied(model)
    norms = {
        name: m
        for name, m in fresh.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    if not norms:
        return fresh
    device = next(tensor for _, tensor in named_tensors(fresh)).device
    batches = calibration_inputs(calibration, device=device, like=example_inputs)
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def measure(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
        first, second, count = sums.get(norm, (torch.zeros_like(rows[0]),) * 2 + (0,))
        sums[norm] = (first + rows.sum(0), second + rows.square().sum(0), count + len(rows))

    handles = [norm.register_forward_pre_hook(measure) for norm in norms.values()]
    try:
        with torch.no_grad(), preserved_rng(), evaluating(fresh):
            for norm in norms.values():
                norm.training, norm.momentum = True, 0.0
            for batch in batches:
                _run(fresh, batch)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for name, norm in norms.items():
            original = model.get_submodule(name)
            assert isinstance(original, _BatchNorm)
            norm.momentum = original.momentum
            if norm.num_batches_tracked is not None and original.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(original.num_batches_tracked)
            if norm in sums:
                _install(norm, name, *sums[norm])
    return fresh


def _run(model: nn.Module, batch: ExampleInputs) -> None:
    what = f"{type(model).__name__} does not run on a calibration batch ({describe(batch)})"
    with running(CalibrationError, f"{what} with BatchNorm in training mode"):
        call(model, batch)


def _install(norm: _BatchNorm, name: str, first: Tensor, second: Tensor, count: int) -> None:
    mean = first / count
    var = (second / count - mean.square()).clamp_min(0)
    if not bool(torch.isfinite(var).all()):
        raise CalibrationError(
            f"{name}: the input of this BatchNorm holds NaN or infinite values; check the "
            "calibration images and the weights before this layer"
        )
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
