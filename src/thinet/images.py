"""Images on disk: finding them, decoding any of them to 8-bit RGB, cutting them to one size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from thinet.errors import DataError, MissingExtraError, OptionError

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)

Protocol = Literal["keep-ratio", "fixed"]


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in the order in which everything counts them.

    `labels` is None where the folder has no classes; otherwise `labels[i]` is the position in
    `classes` (sorted names) of the class of `paths[i]`. `empty` are folders beside those of the
    classes that hold no image, and may be classes too.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...]
    empty: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, indices: Sequence[int]) -> Listing:
        """The listing of these images only; the classes stay."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in indices)
        return replace(self, paths=tuple(self.paths[i] for i in indices), labels=labels)


def find_images(root: str | Path) -> Listing:
    """The images below a folder, sorted by class and then by path.

    Labelled if every image lies in a folder of its class directly below `root`; otherwise
    unlabelled, all images of the folder and its folders. Hidden files and folders are passed over.

    Raises:
        DataError: the folder is missing, is not a folder, is empty, or holds no images.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"there is no folder {root}")
    if not root.is_dir():
        raise DataError(f"{root} is a file; give the folder that holds the images")
    loose = [path for path in sorted(root.iterdir()) if _is_image(path)]
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    by_class = {folder.name: list(_below(folder)) for folder in folders}
    empty = tuple(name for name, paths in by_class.items() if not paths)
    by_class = {name: paths for name, paths in by_class.items() if paths}
    if not loose and not by_class:
        raise DataError(_nothing_in(root))
    if loose or len(by_class) < 2:
        paths = sorted(loose + [path for paths in by_class.values() for path in paths])
        return Listing(root, tuple(paths), None, ())
    classes = tuple(sorted(by_class))
    labels = tuple(k for k, name in enumerate(classes) for _ in by_class[name])
    paths = tuple(p for name in classes for p in by_class[name])
    return Listing(root, paths, labels, classes, empty)


def _below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if _is_image(path))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.name[0] != "." and path.is_file()


def _nothing_in(root: Path) -> str:
    if not any(root.iterdir()):
        return f"{root} is empty; images are expected in it, or one folder of images a class"
    known = " ".join(sorted(EXTENSIONS))
    return f"no image in {root} or its folders (looked for {known})"


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes numbers: short side to `resize`, centre crop, (x / 255 - mean) / std.

    Attributes:
        size: side of the square that the model sees, in pixels.
        mean: of each channel, on the scale 0..1.
        std: of each channel, on the scale 0..1.
        resize: short side before the crop; None takes 8/7 of `size` (256 for 224). An image that
            is `size` x `size` already is taken as it is, unless `resize` is given.
        protocol: `keep-ratio`, or `fixed`, which squeezes the image to a square of side `resize`
            first (the protocol of the tables of ThiNet, ICCV 2017).
    """

    size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: int | None = None
    protocol: Protocol = "keep-ratio"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if self.size < 1:
            raise OptionError(f"size must be at least 1 pixel, got {self.size}")
        if self.resize is not None and self.resize < self.size:
            raise OptionError(f"resize ({self.resize}) must not be below size ({self.size})")
        if self.protocol not in ("keep-ratio", "fixed"):
            raise OptionError(f"protocol must be keep-ratio or fixed, got {self.protocol!r}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(abs(value) < float("inf") for value in values):
                raise OptionError(
                    f"{name} must be three numbers on the scale 0..1, got {values}; image folders "
                    "are read as RGB, give a model of other inputs its batches in Python"
                )
        if min(self.std) <= 0:
            raise OptionError(f"std must be above zero, got {self.std}")
        if max(map(abs, (*self.mean, *self.std))) > 10:
            raise OptionError(f"mean and std are on the scale 0..1, got {self.mean} and {self.std}")

    @property
    def short_side(self) -> int:
        return self.resize if self.resize is not None else round(self.size * 8 / 7)

    def square(self, image: Image.Image, side: int | None = None) -> Image.Image:
        """The centre square of an image, `side` (default `size`) pixels wide."""
        side = side or self.size
        width, height = image.size
        if (width, height) == (side, side) and self.resize is None:
            return image
        short = max(self.short_side, side)
        if self.protocol == "fixed":
            width = height = short
        elif width <= height:
            width, height = short, max(side, int(height * short / width))
        else:
            width, height = max(side, int(width * short / height)), short
        if (width, height) != image.size:
            image = image.resize((width, height), _pil().Resampling.BILINEAR)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return image.crop((left, top, left + side, top + side))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, height, width) bytes to normalised float32."""
        std = torch.tensor(self.std).view(3, 1, 1)
        mean = torch.tensor(self.mean).view(3, 1, 1)
        return (pixels.float() * (1 / (255 * std))).sub_(mean / std)


@dataclass(frozen=True)
class Corrupt:
    """An image that could not be decoded, and why."""

    path: Path
    reason: str


def decode(path: Path) -> Image.Image | Corrupt:
    """An image file as 8-bit RGB, whatever it holds.

    Grey and palette images become RGB, transparency is dropped, 16-bit values are divided by 257,
    float images are taken on the scale 0..1; what lies outside is corrupt. Stored orientation
    (EXIF) is not applied, as in torchvision, so that figures agree with published ones.
    """
    library = _pil()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with library.open(path) as image:
                return _to_rgb(image)
    # whatever a decoder throws at bad bytes, it is one image that cannot be used
    except Exception as error:  # noqa: BLE001
        return Corrupt(path, f"{type(error).__name__}: {error}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        most = 1.0 if image.mode == "F" else 65535.0
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > most:
            raise ValueError(
                f"its numbers ({values.min():g} to {values.max():g}) are not all on the scale "
                f"0..{most:g} of {'float' if image.mode == 'F' else '16-bit'} images"
            )
        grey = np.rint(values * (255.0 / most)).astype(np.uint8)
        return _pil().fromarray(grey).convert("RGB")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def to_bytes(image: Image.Image) -> torch.Tensor:
    """An RGB image as a uint8 tensor (3, height, width)."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).permute(2, 0, 1)


def _pil() -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "pillow is needed to read images and is not installed: pip install thinet[vision]"
        ) from error
    return Image
