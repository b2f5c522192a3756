"""Small dense least squares from moments, in float64, by Cholesky."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.errors import RepairError

_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
_SMALLEST_PIVOT = 1e-12  # of the column's own diagonal: below, it depends on earlier columns

_CONSTANT = 1e-12  # of a column's energy: a variance below is rounding, the intercept's business


def cholesky(matrix: Tensor, name: str) -> tuple[Tensor, float]:
    """Lower factor of a positive semi-definite matrix, its diagonal raised as little as needed.

    Args:
        matrix: (d, d) float64.
        name: whose system it is, for the error.

    Returns:
        The factor of `matrix + added * I` and `added`.

    Raises:
        RepairError: the matrix is not finite, or not positive definite even with
            1e-4 of its mean diagonal added.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise RepairError(
            f"{name}: the least-squares system holds NaN or infinite values; check the "
            "calibration images and the weights before this layer"
        )
    diagonal = matrix.diagonal()
    scale = float(diagonal.mean()) if len(diagonal) else 0.0
    for step in _JITTERS:
        added = step * scale if scale > 0 else step
        raised = matrix.clone()
        raised.diagonal().add_(added)
        factor, info = torch.linalg.cholesky_ex(raised)
        pivots = factor.diagonal().square()
        if int(info) == 0 and bool((pivots > _SMALLEST_PIVOT * raised.diagonal()).all()):
            return factor, added
    raise RepairError(
        f"{name}: the least-squares system of {len(matrix)} unknowns is singular; give more "
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
    intercept: bool = True,
    name: str = "the consumer",
) -> tuple[Tensor, Tensor]:
    """New weights and intercept of a consumer whose input has changed.

    argmin over W, b of E || t - W phi - b ||^2 + lambda || W - prior ||^2, lambda = ridge times the
    mean diagonal of the system. Where columns depend on each other, the solution nearest to prior.

    Args:
        second: (S, S) E[phi phi'] of the input as it is now.
        mean: (S,) E[phi].
        cross: (S, N) E[phi t'] with the target t.
        y_mean: (N,) E[t].
        prior: (N, S) the weights to stay near to.
        ridge: at least 0.
        intercept: whether b is free; else it is 0.

    Returns:
        W (N, S) and b (N,), float64.

    Raises:
        RepairError: the system is not finite, or not positive semi-definite.
    """
    second, mean, cross = second.double(), mean.double(), cross.double()
    y_mean, prior = y_mean.double(), prior.double()
    if intercept:
        energy = second.diagonal()
        second = torch.addr(second, mean, mean, alpha=-1)
        cross = torch.addr(cross, mean, y_mean, alpha=-1)
        constant = second.diagonal().abs() <= _CONSTANT * energy.abs()
        second[constant], second[:, constant], cross[constant] = 0, 0, 0
    # The change from the prior is the unknown, so that what is singular moves nothing.
    lost = cross - second @ prior.T
    system = second.clone()
    system.diagonal().add_(ridge * float(second.diagonal().mean()) if len(second) else 0.0)
    factor, _ = cholesky(system, name)
    weight = prior + torch.cholesky_solve(lost, factor).T
    bias = y_mean - weight @ mean if intercept else torch.zeros_like(y_mean)
    if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
        raise RepairError(
            f"{name}: the repaired weights are not finite; check the targets and calibration images"
        )
    return weight, bias
