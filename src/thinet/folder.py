"""A folder of images as a data set: one image at a time, augmented by seed, epoch and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from thinet.augment import Crop, flips, padded_crops, random_boxes, resized_crops
from thinet.errors import DataError, OptionError
from thinet.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Corrupt,
    Listing,
    Preprocess,
    Protocol,
    decode,
    find_images,
    to_bytes,
)
from thinet.seeds import generator

Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class ImageFolder(Dataset[Any]):
    """Images of a folder as normalised tensors (3, size, size), with labels if it has classes.

    Args:
        root: folder of images, or of one folder of images a class (labels: sorted names).
        size, mean, std, resize, protocol: see `thinet.images.Preprocess`.
        train: augment: random crops and flips in place of the centre crop.
        crop: with `train`, `resized` (random part of the picture), `padded` (moved by up to
            `padding` pixels, as is usual for CIFAR) or `centre` (none).
        flip: with `train`, mirror every other image.
        seed: of the augmentation.

    Raises:
        DataError: the folder is missing or empty or holds no images.
        OptionError: sizes, means or the crop are not usable.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int = 224,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        resize: int | None = None,
        protocol: Protocol = "keep-ratio",
        train: bool = False,
        crop: Crop = "resized",
        flip: bool = True,
        padding: int = 4,
        seed: int = 0,
    ) -> None:
        if crop not in ("resized", "padded", "centre"):
            raise OptionError(f"crop must be resized, padded or centre, got {crop!r}")
        if not 0 <= padding <= size:
            raise OptionError(f"padding must lie between 0 and size ({size}), got {padding}")
        self.preprocess = Preprocess(size, mean, std, resize, protocol)
        self.crop: Crop = crop if train else "centre"
        self.flip = flip and train
        self.padding = padding
        self.train = train
        self.seed = seed
        self.listing: Listing = find_images(root)

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index: int) -> Batch:
        pixels = self.pixels(index, epoch=0)
        if isinstance(pixels, Corrupt):
            raise DataError(f"{pixels.path} cannot be decoded ({pixels.reason})")
        image = self.preprocess.normalise(pixels)
        labels = self.listing.labels
        return image if labels is None else (image, torch.tensor(labels[index]))

    def pixels(self, index: int, epoch: int) -> torch.Tensor | Corrupt:
        """One image as bytes (3, size, size), augmented as for this epoch."""
        image = decode(self.listing.paths[index])
        if isinstance(image, Corrupt):
            return image
        size = self.preprocess.size
        if self.crop == "centre" and not self.flip:
            return to_bytes(self.preprocess.square(image))
        random = generator("image", self.seed, epoch, index)
        if self.crop == "padded":
            pixels = to_bytes(self.preprocess.square(image))[None]
            return padded_crops(pixels, self.padding, self.flip, random)[0]
        if self.crop == "centre":
            pixels = to_bytes(self.preprocess.square(image))
        else:
            x, y, w, h = random_boxes(1, image.width, image.height, random)[0].tolist()
            pixels = to_bytes(image.resize((size, size), resample=2, box=(x, y, x + w, y + h)))
        return pixels.flip(2) if self.flip and bool(flips(1, random)) else pixels

    @property
    def stored_side(self) -> int:
        """Side of the squares that are kept when the folder is decoded once."""
        resized = self.crop == "resized"
        return self.preprocess.short_side if resized else self.preprocess.size

    def stored(self, index: int) -> torch.Tensor | Corrupt:
        """One image as bytes (3, side, side) with side = `stored_side`, not augmented."""
        image = decode(self.listing.paths[index])
        if isinstance(image, Corrupt):
            return image
        return to_bytes(self.preprocess.square(image, self.stored_side))

    def augmented(self, stored: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """A batch of stored images (n, 3, side, side), augmented and normalised."""
        if self.crop == "padded":
            stored = padded_crops(stored, self.padding, self.flip, random)
        elif self.crop == "resized":
            stored = resized_crops(stored, self.preprocess.size, self.flip, random)
        elif self.flip:
            mirror = flips(len(stored), random)[:, None, None, None]
            stored = torch.where(mirror, stored.flip(3), stored)
        return self.preprocess.normalise(stored)
