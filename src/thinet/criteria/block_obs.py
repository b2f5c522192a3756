"""Backward elimination with full refit: Optimal Brain Surgeon over whole channels.

With H the second moments of the consumer's input and W its weights, taking away the columns of
unit c and refitting all others costs tr(W_c' [H^-1]_cc^-1 W_c), after which

    W    <- W    - H^-1_:c [H^-1]_cc^-1 W_c
    H^-1 <- H^-1 - H^-1_:c [H^-1]_cc^-1 H^-1_c:

(Hassibi and Stork 1993; in blocks, Frantar and Alistarh's OBC, NeurIPS 2022). Each step takes the
unit that is cheapest for all consumers together, so the errors are those of the full refit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinet.criteria.base import (
    Consumer,
    GroupStatistics,
    Order,
    check_finite,
    criterion,
    rising,
)
from thinet.criteria.curves import RIDGE, column_units, ridged
from thinet.lstsq import cholesky

_PENDING = 256  # eliminated columns after which the inverse is brought up to date


class _Elimination:
    """One consumer's inverse and weights while units go.

    H^-1 = inverse - rows' rows and W = weight - rows' parts: eliminations are kept as thin factors
    and multiplied in many at a time, so that the work is BLAS-3. Only what the next choice needs,
    the diagonal blocks of H^-1 and of W W', is brought up to date in each step.
    """

    def __init__(self, consumer: Consumer, channels: int, ridge: float, name: str) -> None:
        assert consumer.system is not None
        second, weight, units = consumer.system
        device, inputs = second.device, weight.shape[1]
        weight = weight.detach().flatten(1).to(device, torch.float64)
        if len(weight) > weight.shape[1]:  # only W W' matters
            weight = torch.linalg.qr(weight, mode="r").R
        self.weight = weight.T.contiguous()
        self.unit = column_units(units, inputs, weight.shape[1] // inputs).to(device)
        factor, _ = cholesky(ridged(second, ridge), name)
        self.inverse = torch.cholesky_inverse(factor)
        self.channels = channels
        self.scale = consumer.per_energy
        self.gone = torch.zeros_like(self.unit, dtype=torch.bool)
        self._refresh()

    def _refresh(self) -> None:
        """Multiply the pending factors in, drop the columns that are gone."""
        if self.gone.any():
            stay = torch.nonzero(~self.gone).squeeze(1)
            rows = self.rows[: self.pending, stay]
            self.inverse = self.inverse[stay][:, stay].addmm_(rows.T, rows, alpha=-1)
            parts = self.parts[: self.pending]
            self.weight = self.weight[stay].addmm_(rows.T, parts, alpha=-1)
            self.unit = self.unit[stay]
        self.gone = torch.zeros_like(self.unit, dtype=torch.bool)
        self.pending = 0
        self._lay_out()
        room = _PENDING + self.pick.shape[1]
        self.rows = self.inverse.new_empty(room, len(self.unit))
        self.parts = self.inverse.new_empty(room, self.weight.shape[1])
        self.blocks = self.inverse[self.pick[:, :, None], self.pick[:, None, :]]
        self.blocks *= self.present[:, :, None] & self.present[:, None, :]
        self.blocks.diagonal(dim1=1, dim2=2).add_((~self.present).double())
        by_unit = self.weight[self.pick] * self.present[..., None]
        self.energies = by_unit @ by_unit.transpose(1, 2)

    def _lay_out(self) -> None:
        """`units` that have columns left, and their columns padded to one length."""
        member = torch.nonzero(self.unit >= 0).squeeze(1)
        member = member[self.unit[member].argsort(stable=True)]
        self.units, place, sizes = torch.unique_consecutive(
            self.unit[member], return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(member), device=member.device)
        rank = rank - (sizes.cumsum(0) - sizes)[place]
        longest = int(sizes.max()) if len(sizes) else 1
        self.pick = member.new_zeros(len(self.units), longest)
        self.present = torch.zeros_like(self.pick, dtype=torch.bool)
        self.pick[place, rank] = member
        self.present[place, rank] = True
        self.slot = {int(unit): i for i, unit in enumerate(self.units)}

    def costs(self) -> Tensor:
        """(channels,) added error of each unit, 0 for one that is not here."""
        found = self.inverse.new_zeros(self.channels)
        if self.pick.shape[1] == 1:
            cost = (self.energies / self.blocks).flatten()
        else:
            inverse = torch.linalg.inv_ex(self.blocks).inverse
            cost = (inverse * self.energies).sum((1, 2))
        found[self.units] = cost * self.scale
        return found

    def eliminate(self, unit: int) -> Tensor:
        """Take the unit away, refit the rest, return the error added."""
        slot = self.slot.get(unit)
        if slot is None:
            return self.inverse.new_zeros(())
        columns = self.pick[slot][self.present[slot]]
        rows, parts = self.rows[: self.pending], self.parts[: self.pending]
        row = self.inverse[columns].addmm_(rows[:, columns].T, rows, alpha=-1)
        part = self.weight[columns].addmm_(rows[:, columns].T, parts, alpha=-1)
        root = torch.linalg.cholesky(row[:, columns])
        row = torch.linalg.solve_triangular(root, row, upper=False)
        part = torch.linalg.solve_triangular(root, part, upper=False)

        here = row[:, self.pick].permute(1, 0, 2) * self.present[:, None, :]
        product = (self.weight @ part.T).addmm_(rows.T, parts @ part.T, alpha=-1)
        crossed = product[self.pick] @ here
        self.energies += here.transpose(1, 2) @ (part @ part.T) @ here
        self.energies -= crossed + crossed.transpose(1, 2)
        self.energies *= self.present[:, :, None] & self.present[:, None, :]
        self.blocks -= here.transpose(1, 2) @ here
        self.blocks[slot] = torch.eye(self.pick.shape[1]).to(self.blocks)
        self.energies[slot] = 0
        self.present[slot] = False

        stop = self.pending + len(columns)
        self.rows[self.pending : stop], self.parts[self.pending : stop] = row, part
        self.pending = stop
        self.gone[columns] = True
        if self.pending >= _PENDING:
            self._refresh()
        return part.square().sum() * self.scale


def eliminate(
    consumers: Sequence[Consumer], channels: int, *, ridge: float = RIDGE, name: str = "the group"
) -> tuple[list[int], Tensor]:
    """Remove units one by one, each time the one whose loss hurts the refitted consumers least.

    About (C taps)^3 multiply-adds for each consumer.

    Args:
        consumers: each with its `system`.
        channels: number of units.
        ridge: added to the moments, relative to their mean diagonal.

    Returns:
        The units in order, and the error of the full refit after each, (channels,) float64.

    Raises:
        RepairError: moments that are not positive semi-definite.
    """
    states = [_Elimination(c, channels, ridge, name) for c in consumers]
    order: list[int] = []
    added = torch.zeros(channels, dtype=torch.float64)
    gone = torch.zeros(channels, dtype=torch.bool)
    for step in range(channels):
        costs = torch.stack([state.costs().cpu() for state in states]).sum(0)
        unit = int(costs.masked_fill_(gone, torch.inf).argmin())
        added[step] = sum(float(state.eliminate(unit)) for state in states)
        gone[unit] = True
        order.append(unit)
    return order, added.cumsum(0)


@criterion("block-obs", needs={"systems"})
def block_obs(stats: GroupStatistics) -> Order:
    """Errors are those of the full refit of all consumers, each over its output energy."""
    for consumer in stats.consumers:
        assert consumer.system is not None
        check_finite(stats, consumer.system[0].diagonal(), consumer.weight)
    order, errors = eliminate(stats.consumers, stats.channels, name=f"group {stats.name!r}")
    return Order(tuple(order), rising(errors))
