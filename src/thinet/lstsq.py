"""Small dense least squares from moments, in float64, by Cholesky."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.errors import RepairError

_JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-3)
"""Of the mean diagonal. Sums of float32 products are off by 6e-8 of the largest eigenvalue, which
is up to as many times the mean diagonal as there are columns, thousands."""

_SMALLEST_PIVOT = 1e-12  # of the column's own diagonal: below, it depends on earlier columns

CONSTANT = 1e-12  # of a column's energy: a variance below is rounding, the intercept's business

FEW = 5
"""Rows for each column; with fewer, cross-validation decides how strong the pull to the old weights
is, as noise would be fitted: most of it where there are as many rows as columns."""

PULLS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # times the ridge that was asked for

_ALONE = 2  # rows a column from which the score has one minimum, so that its first rise ends it

CLEARLY = 1 - 1e-6  # of a score: what differs by less is rounding

_PROBES = 64  # random signs that estimate the trace of an inverse, where columns are more


def cholesky(matrix: Tensor, name: str) -> tuple[Tensor, float]:
    """Lower factor of positive semi-definite matrices, their diagonals raised as little as needed.

    Args:
        matrix: (..., d, d) float64; its diagonal is changed on the way and put back.
        name: whose system it is, for the error.

    Returns:
        The factor of `matrix + added * I`, and the largest `added`.

    Raises:
        RepairError: a matrix is not finite, or not positive definite even with
            1e-3 of its mean diagonal added.
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
    rows: int | None = None,
    y_variance: Tensor | None = None,
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
        rows, y_variance: of a single system, how many rows it is made of and the (N,) variance of
            the target. Fewer than `FEW` rows for each column: lambda is that of up to a thousand
            times the ridge which generalised cross-validation likes best (Golub, Heath and Wahba,
            1979).

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
        constant = diagonal.abs() <= CONSTANT * energy.abs()
        if bool(constant.any()):
            system.masked_fill_(constant[..., None], 0).masked_fill_(constant[..., None, :], 0)
            cross.masked_fill_(constant[..., None], 0)
    # The change from the prior is the unknown, so that what is singular moves nothing.
    lost = cross - system @ prior.mT
    noise = dropout / (1 - dropout) * energy
    pull = ridge * diagonal.mean(-1, keepdim=True) if system.shape[-1] else diagonal
    if rows is not None and y_variance is not None and rows < FEW * system.shape[-1]:
        of_target = y_variance.double() + (0 if intercept else y_mean.square())
        left = of_target.sum() - (prior.mT * (cross + lost)).sum()
        free = max(rows - int(intercept), 1)
        change = _validated(system, lost, pull, noise, left, free, name)
    else:
        diagonal.add_(pull).add_(noise)
        change = torch.cholesky_solve(lost, cholesky(system, name)[0])
    weight = prior + change.mT
    bias = y_mean - (weight @ mean[..., None])[..., 0] if intercept else torch.zeros_like(y_mean)
    if not bool(torch.isfinite(weight).all() & torch.isfinite(bias).all()):
        raise RepairError(
            f"{name}: the repaired weights are not finite; check the targets and calibration images"
        )
    return weight, bias


def _validated(
    system: Tensor, lost: Tensor, pull: Tensor, noise: Tensor, left: Tensor, rows: int, name: str
) -> Tensor:
    """(S, N) change of the weights with the pull that generalised cross-validation chooses.

    The error that is left over (1 - degrees of freedom / rows)^2 is least; both follow from the
    moments, the degrees being the trace of the system over the system as pulled.

    Args:
        left: energy of what the old weights leave of the target.
        rows: without the one that the intercept takes.
    """
    diagonal = system.diagonal()
    before, signs = diagonal.clone(), probes(len(diagonal)).to(system)
    best, found = torch.inf, torch.zeros_like(lost)
    for factor in PULLS:
        added = pull * factor + noise
        torch.add(before, added, out=diagonal)
        root, jitter = cholesky(system, name)
        diagonal.copy_(before)
        added = (added + jitter)[:, None]
        solved = torch.cholesky_solve(torch.cat([lost, signs], 1), root)
        change, answers = solved.split([lost.shape[1], signs.shape[1]], 1)
        degrees = len(before) - float((added * signs * answers).sum())
        # What is left of the target is left - 2 <change, lost> + <change, system change>, and the
        # system as pulled times the change is lost.
        missed = left - (change * (lost + added * change)).sum()
        score = validation_score(float(missed), float(left), 1 - degrees / rows)
        if score < CLEARLY * best:
            best, found = score, change
        elif rows >= _ALONE * len(before):
            break
    return found.clone()  # not a view that keeps the probes' answers


def validation_score(missed: float, energy: float, free: float) -> float:
    """Generalised cross-validation's: what is left over (free degrees of freedom / rows)^2.

    Args:
        missed: what is left of the target.
        energy: what the old weights leave of it; below 1e-12 of that is rounding.
        free: the part of the degrees of freedom that the fit has not used.
    """
    return max(missed, 1e-12 * energy) / max(free, 1e-6) ** 2


def probes(size: int) -> Tensor:
    """(size, probes) Z with E[Z Z'] = 1, so that the sum of Z * (A Z) is about the trace of A.

    All of the axes, and so the trace itself, where they are few; else random signs (Hutchinson,
    1990), by which degrees of freedom have a standard error of a fifth of the root of `size`.
    """
    if size <= 8 * _PROBES:
        return torch.eye(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (size, _PROBES), generator=generator).double()
    return (2 * signs - 1) / _PROBES**0.5


def _subtract_outer(matrix: Tensor, vector: Tensor) -> None:
    """matrix -= vector vector', in place and with no copy of the matrix."""
    size = matrix.shape[-1]
    rows = vector.reshape(-1, size)
    matrix.view(-1, size, size).baddbmm_(rows[:, :, None], rows[:, None, :], alpha=-1)
