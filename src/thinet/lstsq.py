"""Small dense least squares from moments, in float64, by Cholesky."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.errors import RepairError

_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
_SMALLEST_PIVOT = 1e-12  # of the column's own diagonal: below, it depends on earlier columns

_CONSTANT = 1e-12  # of a column's energy: a variance below is rounding, the intercept's business


def cholesky(matrix: Tensor, name: str) -> tuple[Tensor, float]:
    """Lower factor of positive semi-definite matrices, their diagonals raised as little as needed.

    Args:
        matrix: (..., d, d) float64; its diagonal is changed on the way and put back.
        name: whose system it is, for the error.

    Returns:
        The factor of `matrix + added * I`, and the largest `added`.

    Raises:
        RepairError: a matrix is not finite, or not positive definite even with
            1e-4 of its mean diagonal added.
    """
    # The sum is finite only if every entry is, and costs a thirtieth of asking each.
    if not bool(torch.isfinite(matrix.sum())) and not bool(torch.isfinite(matrix).all()):
        raise RepairError(
            f"{name}: the least-squares system holds NaN or infinite values; check the "
            "calibration images and the weights before this layer"
        )
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    before = diagonal.clone()
    mean = before.mean(-1) if matrix.shape[-1] else before.sum(-1)
    scale = torch.where(mean > 0, mean, 1.0)
    added, good = torch.zeros_like(scale), torch.zeros_like(scale, dtype=torch.bool)
    try:
        for step in _JITTERS:
            added = torch.where(good, added, step * scale)
            torch.add(before, added[..., None], out=diagonal)
            factor, info = torch.linalg.cholesky_ex(matrix)
            pivots = factor.diagonal(dim1=-2, dim2=-1).square()
            good = (info == 0) & (pivots > _SMALLEST_PIVOT * diagonal).all(-1)
            if bool(good.all()):
                return factor, float(added.max())
    finally:
        diagonal.copy_(before)
    raise RepairError(
        f"{name}: the least-squares system of {matrix.shape[-1]} unknowns is singular; give more "
        "calibration images or a larger ridge"
    )


def solve_scale(gram: Tensor, kept: Tensor, *, name: str = "the consumer") -> Tensor:
    """One scalar for each kept channel, ThiNet's own repair (ICCV 2017, eq. 7).

    w = argmin E || y - sum over kept c of w_c x_c ||^2 = G_SS^-1 (G 1)_S. Where channels depend on
    each other, the solution nearest to all ones.

    Args:
        gram: (C, C) gram of all channels, any scale.
        kept: (S,) indices of the channels that stay.

    Returns:
        (S,) float64, to be multiplied into the consumer's kept input channels.

    Raises:
        RepairError: the gram is not finite or not positive semi-definite.
    """
    gram = gram.double()
    kept = torch.as_tensor(kept, device=gram.device)
    removed = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    removed[kept] = False
    lost = gram[kept][:, removed].sum(1, keepdim=True)
    factor, _ = cholesky(gram[kept][:, kept], name)
    return 1 + torch.cholesky_solve(lost, factor).squeeze(1)


def solve_full(
    second: Tensor,
    mean: Tensor,
    cross: Tensor,
    y_mean: Tensor,
    prior: Tensor,
    *,
    ridge: float = 1e-4,
    dropout: float = 0.0,
    intercept: bool = True,
    overwrite: bool = False,
    name: str = "the consumer",
) -> tuple[Tensor, Tensor]:
    """New weights and intercept of a consumer whose input has changed.

    argmin over W, b of E || t - W phi - b ||^2 + lambda || W - prior ||^2, lambda = ridge times the
    mean diagonal of the system. Where columns depend on each other, the solution nearest to prior.
    A leading dimension, if there is one, is that of several systems (the groups of a convolution),
    each solved by itself.

    Args:
        second: (..., S, S) E[phi phi'] of the input as it is now.
        mean: (..., S) E[phi].
        cross: (..., S, N) E[phi t'] with the target t.
        y_mean: (..., N) E[t].
        prior: (..., N, S) the weights to stay near to.
        ridge: at least 0.
        dropout: p of a dropout that the input passes in training. Its noise on W - prior has the
            energy p / (1 - p) E[phi_c^2] (W - prior)_c^2, which is then minimised along.
        intercept: whether b is free; else it is 0.
        overwrite: `second` is not needed any more, which spares a copy.

    Returns:
        W (..., N, S) and b (..., N), float64.

    Raises:
        RepairError: a system is not finite, or not positive semi-definite.
    """
    system = second.double() if overwrite else second.to(torch.float64, copy=True)
    mean, cross = mean.double(), cross.double()
    y_mean, prior = y_mean.double(), prior.double()
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    energy = diagonal.clone()
    if intercept:
        _subtract_outer(system, mean)
        cross = cross - mean[..., None] * y_mean[..., None, :]
        constant = diagonal.abs() <= _CONSTANT * energy.abs()
        if bool(constant.any()):
            system.masked_fill_(constant[..., None], 0).masked_fill_(constant[..., None, :], 0)
            cross.masked_fill_(constant[..., None], 0)
    # The change from the prior is the unknown, so that what is singular moves nothing.
    lost = cross - system @ prior.mT
    if system.shape[-1]:
        diagonal.add_(ridge * diagonal.mean(-1, keepdim=True))
        diagonal.add_(dropout / (1 - dropout) * energy)
    factor, _ = cholesky(system, name)
    weight = prior + torch.cholesky_solve(lost, factor).mT
    bias = y_mean - (weight @ mean[..., None])[..., 0] if intercept else torch.zeros_like(y_mean)
    if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
        raise RepairError(
            f"{name}: the repaired weights are not finite; check the targets and calibration images"
        )
    return weight, bias


def _subtract_outer(matrix: Tensor, vector: Tensor) -> None:
    """matrix -= vector vector', in place and with no copy of the matrix."""
    size = matrix.shape[-1]
    rows = vector.reshape(-1, size)
    matrix.view(-1, size, size).baddbmm_(rows[:, :, None], rows[:, None, :], alpha=-1)
