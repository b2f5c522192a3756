"""Least squares with fewer rows than columns, solved over the rows.

The system over columns would be singular, and large: 25,088 columns in VGG-16's first linear layer
where 256 images give 256 rows. With D the pull on each column (`lstsq.solve_full`) the same change
of the weights is

    (Phi' Phi / n + D)^-1 Phi' R / n = D^-1 Phi' (Phi D^-1 Phi' / n + 1)^-1 R / n

(the matrix inversion lemma), a system of n unknowns. R is what the old weights leave of the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.errors import RepairError
from thinet.lstsq import CLEARLY, CONSTANT, PULLS, cholesky, probes, validation_score

MOST = 4096
"""Rows of one system at most."""

_ENTRIES = 2**26  # of the rows of one system at most: 256 MiB of float32

_LEAST = 1e-10  # of the mean energy of a column: the least pull, as without one nothing is solved

_PANEL = 512  # rows whose products with all later ones are made at a time


def most_rows(columns: int) -> int:
    """How many rows of so many columns are solved over at most."""
    return max(min(MOST, _ENTRIES // max(columns, 1)), 1)


def system_bytes(rows: int, columns: int, outputs: int) -> int:
    """Memory of a system: its rows twice, its products in float64 thrice, and the new weights."""
    return 2 * 4 * rows * columns + 3 * 8 * rows**2 + 4 * columns * outputs


def solve_rows(
    phi: Tensor,
    target: Tensor,
    prior: Tensor,
    *,
    ridge: float = 1e-4,
    dropout: float = 0.0,
    intercept: bool = True,
    name: str = "the consumer",
) -> tuple[Tensor, Tensor]:
    """What `lstsq.solve_full` finds from the moments of these rows, with its cross-validation.

    Args:
        phi: (n, S) the input as it is now, float32 or float64; written over.
        target: (n, N) what should come of it.
        prior: (N, S) the weights to stay near to.
        ridge, dropout, intercept: as for `solve_full`.

    Returns:
        W (N, S) in the prior's precision, and b (N,) float64.

    Raises:
        RepairError: the solution is not finite.
    """
    target = target.to(phi)
    energy, mean, y_mean = phi.square().mean(0), phi.mean(0), target.mean(0)
    if intercept:
        phi -= mean
        phi.masked_fill_(phi.square().mean(0) <= CONSTANT * energy, 0)
        target = target - y_mean
    missed = target - phi @ prior.to(phi).T
    spread = phi.square().mean(0, dtype=torch.float64).mean()
    if bool(spread > 0):
        noise = dropout / (1 - dropout) * energy.double()
        pulls = ridge * spread, noise, _LEAST * spread
        change = _validated(phi, missed, *pulls, taken=int(intercept), name=name)
        weight = change.to(prior).add_(prior)  # these may be the model's largest weights
    else:
        weight = prior.clone()
    bias = y_mean - weight.to(phi) @ mean if intercept else torch.zeros_like(y_mean)
    if not bool(torch.isfinite(weight.sum()) & torch.isfinite(bias).all()):
        raise RepairError(
            f"{name}: the repaired weights are not finite; check the targets and calibration images"
        )
    return weight, bias.double()


def _validated(
    phi: Tensor,
    missed: Tensor,
    pull: Tensor,
    noise: Tensor,
    least: Tensor,
    *,
    taken: int,
    name: str,
) -> Tensor:
    """(N, S) change of the weights with the pull that generalised cross-validation chooses.

    As `lstsq._validated`: over the rows, the residual is the pull times the unknowns, and the
    degrees of freedom that are left are the trace of the inverse times the pull, without those that
    are `taken` by an intercept.
    """
    rows, even = len(phi), not bool(noise.any())
    signs = probes(rows).to(missed.device)
    right = torch.cat([missed.double() / rows, signs], 1)
    products = _products(phi) / rows if even else None
    energy = float(missed.double().square().sum()) / rows
    best, found = torch.inf, (torch.zeros_like(missed), torch.ones_like(phi[0]))
    for factor in PULLS:
        added = (pull * factor + noise).clamp_min(least)
        level = added.mean()
        scale = level / added  # ones, where the pull is the same on all columns
        if products is None:
            system = _products(phi * scale.sqrt().to(phi)) / rows
        else:
            system = products.clone()
        system.diagonal().add_(level)
        root, jitter = cholesky(system, name)
        solved = torch.cholesky_solve(right, root)
        unknowns, answers = solved.split([missed.shape[1], signs.shape[1]], 1)
        level = level + jitter
        left = rows * float(level**2 * unknowns.square().sum())
        free = (float(level * (signs * answers).sum()) - taken) / rows
        score = validation_score(left, energy, free)
        if score < CLEARLY * best:
            best, found = score, (unknowns.to(phi), scale.to(phi))
    unknowns, scale = found
    return unknowns.T @ (phi * scale)


def _products(phi: Tensor) -> Tensor:
    """(n, n) phi phi' in float64, of which one triangle is computed."""
    total = phi.new_empty(len(phi), len(phi), dtype=torch.float64)
    for start in range(0, len(phi), _PANEL):
        rows = slice(start, start + _PANEL)
        part = (phi[start:] @ phi[rows].T).double()
        total[start:, rows] = part
        total[rows, start:] = part.T
    return total
