"""Labelled images as the options describe them."""

from __future__ import annotations

from pathlib import Path

from thinet import data
from thinet.augment import Crop
from thinet.images import Preprocess
from thinet.types import Progress


def labelled(
    folder: Path,
    pictures: Preprocess,
    *,
    batch: int,
    every: int = 1,
    train: bool = False,
    crop: Crop = "resized",
    flip: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> data.Loader:
    """Labelled batches of a folder, prepared as the options say."""
    return data.loader(
        folder, size=pictures.size, mean=pictures.mean, std=pictures.std, resize=pictures.resize,
        batch_size=batch, every=every, train=train, crop=crop, flip=flip, seed=seed,
        progress=progress,
    )  # fmt: skip
