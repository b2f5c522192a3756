"""Least squares for layers that act through each other: one Gauss-Newton step.

The outputs are linear in each layer's weights but not in all together. Around the present weights
they are nearly linear in the change s of all:

    min over s of sum over batches || r - J s ||^2

with the residual r and the Jacobian J of the outputs. J is never formed: it is applied to changes
(forward derivatives) and its transpose to residuals (backward derivatives), in conjugate gradients
(CGLS; Bjoerck, Numerical Methods for Least Squares Problems, 1996, section 7.4). The preconditioner
takes a layer's block of J'J for a Kronecker product, of the second moments of its inputs and of
what reaches its outputs from random residuals (Martens and Grosse, ICML 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinet.lstsq import cholesky

Change = tuple[Tensor, ...]
"""For each layer (N, columns + 1): its weights and, in the last column, its intercept."""


class Problem(Protocol):
    """Derivatives of the outputs of each batch at the present weights."""

    def jvp(self, number: int, change: Change) -> Tensor:
        """What a change does to the outputs of one batch, to first order."""
        ...

    def vjp(self, number: int, residual: Tensor) -> Change:
        """The transpose of `jvp`."""
        ...


@dataclass(frozen=True, eq=False)
class Kronecker:
    """One layer's part of the preconditioner: weights' change -> (G^-1 change A^-1) / count.

    Attributes:
        outputs: Cholesky factor of G (N, N).
        inputs: Cholesky factor of A (columns + 1, columns + 1).
        count: positions over which both are means.
    """

    outputs: Tensor
    inputs: Tensor
    count: int

    @classmethod
    def of(
        cls, outputs: Tensor, inputs: Tensor, count: int, *, ridge: float, name: str
    ) -> Kronecker:
        """From the second moments; `ridge` is relative to their mean diagonals.

        Raises:
            RepairError: a moment is not finite.
        """
        return cls(_factor(outputs, ridge, name), _factor(inputs, ridge, name), count)

    def solve(self, change: Tensor) -> Tensor:
        right = torch.cholesky_solve(change.double().T, self.inputs).T
        return (torch.cholesky_solve(right, self.outputs) / self.count).to(change.dtype)


def _factor(moments: Tensor, ridge: float, name: str) -> Tensor:
    moments = moments.double()
    mean = float(moments.diagonal().mean())
    raised = moments.clone()
    raised.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    return cholesky(raised, name)[0]


def step(
    problem: Problem,
    residuals: Sequence[Tensor],
    preconditioner: Sequence[Callable[[Tensor], Tensor]],
    *,
    iterations: int,
    least: float = 0.0,
) -> Change | None:
    """The change after some iterations of conjugate gradients; None where there is nothing to do.

    Few iterations are a regularisation of their own: what the data hardly determines moves last.

    Args:
        residuals: what is missing in each batch; used up.
        preconditioner: for each layer, an approximate inverse of its block of J'J.
        iterations: at most; each one a forward and a backward derivative over all batches.
        least: the last is the one that lowers the sum of squares by less than this part of what
            all have lowered it by.
    """
    gradient = _summed(problem.vjp(n, r) for n, r in enumerate(residuals))
    change: Change | None = None
    direction: Change | None = None
    before = gained = 0.0
    for iteration in range(iterations):
        ahead = tuple(solve(g) for solve, g in zip(preconditioner, gradient, strict=True))
        slope = _dot(gradient, ahead)
        if not slope > 0:
            break
        if direction is not None:
            ahead = _add(ahead, slope / before, direction)
        direction, before = ahead, slope
        moved = [problem.jvp(n, direction) for n in range(len(residuals))]
        energy = sum(squared(m) for m in moved)
        if not energy > 0:
            break
        length = slope / energy
        change = (
            tuple(length * d for d in direction)
            if change is None
            else _add(change, length, direction)
        )
        gained += slope * length
        if iteration + 1 == iterations or slope * length < least * gained:
            break
        for residual, m in zip(residuals, moved, strict=True):
            residual.sub_(m, alpha=length)
        gradient = _summed(problem.vjp(n, r) for n, r in enumerate(residuals))
    return change


def squared(x: Tensor) -> float:
    """The sum of squares; torch adds in pairs, so that its own type is exact enough."""
    return float(x.square().sum())


def _summed(changes: Iterable[Change]) -> Change:
    total: Change | None = None
    for change in changes:
        total = (
            change
            if total is None
            else tuple(t.add_(c) for t, c in zip(total, change, strict=True))
        )
    assert total is not None
    return total


def _dot(a: Change, b: Change) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _add(a: Change, factor: float, b: Change) -> Change:
    """a + factor b."""
    return tuple(x.add(y, alpha=factor) for x, y in zip(a, b, strict=True))
