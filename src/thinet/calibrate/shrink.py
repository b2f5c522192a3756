"""Covariances from few rows, drawn towards a multiple of the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.lstsq import FEW


def shrunk(covariance: Tensor, rows: int) -> Tensor:
    """A covariance of which least squares on other data than its rows can be foretold.

    With about as many rows as columns a sample covariance explains every output of its own rows,
    and nothing that is left out would seem to cost anything. Oracle approximating shrinkage (Chen,
    Wiesel, Eldar and Hero, 2010, eq. 23) follows from the covariance itself. Where there are
    `lstsq.FEW` rows for each column it is left as it is.

    Args:
        covariance: (d, d) float64; written over.
        rows: of which it is the mean.
    """
    columns = len(covariance)
    if rows >= FEW * columns:
        return covariance
    trace = float(covariance.trace())
    squares = float(torch.linalg.vector_norm(covariance)) ** 2
    spread = (rows + 1 - 2 / columns) * (squares - trace**2 / columns)
    part = ((1 - 2 / columns) * squares + trace**2) / spread if spread > 0 else 1.0
    part = min(part, 1.0)
    covariance *= 1 - part
    covariance.diagonal().add_(part * trace / columns)
    return covariance
