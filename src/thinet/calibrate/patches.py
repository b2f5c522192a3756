"""What a consumer sees at one output position, as rows of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from thinet.errors import CalibrationError

BLOCK = 1 << 24  # entries of rows made at a time (64 MiB of float32)


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; a linear layer has no kernel at all.

    All tuples have one entry for each spatial dimension (0 for a linear layer, whose channels are
    the last dimension; 1 to 3 for a convolution, whose channels are dimension 1). `padding` is
    symmetric and made of zeros. `taps` is the number of kernel positions, 1 for a linear layer.

    A transposed convolution is one over its input spread apart (`transposed`): `spread` - 1 zeros
    between neighbours, and `extra` more behind the last. Its padding may be negative, which cuts.
    Both are empty for all others.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    spread: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.kernel), len(self.stride), len(self.padding), len(self.dilation)}
        if len(sizes) != 1 or not {len(self.spread), len(self.extra)} <= {0, self.rank}:
            raise CalibrationError(f"kernel, stride, padding and dilation differ in rank: {self}")

    @classmethod
    def transposed(
        cls,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        extra: tuple[int, ...],
    ) -> Geometry:
        """That of a transposed convolution, whose weight is turned for it (`Layer.matrix`).

        Output o is reached from input i through tap k where i * stride - padding + k * dilation
        = o; over the spread input and the mirrored kernel that is a convolution of stride 1.

        Args:
            kernel, stride, padding, dilation, extra: the operation's own (`extra` is its
                output_padding).
        """
        around = tuple(d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True))
        steps = (1,) * len(kernel)
        return cls(kernel, steps, around, dilation, spread=stride, extra=extra)

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size."""
        if self.spread:
            gaps = zip(size, self.spread, self.extra, strict=True)
            size = tuple((n - 1) * s + 1 + e for n, s, e in gaps)
        walks = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in walks)


def dense_weight(weight: Tensor, geometry: Geometry) -> Tensor:
    """The weight with every input channel present: (N, C, *kernel), zeros across groups.

    Args:
        weight: (N, C / groups, *kernel) of a convolution or (N, C) of a linear layer.
    """
    if geometry.groups == 1:
        return weight
    outputs, inner = weight.shape[:2]
    per_group = outputs // geometry.groups
    dense = weight.new_zeros(outputs, inner * geometry.groups, *weight.shape[2:])
    for g in range(geometry.groups):
        rows = slice(g * per_group, (g + 1) * per_group)
        dense[rows, g * inner : (g + 1) * inner] = weight[rows]
    return dense


def position_grid(shape: tuple[int, ...], geometry: Geometry) -> tuple[int, int]:
    """Images and output positions per image for an input of this shape.

    A linear layer on (images, ..., C) has one position for each entry between.
    """
    if geometry.rank == 0:
        images = shape[0] if len(shape) > 1 else 1
        return images, math.prod(shape[1:-1])
    if len(shape) == geometry.rank + 1:
        return 1, math.prod(geometry.output_size(shape[1:]))
    return shape[0], math.prod(geometry.output_size(shape[2:]))


def sample_positions(images: int, positions: int, rows: int, generator: torch.Generator) -> Tensor:
    """Draw (image, position) pairs without replacement, spread evenly over images and space.

    Each image gives `rows // images` positions or one more. Those of an image lie one in each of
    equally long runs of positions that start at a random place, so that every pair is drawn with
    the same probability; the cost grows with `rows` and not with the number of positions.

    Args:
        images: number of images.
        positions: output positions in each image.
        rows: pairs to draw; all of them if there are no more.

    Returns:
        (rows,) sorted flat indices `image * positions + position`, int64.
    """
    total = images * positions
    if rows >= total:
        return torch.arange(total)
    counts = torch.full((images,), rows // images)
    extra = torch.randperm(images, generator=generator)[: rows - int(counts.sum())]
    counts[extra] += 1
    image = torch.repeat_interleave(torch.arange(images), counts)
    rank = torch.arange(rows) - (counts.cumsum(0) - counts)[image]
    count = counts[image]
    start = rank * positions // count
    length = (rank + 1) * positions // count - start
    within = (torch.rand(rows, generator=generator, dtype=torch.float64) * length).long()
    shift = torch.randint(positions, (images,), generator=generator)[image]
    position = (start + within + shift) % positions
    return (image * positions + position).sort().values


def output_rows(y: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """Rows of a consumer's output at the positions at which `patches` looks at its input.

    Args:
        y: (images, N, *spatial) of a convolution or (..., N) of a linear layer.
        positions: flat (image, position) indices, or None for all.

    Returns:
        (rows, N).
    """
    if geometry.rank:
        y = (y if y.dim() == geometry.rank + 2 else y[None]).movedim(1, -1)
    if positions is None:
        return y.reshape(-1, y.shape[-1])
    positions = positions.to(y.device)
    if y.is_contiguous():
        return y.reshape(-1, y.shape[-1])[positions]
    return y[torch.unravel_index(positions, y.shape[:-1])]


def patches(x: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """The consumer's input at output positions: `phi @ W.flatten(1).T + bias` is its output.

    Only the windows asked for are read; nothing of the size of a full unfold is made for sampled
    positions.

    Args:
        x: (images, C, *spatial) of a convolution or (..., C) of a linear layer.
        positions: flat (image, position) indices as of `sample_positions`, or None for all.

    Returns:
        (rows, C * taps), columns channel-major: column = channel * taps + tap.
    """
    if geometry.rank == 0:
        return output_rows(x, geometry, positions)
    if x.dim() == geometry.rank + 1:
        x = x[None]
    size = tuple(x.shape[2:])
    out = geometry.output_size(size)
    if x.dim() != geometry.rank + 2 or min(out) < 1:
        raise CalibrationError(
            f"an input of shape {tuple(x.shape)} does not fit a convolution with {geometry}"
        )
    if geometry.taps == 1 and out == size and not any(geometry.padding):
        return output_rows(x, geometry, positions)
    if positions is None and geometry.rank == 2 and not geometry.spread:
        unfolded = functional.unfold(
            x, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride
        )
        return unfolded.transpose(1, 2).flatten(0, 1)
    if positions is None:
        positions = torch.arange(x.shape[0] * math.prod(out))
    return _windows(x, geometry, out, positions.to(x.device))


def row_blocks(
    x: Tensor, geometry: Geometry, positions: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """`patches` in blocks of rows, so that their memory stays small.

    Yields:
        Which of all rows, and (rows, C * taps).
    """
    channels = x.shape[-geometry.rank - 1]
    most = max(BLOCK // max(channels * geometry.taps, 1), 1)
    if geometry.rank and positions is None:
        x = x if x.dim() == geometry.rank + 2 else x[None]
        each = position_grid(tuple(x.shape), geometry)[1]
        start = 0
        for part in x.split(max(most // max(each, 1), 1)):
            rows = slice(start, start + len(part) * each)
            yield rows, patches(part, geometry)
            start = rows.stop
        return
    linear = output_rows(x, geometry, positions) if geometry.rank == 0 else None
    if linear is not None:
        for start in range(0, len(linear), most):
            rows = slice(start, min(start + most, len(linear)))
            yield rows, linear[rows]
        return
    assert positions is not None  # a convolution's rows are given, or all are taken above
    for start in range(0, len(positions), most):
        rows = slice(start, min(start + most, len(positions)))
        yield rows, patches(x, geometry, positions[rows])


def _windows(x: Tensor, geometry: Geometry, out: tuple[int, ...], positions: Tensor) -> Tensor:
    images, channels = x.shape[:2]
    image, *place = torch.unravel_index(positions, (images, *out))
    taps = torch.tensor(list(product(*(range(k) for k in geometry.kernel))), device=x.device)
    inside = torch.ones(len(positions), geometry.taps, dtype=torch.bool, device=x.device)
    index = image[:, None].expand_as(inside)
    for axis, start in enumerate(place):
        offset = taps[:, axis] * geometry.dilation[axis] - geometry.padding[axis]
        at = start[:, None] * geometry.stride[axis] + offset
        limit = x.shape[2 + axis]
        if geometry.spread:
            inside &= at % geometry.spread[axis] == 0
            at = at.div_(geometry.spread[axis], rounding_mode="floor")
        inside &= (at >= 0) & (at < limit)
        index = index * limit + at.clamp_(0, limit - 1)
    found = x.movedim(1, -1).reshape(-1, channels).index_select(0, index.flatten())
    found = found.view(len(positions), geometry.taps, channels)
    if any(geometry.padding) or geometry.spread:
        found.masked_fill_(~inside[..., None], 0)
    return found.transpose(1, 2).reshape(len(positions), channels * geometry.taps)
