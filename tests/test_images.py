"""Finding images, decoding every kind to 8-bit RGB, cutting them to one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from thinet.errors import DataError, OptionError
from thinet.images import Corrupt, Preprocess, decode, find_images, to_bytes


def save(path: Path, colour: Any = (10, 20, 30), mode: str = "RGB", size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), colour).save(path)
    return path


def test_one_folder_a_class_gives_labels_in_sorted_order(tmp_path: Path) -> None:
    for name in ("zebra/b.png", "zebra/a.png", "ant/deep/x.PNG", "ant/y.png", ".hidden/z.png"):
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / "._y.png").write_text("a companion file")
    listing = find_images(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in listing.paths]
    assert names == ["ant/deep/x.PNG", "ant/y.png", "zebra/a.png", "zebra/b.png"]
    assert listing.labels == (0, 0, 1, 1)
    assert listing.classes == ("ant", "zebra")
    assert listing.pick([3, 0]).labels == (1, 0)


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("one/a.png",), ("a.png", "x/b.png")])
def test_other_folders_are_unlabelled(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save(tmp_path / name)
    listing = find_images(tmp_path)
    assert len(listing) == len(names)
    assert listing.labels is None
    assert listing.classes == ()


def test_folders_without_images_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file; give the folder"):
        find_images(save(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty; images are expected"):
        find_images(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").touch()
    with pytest.raises(DataError, match=r"no image in .*text or its folders \(looked for .*\.jpg"):
        find_images(tmp_path / "text")


@pytest.mark.parametrize(
    ("name", "mode", "colour", "wanted"),
    [
        ("rgb.png", "RGB", (1, 2, 3), (1, 2, 3)),
        ("grey.png", "L", 77, (77, 77, 77)),
        ("two.png", "LA", (77, 0), (77, 77, 77)),
        ("clear.png", "RGBA", (9, 8, 7, 0), (9, 8, 7)),
        ("bit.png", "1", 1, (255, 255, 255)),
        ("deep.png", "I;16", 257 * 100, (100, 100, 100)),
        ("float.tif", "F", 0.5, (128, 128, 128)),
        ("ink.tif", "CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, name: str, mode: str, colour: Any, wanted: tuple[int, ...]
) -> None:
    image = decode(save(tmp_path / name, colour, mode))
    assert not isinstance(image, Corrupt)
    assert image.mode == "RGB"
    assert to_bytes(image)[:, 1, 2].tolist() == list(wanted)


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 40, 50, 60])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80")
    decoded = decode(tmp_path / "p.png")
    assert not isinstance(decoded, Corrupt)
    assert to_bytes(decoded)[:, 0, 0].tolist() == [40, 50, 60]


def test_bytes_are_channels_rows_columns() -> None:
    array = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    pixels = to_bytes(Image.fromarray(array))
    assert pixels.shape == (3, 2, 3)
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(array))


@pytest.mark.parametrize("keep", [0, 30, 400])
def test_a_damaged_file_is_corrupt_not_an_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    result = decode(path)
    assert isinstance(result, Corrupt)
    assert result.path == path
    assert result.reason


def squares(width: int, height: int, **options: Any) -> tuple[Preprocess, Image.Image]:
    """An image whose red is the column and whose green is the row."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[..., 0] = np.arange(width)
    array[..., 1] = np.arange(height)[:, None]
    return Preprocess(**options), Image.fromarray(array)


def test_the_centre_is_cut_out_after_resizing_the_short_side() -> None:
    preprocess, image = squares(20, 12, size=8, resize=12)
    pixels = to_bytes(preprocess.square(image))
    assert pixels[0, 0].tolist() == list(range(6, 14))
    assert pixels[1, :, 0].tolist() == list(range(2, 10))


def test_the_fixed_protocol_squeezes() -> None:
    preprocess, image = squares(200, 100, size=50, resize=50, protocol="fixed")
    pixels = to_bytes(preprocess.square(image)).float()
    assert float(pixels[0, 0, -1] - pixels[0, 0, 0]) == pytest.approx(196, abs=3)
    assert float(pixels[1, -1, 0] - pixels[1, 0, 0]) == pytest.approx(98, abs=3)


def test_an_image_of_the_right_size_is_taken_as_it_is() -> None:
    preprocess, image = squares(32, 32, size=32)
    assert preprocess.square(image) is image
    assert preprocess.short_side == 37
    assert Preprocess().short_side == 256


def test_torchvision_gives_the_same_square() -> None:
    from thinet.vision import torchvision

    transforms = torchvision().transforms
    theirs = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(33)])
    for width, height in ((61, 47), (47, 61), (50, 50), (40, 90)):
        preprocess, image = squares(width, height, size=33, resize=40)
        assert preprocess.square(image).tobytes() == theirs(image).tobytes()


def test_normalising_by_hand() -> None:
    preprocess = Preprocess(size=1, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    pixels = torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1)
    wanted = torch.tensor([1.0, -1.0, 0.1]).view(3, 1, 1)
    assert torch.allclose(preprocess.normalise(pixels), wanted)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"size": 64, "resize": 32}, r"resize \(32\) must not be below size \(64\)"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be above zero"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "on the scale 0..1"),
        ({"protocol": "zoom"}, "protocol must be keep-ratio or fixed, got 'zoom'"),
    ],
)
def test_options_out_of_range(options: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        Preprocess(**options)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0.0, np.nan]], np.float32), ([[0.0, 128.0]], np.float32), ([[-0.5, 1.0]], np.float32),
        ([[0, 70000]], np.int32), ([[-1, 5]], np.int32),
    ],
)  # fmt: skip
def test_numbers_off_their_scale_are_corrupt_and_not_black_or_white(
    tmp_path: Path, values: Any, kind: Any
) -> None:
    Image.fromarray(np.array(values, dtype=kind)).save(tmp_path / "odd.tif")
    found = decode(tmp_path / "odd.tif")
    assert isinstance(found, Corrupt)
    assert "are not all on the scale 0.." in found.reason
