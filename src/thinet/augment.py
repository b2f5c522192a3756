"""Random crops and flips of a whole batch of stored pixels at once."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional

Crop = Literal["resized", "padded", "centre"]

AREA = (0.35, 1.0)
"""Share of the picture that a random resized crop takes. Less than ImageNet's usual 0.08 is for
networks trained for many epochs; short training and fine-tuning do better with more."""

ASPECT = (3 / 4, 4 / 3)


def random_boxes(count: int, width: int, height: int, random: torch.Generator) -> torch.Tensor:
    """Boxes of random area and aspect ratio (Szegedy et al. 2015), (count, 4) as x, y, w, h.

    In pixels, not rounded, always inside the picture.
    """
    low, high = AREA
    area = torch.empty(count).uniform_(low, high, generator=random) * (width * height)
    spread = math.log(ASPECT[1])
    aspect = torch.empty(count).uniform_(-spread, spread, generator=random).exp()
    w = (area * aspect).sqrt().clamp(max=width)
    h = (area / aspect).sqrt().clamp(max=height)
    corner = torch.rand(count, 2, generator=random)
    return torch.stack([corner[:, 0] * (width - w), corner[:, 1] * (height - h), w, h], dim=1)


def flips(count: int, random: torch.Generator) -> torch.Tensor:
    """Which of `count` images are mirrored (bool), one in two."""
    return torch.rand(count, generator=random) < 0.5


def padded_crops(
    pixels: torch.Tensor, padding: int, flip: bool, random: torch.Generator
) -> torch.Tensor:
    """Each image moved by up to `padding` pixels, black moving in, and mirrored or not.

    Args:
        pixels: (images, 3, side, side), any dtype; it is not changed.
    """
    count, _, side, _ = pixels.shape
    shift = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=random)
    rows, columns = torch.arange(side) + shift
    if flip:
        columns = torch.where(flips(count, random)[:, None], columns.flip(1), columns)
    padded = functional.pad(pixels, [padding] * 4)
    image = torch.arange(count)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crops(
    pixels: torch.Tensor, size: int, flip: bool, random: torch.Generator
) -> torch.Tensor:
    """A random box of each image, bilinearly resized to `size` x `size`, and mirrored or not.

    Args:
        pixels: (images, 3, height, width) bytes; it is not changed.

    Returns:
        (images, 3, size, size) float32 on the scale 0..255.
    """
    count, _, height, width = pixels.shape
    x, y, w, h = random_boxes(count, width, height, random).T
    sign = torch.where(flips(count, random), -1.0, 1.0) if flip else torch.ones(count)
    zero = torch.zeros(count)
    across = torch.stack([sign * w / width, zero, (2 * x + w) / width - 1], dim=1)
    down = torch.stack([zero, h / height, (2 * y + h) / height - 1], dim=1)
    shape = [count, 3, size, size]
    grid = functional.affine_grid(torch.stack([across, down], dim=1), shape, align_corners=False)
    return functional.grid_sample(
        pixels.float(), grid, "bilinear", padding_mode="border", align_corners=False
    )
