"""Folders of small pictures, and a command line that runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

Run = Callable[..., tuple[int, str, str]]
"""A command line: exit code, stdout, stderr."""


def draw(folder: Path, *, classes: int, each: int, side: int = 8, step: int = 60) -> None:
    """A folder for each class, "0", "1", ..., the later the brighter.

    Args:
        step: in brightness from class to class; pictures are noise over half as much again.
    """
    random = torch.Generator().manual_seed(0)
    for number in range(classes):
        (folder / str(number)).mkdir(parents=True)
        low, high = step * number, step * number + step * 3 // 2
        for i in range(each):
            pixels = torch.randint(low, high, (side, side, 3), generator=random)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / str(number) / f"{i}.png")
