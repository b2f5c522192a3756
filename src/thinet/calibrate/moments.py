"""Streaming first and second moments: the statistic from which selection and repair follow.

Let phi be what a consumer sees at one output position and y a target there. The sums of
phi phi', phi, phi y', y and y^2 over positions are all that ThiNet's objective, its greedy
selection, least-squares repair and error curves need, so no sample is ever stored. Being sums, they
add over batches, interrupted runs and processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from thinet.errors import CalibrationError
from thinet.store import Kept, Store

_ROWS = 4096  # rows multiplied in the rows' own precision before the float64 sum
_LIMIT = 1e16  # float32 values from here on overflow in sums of squares
_PANEL = 192  # columns in a block of the triangle that is computed
_FIELDS = ("second", "phi", "cross", "y", "yy", "rows")


class Moments:
    """Sums over rows of phi (rows, d) and, optionally, of targets y (rows, N).

    Products are taken in the rows' precision (at least float32) over blocks of rows, sums in
    float64, of rows from which the mean of the first ones is subtracted, so that a covariance
    stays exact where means are large. Only one triangle of phi' phi is computed.

    Args:
        columns: d.
        targets: N, 0 for none.
        where: what is measured (module path), for errors.
    """

    def __init__(
        self,
        columns: int,
        targets: int = 0,
        *,
        where: str = "the calibration rows",
        device: torch.device | str = "cpu",
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.where = where
        self.rows = 0
        # All sums are of phi - shift and y - y_shift. Of phi phi' the lower triangle is kept:
        # strip i is (columns - i * _PANEL, _PANEL), from its part of the diagonal downwards.
        self._strips = [zeros(columns - i, min(_PANEL, columns - i)) for i in _starts(columns)]
        self._phi, self._cross = zeros(columns), zeros(columns, targets)
        self._y, self._yy = zeros(targets), zeros(targets)
        self._shift, self._y_shift = zeros(columns), zeros(targets)
        self._shifted = False
        self._resting: list[Kept] = []

    @property
    def columns(self) -> int:
        return len(self._phi)

    @property
    def targets(self) -> int:
        return len(self._y)

    def add(self, phi: Tensor, y: Tensor | None = None) -> None:
        """Add rows.

        Args:
            phi: (rows, d).
            y: (rows, N), required exactly if targets were announced.

        Raises:
            CalibrationError: a shape does not fit, or a value is not finite.
        """
        want = (len(phi), self.targets)
        seen = tuple(y.shape) if y is not None else (len(phi), 0)
        if phi.dim() != 2 or phi.shape[1] != self.columns or seen != want:
            raise CalibrationError(
                f"{self.where}: rows of shape {tuple(phi.shape)} and targets of shape {seen} do "
                f"not fit moments of {self.columns} columns and {self.targets} targets"
            )
        phi = _at_least_float32(phi.detach())
        y = None if y is None else y.detach()
        self._wake()
        check_finite(phi, self.where, "input")
        if y is not None:
            check_finite(y, self.where, "output", products=phi.dtype)
        if not self._shifted and len(phi):
            self._move(_first_mean(phi), self._y_shift if y is None else _first_mean(y))
            self._shifted = True
        for start in range(0, len(phi), _ROWS):
            block = phi[start : start + _ROWS] - self._shift.to(phi.dtype)
            for i, strip in zip(_starts(self.columns), self._strips, strict=True):
                strip += block[:, i:].T @ block[:, i : i + _PANEL]
            self._phi += block.sum(0)
            if y is not None:
                target = y[start : start + _ROWS].to(phi.dtype) - self._y_shift.to(phi.dtype)
                self._cross += block.T @ target
                self._y += target.sum(0)
                self._yy += target.square().sum(0)
        self.rows += len(phi)

    def _move(self, shift: Tensor, y_shift: Tensor) -> None:
        """Make all sums those about another shift."""
        step, y_step = shift - self._shift, y_shift - self._y_shift
        self._shift, self._y_shift = shift, y_shift
        if not self.rows:
            return
        self._subtract_outer(step, self._phi)
        self._cross -= torch.outer(step, self._y)
        self._yy -= 2 * y_step * self._y
        self._phi -= self.rows * step
        self._y -= self.rows * y_step
        self._subtract_outer(self._phi, step)
        self._cross -= torch.outer(self._phi, y_step)
        self._yy += self.rows * y_step.square()

    def _subtract_outer(self, left: Tensor, right: Tensor) -> None:
        for i, strip in zip(_starts(self.columns), self._strips, strict=True):
            strip.addr_(left[i:], right[i : i + _PANEL], alpha=-1)

    def _centred(self) -> Tensor:
        """(d, d) sum of (phi - shift)(phi - shift)', a new matrix."""
        full = self._phi.new_empty(self.columns, self.columns)
        strips = (kept.get() for kept in self._resting) if self._resting else self._strips
        for i, strip in zip(_starts(self.columns), strips, strict=True):
            full[i:, i : i + _PANEL] = strip
            full[i : i + _PANEL, i + _PANEL :] = strip[_PANEL:].T
        return full

    @property
    def second(self) -> Tensor:
        """(d, d) mean of phi phi'."""
        mean = self.mean
        return self.covariance().addr_(mean, mean)

    @property
    def mean(self) -> Tensor:
        """(d,) mean of phi."""
        return self._phi / self._counted() + self._shift

    @property
    def cross(self) -> Tensor:
        """(d, N) mean of phi y'."""
        return self.cross_covariance().addr_(self.mean, self.y_mean)

    @property
    def y_mean(self) -> Tensor:
        """(N,) mean of y."""
        return self._y / self._counted() + self._y_shift

    @property
    def y_energy(self) -> Tensor:
        """(N,) mean of y^2."""
        return self.y_variance() + self.y_mean.square()

    def covariance(self) -> Tensor:
        """(d, d) mean of (phi - mean)(phi - mean)'."""
        offset = self._phi / self._counted()
        return self._centred().div_(self.rows).addr_(offset, offset, alpha=-1)

    def cross_covariance(self) -> Tensor:
        """(d, N) mean of (phi - mean)(y - mean)'."""
        count = self._counted()
        return (self._cross / count).addr_(self._phi / count, self._y / count, alpha=-1)

    def y_variance(self) -> Tensor:
        """(N,) variance of y."""
        count = self._counted()
        return (self._yy / count - (self._y / count).square()).clamp_(min=0)

    def rest(self, store: Store) -> None:
        """Put the large sum into a store; `covariance` and `second` read it there."""
        self._wake()
        self._resting, self._strips = [store.put(strip) for strip in self._strips], []

    def _wake(self) -> None:
        if self._resting:
            self._strips, self._resting = [kept.take() for kept in self._resting], []

    def select(self, columns: Tensor) -> Moments:
        """The moments of some of the columns, as if only these had been added."""
        part = Moments(0, where=self.where, device=self._phi.device)
        part.rows, part._shifted = self.rows, self._shifted
        part._strips = _strips(self._centred()[columns[:, None], columns])
        part._phi, part._cross = self._phi[columns], self._cross[columns]
        part._y, part._yy = self._y.clone(), self._yy.clone()
        part._shift, part._y_shift = self._shift[columns], self._y_shift.clone()
        return part

    def merge(self, other: Moments) -> None:
        """Add the sums of moments gathered elsewhere.

        Raises:
            CalibrationError: they have other columns or targets.
        """
        if (self.columns, self.targets) != (other.columns, other.targets):
            raise CalibrationError(
                f"{self.where}: moments of {other.columns} columns and {other.targets} targets "
                f"cannot be added to {self.columns} columns and {self.targets} targets"
            )
        theirs = other.select(torch.arange(other.columns, device=other._phi.device))
        theirs._move(self._shift.to(theirs._phi.device), self._y_shift.to(theirs._y.device))
        self._wake()
        for sums, more in zip(self._sums(), theirs._sums(), strict=True):
            sums += more.to(sums.device)
        self.rows += other.rows

    def all_reduce(self) -> None:
        """Sum over all processes, if `torch.distributed` runs; else nothing to do."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        self._unshift()
        rows = torch.tensor(self.rows, device=self._phi.device)
        for sums in (*self._sums(), rows):
            dist.all_reduce(sums)
        self.rows = int(rows)

    def tensors(self) -> dict[str, Tensor]:
        """Plain sums by name, to be written to a file; `from_tensors` is the way back."""
        plain = self.select(torch.arange(self.columns, device=self._phi.device))
        plain._unshift()
        sums = plain._centred(), plain._phi, plain._cross, plain._y, plain._yy
        return dict(zip(_FIELDS, (*sums, torch.tensor(self.rows)), strict=True))

    @classmethod
    def from_tensors(cls, sums: dict[str, Tensor], *, where: str = "the moments") -> Moments:
        """Moments from what `tensors` gave, copied.

        Raises:
            CalibrationError: a sum is missing.
        """
        missing = [name for name in _FIELDS if name not in sums]
        if missing:
            raise CalibrationError(f"{where}: no {', '.join(missing)} among the stored sums")
        stored = [sums[name].to(torch.float64).clone() for name in _FIELDS[:-1]]
        columns, targets = stored[2].shape
        found = cls(0, targets, where=where, device=stored[0].device)
        found._shift = stored[1].new_zeros(columns)
        second, found._phi, found._cross, found._y, found._yy = stored
        found._strips = _strips(second)
        found.rows = int(sums["rows"])
        return found

    def _sums(self) -> tuple[Tensor, ...]:
        return *self._strips, self._phi, self._cross, self._y, self._yy

    def _unshift(self) -> None:
        self._wake()
        self._move(torch.zeros_like(self._shift), torch.zeros_like(self._y_shift))
        self._shifted = False

    def _counted(self) -> int:
        if not self.rows:
            raise CalibrationError(f"{self.where}: no calibration rows; give at least one image")
        return self.rows


def check_finite(
    values: Tensor, where: str, side: str, *, products: torch.dtype | None = None
) -> None:
    """Raise a `CalibrationError` that names the first bad column of (rows, columns) values.

    Args:
        products: the precision in which they are multiplied, if it is not their own.
    """
    limit = _LIMIT if (products or values.dtype) == torch.float32 else float("inf")
    if not values.numel() or magnitude(values) < limit:
        return
    bad = ~(values.abs() < limit).all(0)
    raise CalibrationError(
        f"{where}: {int(bad.sum())} of {len(bad)} {side} columns hold NaN, infinite or "
        f"overflowing values (first: column {int(bad.int().argmax())}); check the "
        "calibration images and the weights before this layer"
    )


def magnitude(values: Tensor) -> float:
    """The largest magnitude among values, NaN if there is one."""
    return max(abs(float(value)) for value in values.aminmax())


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _first_mean(values: Tensor) -> Tensor:
    # In float32, so that float32 rows lose nothing when it is subtracted.
    return _at_least_float32(values[:_ROWS]).mean(0).float().double()


def sum_bytes(columns: int) -> int:
    """Memory of the sum of phi phi' over so many columns."""
    return sum(8 * (columns - i) * min(_PANEL, columns - i) for i in _starts(columns))


def _starts(columns: int) -> range:
    """Where the strips of the lower triangle begin."""
    return range(0, columns, _PANEL)


def _strips(full: Tensor) -> list[Tensor]:
    return [full[i:, i : i + _PANEL].clone() for i in _starts(len(full))]
