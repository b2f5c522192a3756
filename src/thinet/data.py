"""Image folders as batches: for training and evaluation, and a sample for calibration."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from thinet.augment import Crop
from thinet.errors import DataError
from thinet.folder import ImageFolder
from thinet.images import IMAGENET_MEAN, IMAGENET_STD, Listing, Protocol
from thinet.loading import Loader, at_least
from thinet.seeds import generator
from thinet.types import Progress

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageFolder",
    "Loader",
    "calibration_batches",
    "loader",
]

log = logging.getLogger("thinet")


def loader(
    root: str | Path,
    *,
    size: int = 224,
    batch_size: int = 64,
    train: bool = False,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    resize: int | None = None,
    protocol: Protocol = "keep-ratio",
    crop: Crop = "resized",
    flip: bool = True,
    padding: int = 4,
    every: int = 1,
    seed: int = 0,
    workers: int | None = None,
    preload: bool | None = None,
    max_corrupt: float = 0.01,
    progress: Progress | None = None,
) -> Loader:
    """Labelled batches of an image folder, for training or evaluation.

    Args:
        root, size, mean, std, resize, protocol, crop, flip, padding: see `ImageFolder`.
        train: shuffle, augment, and drop the last batch if it is not full.
        every: take each `every`-th image only (1: all), in the folder's order.
        seed: of shuffling and augmentation.
        workers: threads that decode; None: one a core, at most 8.
        preload: decode once and keep the bytes; None: if they fit in `PRELOAD_BYTES`. Augmentation
            then works on the kept square and for the whole batch at once.
        max_corrupt: fraction of corrupt images, at least one image, that is left out (and named in
            the log and in `Loader.corrupt`) before it becomes an error.
        progress: told of the decoding when the images are preloaded.

    Raises:
        DataError: the folder is missing, empty or has no classes, or too many images are corrupt.
        OptionError: an option is out of its range.
    """
    folder = ImageFolder(
        root, size=size, mean=mean, std=std, resize=resize, protocol=protocol, train=train,
        crop=crop, flip=flip, padding=padding, seed=seed,
    )  # fmt: skip
    at_least("every", every, 1)
    _check_labels(folder.listing, "; training and evaluation need")
    folder.listing = folder.listing.pick(range(0, len(folder), every))
    return Loader(
        folder, batch_size=batch_size, labelled=True, workers=workers, preload=preload,
        max_corrupt=max_corrupt, progress=progress,
    )  # fmt: skip


def calibration_batches(
    root: str | Path,
    count: int = 1000,
    batch_size: int = 64,
    size: int = 224,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    seed: int = 0,
    *,
    resize: int | None = None,
    protocol: Protocol = "keep-ratio",
    labels: bool = False,
    mirror: bool = False,
    workers: int | None = None,
    max_corrupt: float = 0.01,
    progress: Progress | None = None,
) -> Loader:
    """A fixed sample of `count` images of a folder, evenly over its classes where it has any.

    Every iteration gives the same tensors (n, 3, size, size), mixed over the classes; with
    `labels`, pairs with int64 labels (n,). A folder with fewer images gives all of them and a line
    in the log (`Loader.images` tells the number). With `mirror`, every second image is mirrored:
    a network that was trained on both is measured on both, with no more images.

    Raises:
        DataError: the folder is missing or empty, or too many images are corrupt, or labels are
            asked of a folder without classes.
        OptionError: an option is out of its range.
    """
    folder = ImageFolder(root, size=size, mean=mean, std=std, resize=resize, protocol=protocol)
    at_least("count", count, 1)
    if labels:
        _check_labels(folder.listing, ", so its images have no labels; they need")
    if len(folder) < count:
        log.warning("%s has %d images, %d were asked for", root, len(folder), count)
    folder.listing = folder.listing.pick(_even_sample(folder.listing, count, seed))
    return Loader(
        folder, batch_size=batch_size, labelled=labels, workers=workers, preload=None,
        max_corrupt=max_corrupt, progress=progress, mirror=mirror,
    )  # fmt: skip


def _check_labels(listing: Listing, needed_by: str) -> None:
    """Raise a `DataError` where the folder does not tell the labels of its images."""
    if listing.labels is None:
        raise DataError(
            f"{listing.root} has no classes{needed_by} one folder of images a class, two or more "
            "of them and no image beside them"
        )
    if listing.empty:
        raise DataError(
            f"{listing.root}: no image in {', '.join(listing.empty[:5])}; labels are counted by "
            "folder, and all behind an empty one would be off by one: fill it or, if it is no "
            "class, remove it"
        )


def _even_sample(listing: Listing, count: int, seed: int) -> list[int]:
    """Rounds over the classes, one image of each drawn without replacement, classes shuffled."""
    labels = listing.labels or (0,) * len(listing)
    random = generator("calibration", seed)
    by_class: dict[int, list[int]] = {}
    for index in torch.randperm(len(listing), generator=random).tolist():
        by_class.setdefault(labels[index], []).append(index)
    queues = list(by_class.values())
    rounds = max(map(len, queues))
    drawn = [queue[i] for i in range(rounds) for queue in queues if i < len(queue)]
    return drawn[:count]
