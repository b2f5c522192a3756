"""Batches of an image folder: shuffled by epoch, decoded by threads or once and for all.

Everything random (order, crops, flips) is a function of a seed, the epoch and the batch's or
image's number, never of global state, so that a resumed run sees the same pixels. Pillow leaves the
interpreter lock while it decodes and resizes, so threads are enough.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from thinet.errors import DataError, OptionError
from thinet.folder import Batch, ImageFolder
from thinet.images import Corrupt
from thinet.seeds import generator
from thinet.types import Progress

log = logging.getLogger("thinet")

PRELOAD_BYTES = 2**30
"""Folders that fit in this many bytes are decoded once and kept, unless asked otherwise."""


def at_least(name: str, value: int, least: int) -> None:
    """Check a whole number that the caller gave."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least}, got {value!r}")


class Loader:
    """Batches of an image folder, the same for the same seed and epoch.

    Iterating gives `(images, labels)`, or `images` alone: float32 (n, 3, size, size), int64 (n,).
    Each iteration of a training loader is the next epoch; an evaluation loader always gives the
    same batches. Made by `loader` and `calibration_batches`.

    Attributes:
        folder: the images and what is done to them.
        mirror: whether the second, fourth, ... image of each batch is mirrored.
        corrupt: images that could not be decoded so far, with the reason. They are left out.
    """

    def __init__(
        self,
        folder: ImageFolder,
        *,
        batch_size: int,
        labelled: bool,
        workers: int | None,
        preload: bool | None,
        max_corrupt: float,
        progress: Progress | None,
        mirror: bool = False,
    ) -> None:
        at_least("batch_size", batch_size, 1)
        if not 0 <= max_corrupt < 1:
            raise OptionError(
                f"max_corrupt is a fraction, at least 0 and below 1, got {max_corrupt}"
            )
        if workers is not None:
            at_least("workers", workers, 1)
        self.folder = folder
        self.batch_size = batch_size
        self.labelled = labelled
        self.mirror = mirror
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.corrupt: dict[Path, str] = {}
        self._allowed = max(1, math.floor(max_corrupt * len(folder)))
        self._pixels: torch.Tensor | None = None
        self._next_epoch = 0
        size = 3 * folder.stored_side**2 * len(folder)
        if preload or (preload is None and size <= PRELOAD_BYTES):
            self._preload(size, progress)

    @property
    def images(self) -> int:
        """Number of images, those already found corrupt not counted."""
        return len(self.folder) - (0 if self._pixels is not None else len(self.corrupt))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels; empty for an unlabelled folder."""
        return self.folder.listing.classes

    def __len__(self) -> int:
        whole, rest = divmod(len(self.folder), self.batch_size)
        drop = self.folder.train and whole > 0
        return whole + (1 if rest and not drop else 0)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._next_epoch
        self._next_epoch += 1 if self.folder.train else 0
        for images, labels in self.epoch(epoch):
            if len(images):
                yield (images, labels) if labels is not None else images

    def epoch(
        self, epoch: int, batches: Sequence[int] | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """These batches (default all) of an epoch. A training loader shuffles by the epoch.

        A batch whose images are all corrupt comes out with no images.
        """
        order = self._order(epoch)
        chosen = range(len(self)) if batches is None else batches
        parts = [order[b * self.batch_size : (b + 1) * self.batch_size] for b in chosen]
        for images, labels in self._made(parts, chosen, epoch):
            if self.mirror:
                images[1::2] = images[1::2].flip(-1)
            yield images, labels

    def _made(
        self, parts: list[torch.Tensor], chosen: Sequence[int], epoch: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Batches of these images, which are those numbers of the epoch."""
        if self._pixels is None:
            yield from self._decoded(parts, epoch)
            return
        for number, indices in zip(chosen, parts, strict=True):
            random = generator("batch", self.folder.seed, epoch, number)
            yield self.folder.augmented(self._pixels[indices], random), self._labels(indices)

    def describe(self) -> dict[str, Any]:
        """What decides the batches, as plain data: two loaders that agree here give the same."""
        folder, listing = self.folder, self.folder.listing
        names = [path.relative_to(listing.root).as_posix() for path in listing.paths]
        sizes = [path.stat().st_size for path in listing.paths]  # other pictures of the same name
        digest = hashlib.blake2b(repr((names, sizes, listing.labels)).encode(), digest_size=16)
        augmentation = [folder.crop, folder.flip, folder.padding] if folder.train else None
        if self.mirror:
            augmentation = ["every second mirrored"]
        return {
            "images": len(folder),
            "files": digest.hexdigest(),
            "batch_size": self.batch_size,
            "preprocess": asdict(folder.preprocess),
            "augmentation": augmentation,
            "decoded": "once" if self._pixels is not None else "each epoch",
            "data seed": folder.seed,
        }

    def _order(self, epoch: int) -> torch.Tensor:
        if not self.folder.train:
            return torch.arange(len(self.folder))
        random = generator("order", self.folder.seed, epoch)
        return torch.randperm(len(self.folder), generator=random)

    def _labels(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor | None:
        labels = self.folder.listing.labels
        if not self.labelled or labels is None:
            return None
        return torch.tensor([labels[int(i)] for i in indices], dtype=torch.int64)

    def _decoded(
        self, parts: Sequence[torch.Tensor], epoch: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        side = self.folder.preprocess.size
        batches = self._in_threads(parts, lambda index: self.folder.pixels(index, epoch))
        for indices, results in zip(parts, batches, strict=True):
            good = [i for i, result in zip(indices.tolist(), results) if not self._failed(result)]
            pixels = [result for result in results if isinstance(result, torch.Tensor)]
            stacked = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)
            yield self.folder.preprocess.normalise(stacked), self._labels(good)

    def _in_threads(
        self, parts: Iterable[torch.Tensor], work: Callable[[int], torch.Tensor | Corrupt]
    ) -> Iterator[list[torch.Tensor | Corrupt]]:
        """The results of each part in order, the next two parts being worked on meanwhile."""
        pool = ThreadPoolExecutor(self.workers)
        waiting: deque[list[Future[torch.Tensor | Corrupt]]] = deque()
        try:
            for indices in parts:
                waiting.append([pool.submit(work, index) for index in indices.tolist()])
                if len(waiting) > 2:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _preload(self, size: int, progress: Progress | None) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise DataError(
                f"{len(self.folder)} images decoded take {size / 1e9:.0f} GB, this machine has "
                f"{memory / 1e9:.0f} GB; use preload=False or a smaller size"
            )
        total, side = len(self.folder), self.folder.stored_side
        pixels = torch.empty(total, 3, side, side, dtype=torch.uint8)
        good: list[int] = []
        parts = torch.arange(total).split(64)
        for indices, results in zip(parts, self._in_threads(parts, self.folder.stored)):
            for index, result in zip(indices.tolist(), results):
                if isinstance(result, torch.Tensor):
                    pixels[len(good)] = result
                    good.append(index)
                else:
                    self._failed(result)
            if progress is not None:
                progress("decoding images", int(indices[-1]) + 1, total)
        if not good:
            raise DataError(f"no image in {self.folder.listing.root} can be decoded")
        self.folder.listing = self.folder.listing.pick(good)
        self._pixels = pixels[: len(good)]

    def _failed(self, result: torch.Tensor | Corrupt) -> bool:
        """Whether it is a corrupt image, which is named, counted, and too many an error."""
        if isinstance(result, torch.Tensor):
            return False
        if result.path not in self.corrupt:
            self.corrupt[result.path] = result.reason
            log.warning("left out %s: it cannot be decoded (%s)", result.path, result.reason)
        if len(self.corrupt) > self._allowed:
            raise DataError(
                f"{len(self.corrupt)} corrupt images in {self.folder.listing.root}, the last "
                f"{result.path} ({result.reason}); at most {self._allowed} of {len(self.folder)} "
                "are left out. Remove or replace them, or raise --max-corrupt (max_corrupt of the "
                "loader)"
            )
        return True
