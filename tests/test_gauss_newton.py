"""A Gauss-Newton step against least squares that are solved directly."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from thinet.errors import RepairError
from thinet.gauss_newton import Change, Kronecker, step


@dataclass
class Linear:
    """Two layers whose outputs are added: linear in both, so that one step is the solution.

    `x` and `z` are inputs with a column of ones, in batches; `t` the targets.
    """

    x: list[Tensor]
    z: list[Tensor]
    t: list[Tensor]

    def residuals(self) -> list[Tensor]:
        return [t.clone() for t in self.t]

    def jvp(self, number: int, change: Change) -> Tensor:
        return self.x[number] @ change[0].T + self.z[number] @ change[1].T

    def vjp(self, number: int, residual: Tensor) -> Change:
        return residual.T @ self.x[number], residual.T @ self.z[number]


def problem(rows: int = 40, batches: int = 2) -> Linear:
    generator = torch.Generator().manual_seed(1)

    def drawn(columns: int) -> list[Tensor]:
        made = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return list(made.chunk(batches))

    return Linear(drawn(4), drawn(5), drawn(3))


def solution(given: Linear) -> Tensor:
    inputs = torch.cat([torch.cat(given.x), torch.cat(given.z)], 1)
    return torch.linalg.lstsq(inputs, torch.cat(given.t)).solution.T


def error(given: Linear, change: Change) -> float:
    """The sum of squares that a change leaves."""
    left = (t - given.jvp(n, change) for n, t in enumerate(given.t))
    return sum(float(r.square().sum()) for r in left)


def plain(gradient: Tensor) -> Tensor:
    return gradient


def test_as_many_iterations_as_unknowns_solve_a_linear_problem() -> None:
    given = problem()
    change = step(given, given.residuals(), (plain, plain), iterations=9)
    assert change is not None
    torch.testing.assert_close(torch.cat(change, 1), solution(given), rtol=1e-8, atol=1e-8)


def test_an_exact_preconditioner_solves_one_layer_in_one_iteration() -> None:
    given = problem()
    x, nothing = torch.cat(given.x), torch.zeros_like
    alone = Linear(given.x, [nothing(z) for z in given.z], given.t)
    exact = Kronecker.of(torch.eye(3), x.T @ x / len(x), len(x), ridge=0.0, name="one")
    change = step(alone, alone.residuals(), (exact.solve, plain), iterations=1)
    assert change is not None
    wanted = torch.linalg.lstsq(x, torch.cat(given.t)).solution.T
    torch.testing.assert_close(change[0], wanted, rtol=1e-9, atol=1e-9)
    assert not change[1].any()


def test_each_iteration_lowers_the_error_and_few_are_a_start() -> None:
    given = problem()
    errors = []
    for iterations in range(1, 6):
        change = step(given, given.residuals(), (plain, plain), iterations=iterations)
        assert change is not None
        errors.append(error(given, change))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < sum(float(t.square().sum()) for t in given.t)


def test_no_residual_leaves_nothing_to_do() -> None:
    given = problem()
    given.t = [torch.zeros_like(t) for t in given.t]
    assert step(given, given.residuals(), (plain, plain), iterations=3) is None


def test_a_kronecker_product_is_inverted() -> None:
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    g = torch.tensor([[4.0, 0.0], [0.0, 5.0]])
    change = torch.tensor([[1.0, -2.0], [0.5, 7.0]])
    solved = Kronecker.of(g, a, 10, ridge=0.0, name="one").solve(change)
    torch.testing.assert_close(10 * g @ solved @ a, change)


def test_moments_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(RepairError, match=r"conv1 -> conv2"):
        Kronecker.of(
            torch.full((2, 2), float("nan")), torch.eye(2), 1, ridge=0.0, name="conv1 -> conv2"
        )


def test_an_iteration_that_gains_little_is_the_last() -> None:
    calls: list[int] = []

    class Counted(Linear):
        def jvp(self, number: int, change: Change) -> Tensor:
            calls.append(number)
            return super().jvp(number, change)

    given = Counted(**vars(problem()))
    errors, asked = [], []
    for least in (0.0, 0.05, 0.5):
        calls.clear()
        change = step(given, given.residuals(), (plain, plain), iterations=9, least=least)
        assert change is not None
        asked.append(len(calls) // 2)
        errors.append(error(given, change))
    gains = gained_by_iteration(given)
    for n, least in zip(asked[1:], (0.05, 0.5), strict=True):
        assert gains[n - 1] < least * sum(gains[:n])
        assert all(gains[i] >= least * sum(gains[: i + 1]) for i in range(n - 1))
    assert asked[0] == 9 > asked[1] > asked[2]
    assert errors[0] < errors[1] < errors[2]


def gained_by_iteration(given: Linear) -> list[float]:
    """What each of nine iterations lowers the sum of squares by, from nine separate runs."""
    errors = [sum(float(t.square().sum()) for t in given.t)]
    for iterations in range(1, 10):
        change = step(given, given.residuals(), (plain, plain), iterations=iterations)
        assert change is not None
        errors.append(error(given, change))
    return [a - b for a, b in pairwise(errors)]
