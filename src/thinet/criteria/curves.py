"""Error curves along any order of removal, comparable between criteria and groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinet.criteria.base import Consumer
from thinet.errors import CalibrationError
from thinet.lstsq import cholesky

RIDGE = 1e-6
"""Added to the second moments, relative to their mean diagonal, so that they can be inverted."""


def refit_errors(
    second: Tensor,
    weight: Tensor,
    removed: Sequence[int],
    units: Tensor | None = None,
    *,
    ridge: float = 0.0,
    name: str = "the consumer",
) -> tuple[float, ...]:
    """Error with all weights refitted by least squares, for every first part of the order.

    With the columns sorted last-to-go first and H = L L', what the first m columns cannot explain
    of the output is the energy of the rows of L' W from m on: one Cholesky factor and one product
    for the whole curve, C^3 taps^3 / 3 multiply-adds.

    Args:
        second: (C * taps, C * taps) H = E[phi phi'], or the covariance for a free intercept.
        weight: (N, C, *kernel).
        removed: all units, first to go first.
        units: (C,) unit of each channel, -1 for channels that always stay; None: one each.
        ridge: relative to the mean diagonal, pulls the refit to `weight`.
        name: for the error.

    Returns:
        len(removed) + 1 non-decreasing errors, the first 0.

    Raises:
        RepairError: the moments are not finite.
    """
    columns = weight.detach().flatten(1).to(second.device, torch.float64)
    taps = columns.shape[1] // weight.shape[1]
    owner = column_units(units, weight.shape[1], taps).to(second.device)
    stays = torch.empty(len(removed), dtype=torch.long, device=second.device)
    stays[torch.tensor(removed, device=second.device)] = torch.arange(
        len(removed), 0, -1, device=second.device
    )
    rank = torch.where(owner >= 0, stays[owner], 0)  # 0 stays for good, 1 goes last
    place = rank.argsort(stable=True)
    ordered = second[place[:, None], place].double()
    factor, _ = cholesky(_raise(ordered, ridge), name)
    lost = (factor.T @ columns[:, place].T).square().sum(1)
    per_unit = lost.new_zeros(len(removed) + 1).index_add_(0, rank[place], lost)
    return 0.0, *per_unit[1:].flip(0).cumsum(0).tolist()


def group_refit_errors(
    consumers: Sequence[Consumer], removed: Sequence[int], *, name: str = "the group"
) -> tuple[float, ...]:
    """`refit_errors` of all consumers of a group, each over its output energy, added up."""
    total = torch.zeros(len(removed) + 1, dtype=torch.float64)
    for consumer in consumers:
        if consumer.system is None:
            raise CalibrationError(f"{name}: a consumer's second moments were not collected")
        second, weight, units = consumer.system
        errors = refit_errors(second, weight, removed, units, ridge=RIDGE, name=name)
        total += torch.tensor(errors, dtype=torch.float64) * consumer.per_energy
    return tuple(total.tolist())


def column_units(units: Tensor | None, channels: int, taps: int) -> Tensor:
    """(C * taps,) unit of each column."""
    return (torch.arange(channels) if units is None else units).repeat_interleave(taps)


def ridged(second: Tensor, ridge: float) -> Tensor:
    """A float64 copy with `ridge` times its mean diagonal (or times 1, were that 0) added."""
    return _raise(second.to(torch.float64, copy=True), ridge)


def _raise(second: Tensor, ridge: float) -> Tensor:
    mean = float(second.diagonal().mean())
    second.diagonal().add_(ridge * mean if mean > 0 else ridge)
    return second
