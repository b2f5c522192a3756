"""Moments of a convolution with groups: one small system for each group, all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from thinet.calibrate.moments import check_finite
from thinet.errors import CalibrationError


class BlockMoments:
    """Sums over rows of phi (rows, groups * d) and targets y (rows, groups * n), group by group.

    Products are taken in the rows' precision, sums in float64, about the means of the first rows.

    Args:
        columns: d of each group.
        targets: n of each group.
        where: what is measured (module path), for errors.
    """

    def __init__(
        self,
        groups: int,
        columns: int,
        targets: int,
        *,
        where: str = "the calibration rows",
        device: torch.device | str = "cpu",
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.where, self.rows, self.groups = where, 0, groups
        self._second, self._cross = zeros(columns, columns), zeros(columns, targets)
        self._phi, self._y = zeros(columns), zeros(targets)
        self._shift, self._y_shift = zeros(columns), zeros(targets)

    def add(self, phi: Tensor, y: Tensor) -> None:
        """Add rows, phi (rows, groups * d) and y (rows, groups * n), groups after each other.

        Raises:
            CalibrationError: a value is not finite.
        """
        phi, y = (v if v.dtype == torch.float64 else v.float() for v in (phi, y))
        check_finite(phi, self.where, "input")
        check_finite(y, self.where, "output")
        phi, y = phi.unflatten(1, (self.groups, -1)), y.unflatten(1, (self.groups, -1))
        if not self.rows and len(phi):
            self._shift, self._y_shift = (v.mean(0).float().double() for v in (phi, y))
        left = (phi - self._shift.to(phi)).transpose(0, 1)
        right = (y - self._y_shift.to(y)).transpose(0, 1).to(left)
        self._second += left.mT @ left
        self._cross += left.mT @ right
        self._phi += left.sum(1)
        self._y += right.sum(1)
        self.rows += len(phi)

    @property
    def mean(self) -> Tensor:
        """(groups, d) mean of phi."""
        return self._phi / self._counted() + self._shift

    @property
    def y_mean(self) -> Tensor:
        """(groups, n) mean of y."""
        return self._y / self._counted() + self._y_shift

    @property
    def second(self) -> Tensor:
        """(groups, d, d) mean of phi phi'."""
        return self._about_zero(self._second, self._phi, self.mean)

    @property
    def cross(self) -> Tensor:
        """(groups, d, n) mean of phi y'."""
        return self._about_zero(self._cross, self._y, self.y_mean)

    def _about_zero(self, product: Tensor, sums: Tensor, mean: Tensor) -> Tensor:
        count = self._counted()
        offset = (self._phi / count)[..., None] * (sums / count)[..., None, :]
        return product / count - offset + self.mean[..., None] * mean[..., None, :]

    def _counted(self) -> int:
        if not self.rows:
            raise CalibrationError(f"{self.where}: no calibration rows; give at least one image")
        return self.rows
