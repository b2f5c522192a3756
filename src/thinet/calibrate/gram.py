"""ThiNet's objective over all filters and positions at once, as one small matrix.

With x_c the part of a consumer's output that channel c makes (summed over its kernel taps),

    G[c, c'] = E[sum over outputs of x_c x_c'] = sum over the taps block (c, c') of (W' W) * H,

so that E || sum of x_c over c in T ||^2 = 1_T' G 1_T: ThiNet's objective (ICCV 2017, eq. 6) for the
removed set T without a single sample. Weighed by the loss, W is R W (`curvature.weighed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PANEL = 512  # columns of W' W made at a time
_OUTPUTS = 128  # of a wide consumer looked at together, whose weights are large
_ROW_BLOCK = 1 << 23  # entries of the per-output parts made at a time by `gram_rows`


def gram(
    second: Tensor,
    weight: Tensor,
    units: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """G from the second moments of the consumer's input.

    Costs N (C taps)^2 multiply-adds, half of 2x by symmetry, and one panel of extra memory.

    Args:
        second: (C * taps, C * taps) E[phi phi'] (or its sum: G scales with it), or the covariance,
            for an intercept that follows the channels' means.
        weight: (N, C, *kernel), dense over groups.
        units: (C,) unit of each input channel, -1 for channels that are not of the group; None
            where channels are the units.
        count: number of units, needed where some unit may have no channel here.

    Returns:
        (units, units) float64, symmetric.
    """
    columns = _matrix(weight)
    channels, size = weight.shape[1], columns.shape[1]
    taps = size // channels
    step = max(_PANEL // taps, 1) * taps
    total = second.new_zeros(channels, channels, dtype=torch.float64)
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        part = second[rows, start:] * (columns[:, rows].T @ columns[:, start:])
        block = part.view(-1, taps, (size - start) // taps, taps).sum((1, 3))
        total[start // taps : rows.stop // taps, start // taps :] = block
    total = total.triu() + total.triu(1).T
    return total if units is None else fold_units(total, units, count)


def _matrix(weight: Tensor) -> Tensor:
    columns = weight.detach().flatten(1)
    return columns if columns.dtype in (torch.float32, torch.float64) else columns.float()


def fold_units(per_channel: Tensor, units: Tensor, count: int | None = None) -> Tensor:
    """Sum (C, C) entries of channels into (units, units) entries of their units."""
    units = units.to(per_channel.device)
    member = torch.nonzero(units >= 0).squeeze(1)
    size = int(units.max()) + 1 if count is None else count
    half = per_channel.new_zeros(size, len(member))
    half.index_add_(0, units[member], per_channel[member][:, member])
    return per_channel.new_zeros(size, size).index_add_(1, units[member], half)


def unit_sums(parts: Tensor, units: Tensor, count: int | None = None) -> Tensor:
    """Sum the (rows, C) parts of channels into (rows, units) parts of their units."""
    units = units.to(parts.device)
    member = torch.nonzero(units >= 0).squeeze(1)
    size = int(units.max()) + 1 if count is None else count
    return parts.new_zeros(len(parts), size).index_add_(1, units[member], parts[:, member])


def gram_rows(
    phi: Tensor,
    weight: Tensor,
    units: Tensor | None = None,
    count: int | None = None,
    *,
    sketch: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """G summed over rows (divide by their number for the mean), without ever forming H.

    Makes the parts z[row, output, unit] block by block and multiplies them with themselves:
    rows * N * (C taps + units^2 / 2) multiply-adds. For a wide layer behind a flatten (C taps of
    25,088 in VGG-16, of 512 units) this fits in memory where H would not; always say which columns
    make a unit there.

    Args:
        phi: (rows, C * taps).
        weight: (N, C, *kernel), dense over groups.
        units, count: as for `gram`.
        sketch: replace the N outputs by this many random mixtures of them, all +-1, drawn anew in
            each call: an unbiased estimate at sketch / N of the cost.
        generator: of the mixtures.

    Returns:
        (units, units) float64, symmetric.
    """
    columns = _matrix(weight)
    if sketch is not None and sketch < len(columns):
        signs = torch.randint(2, (sketch, len(columns)), generator=generator) * 2 - 1
        columns = signs.to(columns) @ columns / sketch**0.5
    channels, taps = weight.shape[1], weight[0, 0].numel()
    if units is None:
        units = torch.arange(channels)
    count = int(units.max()) + 1 if count is None else count
    pick, present = _columns_of_units(units.to(phi.device), count, taps)
    by_unit = (columns[:, pick] * present).permute(1, 2, 0)  # (units, columns, N)
    outputs = len(columns)
    total = torch.zeros(count, count, dtype=torch.float64, device=phi.device)
    for rows in phi.split(max(_ROW_BLOCK // (count * outputs), 1)):
        parts = torch.bmm(rows[:, pick].to(by_unit).transpose(0, 1), by_unit).flatten(1)
        total += parts @ parts.T
    return total


class PartSums:
    """Streaming moments of the parts z that units make of the outputs of a wide consumer.

    What varies within a batch is estimated by random mixtures of the outputs (`gram_rows`); the
    batch's mean, which is most of it behind a ReLU, is taken apart and is exact.

    Args:
        weight: (N, C, *kernel), dense over groups.
        groups: name, number of units, unit of each input channel.
        sketch: as for `gram_rows`.
    """

    def __init__(
        self, weight: Tensor, groups: Sequence[tuple[str, int, Tensor]], sketch: int
    ) -> None:
        self._weight, self._sketch = weight, sketch
        self._groups = {name: (units, count) for name, count, units in groups}
        self._second: dict[str, Tensor] = {}
        self._mean: dict[str, Tensor] = {}

    def add(self, phi: Tensor, share: float, generator: torch.Generator) -> None:
        """Add a batch.

        Args:
            phi: (rows, C * taps).
            share: the batch's part of all.
        """
        phi = phi if phi.dtype == torch.float64 else phi.float()
        mean = phi.mean(0)
        varies = phi - mean
        for name, (units, count) in self._groups.items():
            within = gram_rows(
                varies, self._weight, units, count, sketch=self._sketch, generator=generator
            )
            parts = self._parts(mean, units, count)
            second = share * (within / len(phi) + parts.T @ parts)
            self._second[name] = self._second.get(name, 0) + second
            self._mean[name] = self._mean.get(name, 0) + share * parts

    def gram(self, name: str) -> Tensor:
        """(units, units) the mean of z z': ThiNet's objective."""
        return self._second[name]

    def centred(self, name: str) -> Tensor:
        """(units, units) the same with each part's own mean taken away."""
        mean = self._mean[name]
        return self._second[name] - mean.T @ mean

    def _parts(self, phi: Tensor, units: Tensor, count: int) -> Tensor:
        """(N, units) float64, what the units make of one input."""
        channels, found = self._weight.shape[1], []
        for columns in _matrix(self._weight).split(_OUTPUTS):
            parts = (columns * phi.to(columns)).view(len(columns), channels, -1).sum(2)
            found.append(unit_sums(parts.double(), units, count))
        return torch.cat(found)


def _columns_of_units(units: Tensor, count: int, taps: int) -> tuple[Tensor, Tensor]:
    """(units, largest) columns of each unit, and which of them are not mere padding."""
    columns = units.repeat_interleave(taps)
    member = torch.nonzero(columns >= 0).squeeze(1)
    member = member[columns[member].argsort(stable=True)]
    sizes = torch.bincount(columns[member], minlength=count)
    rank = torch.arange(len(member), device=units.device)
    rank = rank - (sizes.cumsum(0) - sizes)[columns[member]]
    pick = columns.new_zeros(count, int(sizes.max()))
    present = torch.zeros_like(pick, dtype=torch.bool)
    pick[columns[member], rank] = member
    present[columns[member], rank] = True
    return pick, present
