"""Re-estimate the statistics of BatchNorm layers on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thinet.calibrate.batches import calibration_inputs
from thinet.observe import evaluating, preserved_rng
from thinet.trace.record import copied
from thinet.types import call


def recalibrate_bn(model: nn.Module, calibration: Iterable[Any]) -> nn.Module:
    """A copy whose BatchNorm layers have the statistics of the calibration data.

    Each layer normalises by the statistics of the batch while the data passes, as in training; its
    running mean and variance become those over all images and positions, every batch weighing as
    many rows as it has (fvcore's "precise BN", with the variance between batches included).

    Args:
        model: any model; without BatchNorm the copy is equal to it.
        calibration: batches of inputs, (input, target) pairs or dicts; large batches are better.

    Raises:
        CalibrationError: the data is empty or not finite.
    """
    fresh = copied(model)
    norms = [m for m in fresh.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return fresh
    device = next(iter(fresh.parameters())).device
    batches = calibration_inputs(calibration, device=device)
    sums: dict[nn.Module, tuple[Tensor, Tensor, int]] = {}

    def measure(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach()
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).double()
        first, second, count = sums.get(norm, (torch.zeros_like(rows[0]),) * 2 + (0,))
        sums[norm] = (first + rows.sum(0), second + rows.square().sum(0), count + len(rows))

    handles = [norm.register_forward_pre_hook(measure) for norm in norms]
    try:
        with torch.no_grad(), preserved_rng(), evaluating(fresh):
            for norm in norms:
                norm.training, norm.momentum = True, 0.0
            for batch in batches:
                call(fresh, batch)
    finally:
        for handle in handles:
            handle.remove()
    originals = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    with torch.no_grad():
        for norm, original in zip(norms, originals, strict=True):
            norm.momentum = original.momentum
            norm.num_batches_tracked = _copied_count(original)
            first, second, count = sums[norm]
            mean = first / count
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((second / count - mean.square()).clamp_min(0))
    return fresh


def _copied_count(norm: _BatchNorm) -> Tensor | None:
    return None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
