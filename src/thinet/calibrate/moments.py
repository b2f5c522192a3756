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

_ROWS = 8192  # rows multiplied in the rows' own precision before the float64 sum
_LIMIT = 1e16  # float32 values from here on overflow in sums of squares
_PANEL = 192  # columns in a block of the triangle that is computed
_FIELDS = ("second_sum", "phi_sum", "cross_sum", "y_sum", "yy_sum", "rows")


class Moments:
    """Sums over rows of phi (rows, d) and, optionally, of targets y (rows, N).

    Products are taken in the rows' precision (at least float32) over blocks of rows, sums in
    float64. Only one triangle of phi' phi is computed.

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
        self._upper = zeros(columns, columns)  # lower blocks are stale until `second_sum` is read
        self.phi_sum = zeros(columns)
        self.cross_sum = zeros(columns, targets)
        self.y_sum = zeros(targets)
        self.yy_sum = zeros(targets)

    @property
    def columns(self) -> int:
        return len(self.phi_sum)

    @property
    def targets(self) -> int:
        return len(self.y_sum)

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
        y = None if y is None else _at_least_float32(y.detach()).to(phi.dtype)
        self._check_finite(phi, "input")
        if y is not None:
            self._check_finite(y, "output")
        for start in range(0, len(phi), _ROWS):
            block = phi[start : start + _ROWS]
            _add_upper(self._upper, block)
            self.phi_sum += block.sum(0)
            if y is not None:
                target = y[start : start + _ROWS]
                self.cross_sum += block.T @ target
                self.y_sum += target.sum(0)
                self.yy_sum += target.square().sum(0)
        self.rows += len(phi)

    def _check_finite(self, values: Tensor, side: str) -> None:
        limit = _LIMIT if values.dtype == torch.float32 else float("inf")
        if not values.numel() or max(abs(float(v)) for v in values.aminmax()) < limit:
            return
        bad = ~(values.abs() < limit).all(0)
        raise CalibrationError(
            f"{self.where}: {int(bad.sum())} of {len(bad)} {side} columns hold NaN, infinite or "
            f"overflowing values (first: column {int(bad.int().argmax())}); check the "
            "calibration images and the weights before this layer"
        )

    @property
    def second_sum(self) -> Tensor:
        """(d, d) sum of phi phi', float64."""
        for start in range(0, self.columns, _PANEL):
            stop = start + _PANEL
            self._upper[stop:, start:stop] = self._upper[start:stop, stop:].T
        return self._upper

    @property
    def second(self) -> Tensor:
        """(d, d) mean of phi phi'."""
        return self.second_sum / self._counted()

    @property
    def mean(self) -> Tensor:
        """(d,) mean of phi."""
        return self.phi_sum / self._counted()

    @property
    def cross(self) -> Tensor:
        """(d, N) mean of phi y'."""
        return self.cross_sum / self._counted()

    @property
    def y_mean(self) -> Tensor:
        """(N,) mean of y."""
        return self.y_sum / self._counted()

    @property
    def y_energy(self) -> Tensor:
        """(N,) mean of y^2."""
        return self.yy_sum / self._counted()

    def covariance(self) -> Tensor:
        """(d, d) mean of (phi - mean)(phi - mean)'."""
        mean = self.mean
        return self.second.addr_(mean, mean, alpha=-1)

    def cross_covariance(self) -> Tensor:
        """(d, N) mean of (phi - mean)(y - mean)'."""
        return self.cross.addr_(self.mean, self.y_mean, alpha=-1)

    def y_variance(self) -> Tensor:
        """(N,) variance of y."""
        return (self.y_energy - self.y_mean.square()).clamp_(min=0)

    def select(self, columns: Tensor) -> Moments:
        """The moments of some of the columns, as if only these had been added."""
        part = Moments(0, where=self.where, device=self.phi_sum.device)
        part.rows = self.rows
        part._upper = self.second_sum[columns][:, columns]
        part.phi_sum = self.phi_sum[columns]
        part.cross_sum = self.cross_sum[columns]
        part.y_sum, part.yy_sum = self.y_sum.clone(), self.yy_sum.clone()
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
        self._upper += other.second_sum.to(self._upper.device)
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs.to(mine.device)
        self.rows += other.rows

    def all_reduce(self) -> None:
        """Sum over all processes, if `torch.distributed` runs; else nothing to do."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        rows = torch.tensor(self.rows, device=self.phi_sum.device)
        for sums in (self._upper, *self._sums(), rows):
            dist.all_reduce(sums)
        self.rows = int(rows)

    def tensors(self) -> dict[str, Tensor]:
        """All sums by name, to be written to a file; `from_tensors` is the way back."""
        rows = torch.tensor(self.rows)
        return dict(zip(_FIELDS, (self.second_sum, *self._sums(), rows), strict=True))

    @classmethod
    def from_tensors(cls, sums: dict[str, Tensor], *, where: str = "the moments") -> Moments:
        """Moments from what `tensors` gave, copied.

        Raises:
            CalibrationError: a sum is missing.
        """
        missing = [name for name in _FIELDS if name not in sums]
        if missing:
            raise CalibrationError(f"{where}: no {', '.join(missing)} among the stored sums")
        upper, phi, cross, y, yy = (sums[name].to(torch.float64).clone() for name in _FIELDS[:-1])
        found = cls(0, where=where)
        found._upper, found.phi_sum, found.cross_sum = upper, phi, cross
        found.y_sum, found.yy_sum, found.rows = y, yy, int(sums["rows"])
        return found

    def _sums(self) -> tuple[Tensor, ...]:
        return self.phi_sum, self.cross_sum, self.y_sum, self.yy_sum

    def _counted(self) -> int:
        if not self.rows:
            raise CalibrationError(f"{self.where}: no calibration rows; give at least one image")
        return self.rows


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _add_upper(total: Tensor, block: Tensor) -> None:
    columns = block.shape[1]
    for start in range(0, columns, _PANEL):
        panel = block[:, start : start + _PANEL]
        total[start : start + _PANEL, start:] += panel.T @ block[:, start:]
