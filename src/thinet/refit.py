"""New weights of one layer: least squares over rows of what it is given now and should make of it.

Over the columns, by moments that are summed row block by row block; where the columns outnumber the
rows, or are too many for their moments, over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinet.calibrate.blocks import BlockMoments
from thinet.calibrate.layers import Layer
from thinet.calibrate.moments import Moments, check_finite
from thinet.calibrate.patches import BLOCK, output_rows, position_grid, row_blocks
from thinet.calibrate.rows import WIDEST
from thinet.calibrate.targets import LayerTargets
from thinet.dual import most_rows, solve_rows
from thinet.errors import RepairError
from thinet.lstsq import solve_full
from thinet.trace.interpret import Environment


@dataclass(frozen=True)
class Fit:
    """One use of a layer of the cut network, and what it is fitted to.

    Attributes:
        targets: what the dense network's layer made of the same batches.
        outputs: which of its output channels stay, None for all.
    """

    use: Layer
    targets: LayerTargets
    outputs: Sequence[int] | None

    @property
    def name(self) -> str:
        """Of the layer, as errors give it."""
        return self.use.module or self.use.weight


def solve(
    fits: Sequence[Fit], envs: Sequence[Environment], prior: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """New weights and intercept of a layer, over all its uses.

    Args:
        fits: its uses.
        envs: what each batch has made so far in the cut network.
        prior: (N, columns) the old weights.
        options: of `thinet.lstsq.solve_full`.

    Raises:
        RepairError: the system cannot be solved, or a use is given other rows than the dense one.
        CalibrationError: activations that are not finite.
    """
    geometry, name, columns = fits[0].use.geometry, fits[0].name, prior.shape[1]
    there = sum(_count(fit, env, at) for fit in fits for env, at in _places(fit, envs))
    if geometry.groups == 1 and (there < columns or columns > WIDEST):
        most = most_rows(columns) if columns > WIDEST else there
        some = min(most / max(there, 1), 1.0)
        phi, target = _joined([part for fit in fits for part in _rows(fit, envs, some)])
        phi = phi if phi.dtype == torch.float64 else phi.float()
        check_finite(phi, name, "input")
        check_finite(target, name, "output", products=phi.dtype)
        return solve_rows(phi, target, prior, name=name, **options)
    where: dict[str, Any] = {"where": name, "device": prior.device}
    if geometry.groups == 1:
        moments = Moments(columns, len(prior), **where)
    else:
        prior = prior.view(geometry.groups, -1, columns)
        moments = BlockMoments(geometry.groups, columns, prior.shape[1], **where)
    for fit in fits:
        for phi, target in _merged(_rows(fit, envs)):
            moments.add(phi, target)
    return solve_full(
        moments.second,
        moments.mean,
        moments.cross,
        moments.y_mean,
        prior,
        overwrite=True,
        rows=moments.rows if isinstance(moments, Moments) else None,
        y_variance=moments.y_variance() if isinstance(moments, Moments) else None,
        name=name,
        **options,
    )


def _places(fit: Fit, envs: Sequence[Environment]) -> Iterator[tuple[Environment, Tensor | None]]:
    """Each batch with the positions of the layer's output that are looked at, None for all."""
    return zip(envs, fit.targets.positions, strict=True)


def _count(fit: Fit, env: Environment, positions: Tensor | None) -> int:
    """How many rows of the layer's input one batch gives."""
    if positions is not None:
        return len(positions)
    return math.prod(position_grid(tuple(env[fit.use.x.id].shape), fit.use.geometry))


def _rows(
    fit: Fit, envs: Sequence[Environment], some: float = 1.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of the layer's input as it is now, and of what it should make of them.

    Args:
        some: the part of them that is wanted, drawn at random.
    """
    generator = torch.Generator().manual_seed(fit.use.op)
    for number, (env, positions) in enumerate(_places(fit, envs)):
        target = _target(fit, number, env)
        there = _count(fit, env, positions)
        if there != len(target):
            raise RepairError(
                f"{fit.name} is given other rows by the cut network than by the dense one: which "
                "rows it sees depends on data that the cut changes (images sent to experts); give "
                "repair='scale' or 'none', or skip the groups before that choice"
            )
        if some < 1:
            drawn = torch.randperm(there, generator=generator)[: math.ceil(some * there)]
            drawn = drawn.sort().values.to(target.device)
            target, positions = target[drawn], drawn if positions is None else positions[drawn]
        for rows, phi in row_blocks(env[fit.use.x.id], fit.use.geometry, positions):
            yield phi, target[rows]


def _target(fit: Fit, number: int, env: Environment) -> Tensor:
    """What the layer should make of one batch: the dense output, and what its shortcut lost."""
    targets, shortcut = fit.targets, fit.use.shortcut
    y, undo = targets.y[number], targets.undo
    pick = None if fit.outputs is None else torch.tensor(fit.outputs, device=y.device)
    y = y if pick is None else y[:, pick]
    if undo is None or shortcut is None or (not targets.summed and shortcut.id not in env):
        return y
    undo = undo if pick is None else undo[pick]
    now = output_rows(
        fit.use.as_made(env[shortcut.id]), fit.use.geometry, targets.positions[number]
    )
    if targets.summed:
        return y - now * undo
    was = targets.shortcut[number]
    return y + ((was if pick is None else was[:, pick]) - now) * undo


def _merged(parts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The parts in larger pieces, as each sum of products costs a pass over the whole sum."""
    waiting: list[tuple[Tensor, Tensor]] = []
    entries = 0
    for phi, target in parts:
        if waiting and entries + phi.numel() > BLOCK:
            yield _joined(waiting)
            waiting, entries = [], 0
        waiting.append((phi, target))
        entries += phi.numel()
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    phi, target = zip(*parts, strict=True)
    return torch.cat(phi), torch.cat(target)
