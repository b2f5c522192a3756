"""Labelled images as the options describe them, and whether their labels are the model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from thinet import data
from thinet.augment import Crop
from thinet.cli import console
from thinet.errors import DataError
from thinet.images import Listing, Preprocess
from thinet.observe import evaluating
from thinet.report.text import counted
from thinet.train.outputs import logits_of, output_of
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
    max_corrupt: float = 0.01,
    progress: Progress | None = None,
) -> data.Loader:
    """Labelled batches of a folder, prepared as the options say."""
    return data.loader(
        folder, size=pictures.size, mean=pictures.mean, std=pictures.std, resize=pictures.resize,
        batch_size=batch, every=every, train=train, crop=crop, flip=flip, seed=seed,
        max_corrupt=max_corrupt, progress=progress,
    )  # fmt: skip


def check_classes(
    model: nn.Module, inputs: torch.Tensor, *loaders: data.Loader | None
) -> tuple[str, ...]:
    """Compare the folders' classes with the model's outputs; call it before the first batch.

    Labels are positions of folders, so a folder with some of the classes only has wrong labels,
    and nothing else would show it.

    Args:
        inputs: one image, on the model's device.
        loaders: what is scored or trained on; None, and those without labels, are passed over.

    Returns:
        A note for each folder with fewer classes than the model has outputs, also said on stderr.

    Raises:
        DataError: a folder has more classes than the model has outputs, or two folders number
            their classes differently.
        ModelError: the model does not run on the image, or gives no logits.
    """
    labels = [loader for loader in loaders if loader is not None and loader.labelled]
    if not labels:
        return ()
    _check_alike([loader.folder.listing for loader in labels])
    with evaluating(model), torch.no_grad():
        outputs = logits_of(output_of(model, inputs, "an image of noise")).shape[1]
    notes: list[str] = []
    for loader in labels:
        root, classes = loader.folder.listing.root, len(loader.classes)
        there = f"{root} has {classes} class folders, the model has {counted(outputs, 'output')}"
        if classes > outputs:
            raise DataError(
                f"{there}; give images of the classes that it was trained on, or a classifier of "
                "that size (--classes)"
            )
        if classes < outputs:
            notes.append(
                f"{there}: label k is the k-th folder by name, counted from 0; if the model "
                "numbers its classes otherwise, its accuracy and its training are wrong"
            )
    notes = list(dict.fromkeys(notes))
    for note in notes:
        console.warn(note)
    return tuple(notes)


def _check_alike(listings: Sequence[Listing]) -> None:
    first = listings[0]
    for other in listings[1:]:
        pairs = enumerate(zip(first.classes, other.classes, strict=False))
        odd = next(((k, *names) for k, names in pairs if names[0] != names[1]), None)
        if odd is not None:
            raise DataError(
                f"label {odd[0]} is {odd[1]} in {first.root} and {odd[2]} in {other.root}: label k "
                "is the k-th class folder by name; give both the same class folders"
            )
