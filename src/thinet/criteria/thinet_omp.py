"""Orthogonal matching pursuit, the selection of the journal version's code (TPAMI 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.criteria.base import GroupStatistics, Order, check_finite, criterion, rising

_DEPENDENT = 1e-12  # of a channel's energy: what is left of it once the chosen ones explain it


def pursue(gram: Tensor) -> tuple[list[int], Tensor]:
    """Choose the channel that best explains the residual, refit all scalars, and again.

    With x_c the parts of the output y = sum of x_c, all inner products are in the gram: with S
    chosen and w refitted, the residual's product with x_j is r_j = (G 1 - G_:S w)_j, and the choice
    is argmax r_j^2 / G_jj. An incremental Cholesky factor makes it O(C^3) in all.

    Args:
        gram: (C, C) symmetric positive semi-definite.

    Returns:
        The channels in the order of choice, and E || y - sum w_c x_c ||^2 after each, (C,) float64.
    """
    gram = gram.double()
    size = len(gram)
    energy = gram.diagonal().clamp(min=0)
    residual = gram.sum(1)
    factor = torch.zeros_like(gram)  # rows of L^-1 G_S:
    left = torch.ones(size, dtype=torch.bool, device=gram.device)
    explained = gram.new_zeros(size)
    order: list[int] = []
    for step in range(size):
        gain = torch.where(energy > 0, residual.square() / energy, 0.0)
        choice = int(torch.where(left, gain, -1.0).argmax())
        order.append(choice)
        left[choice] = False
        row = gram[choice] - factor[:step, choice] @ factor[:step]
        if row[choice] > _DEPENDENT * energy[choice]:
            row = row / row[choice].sqrt()
            part = residual[choice] / row[choice]
            factor[step] = row
            explained[step] = part.square()
            residual -= part * row
    return order, gram.sum() - explained.cumsum(0)


@criterion("thinet-omp", needs={"gram"})
def thinet_omp(stats: GroupStatistics) -> Order:
    """The last chosen goes first; errors are those with one refitted scalar per kept channel."""
    assert stats.gram is not None
    check_finite(stats, stats.gram)
    order, errors = pursue(stats.gram)
    after = torch.cat([errors.flip(0)[1:], stats.gram.double().sum().reshape(1).to(errors)])
    return Order(tuple(reversed(order)), rising(after.clamp(min=0)))
