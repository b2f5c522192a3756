"""Loaders and calibration samples: what is in which batch, and what happens to bad images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from thinet.data import ImageFolder, Loader, calibration_batches, loader
from thinet.errors import DataError, OptionError
from thinet.train.evaluate import evaluate

PLAIN: dict[str, Any] = {"size": 8, "mean": (0, 0, 0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""Preprocessing that leaves the bytes as they are."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes a (5 images), b (7), c (9) of 10 x 9 noise; the first red byte is the number."""
    random = np.random.default_rng(0)
    number = 0
    for name, count in (("a", 5), ("b", 7), ("c", 9)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(count):
            pixels = random.integers(0, 256, (9, 10, 3), dtype=np.uint8)
            pixels[..., 0] = number
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{k:02d}.png")
            number += 1
    return tmp_path / "set"


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"not an image")


def numbers(batches: Any) -> list[int]:
    """Which images the batches hold, read off their red."""
    parts = [batch if isinstance(batch, torch.Tensor) else batch[0] for batch in batches]
    return [round(float(value)) for part in parts for value in part[:, 0, 4, 4]]


@pytest.mark.parametrize("preload", [True, False])
def test_evaluation_goes_through_the_folder_in_order(folder: Path, preload: bool) -> None:
    data = loader(folder, batch_size=4, preload=preload, **PLAIN)
    batches = list(data)
    assert len(batches) == len(data) == 6
    assert numbers(batches) == numbers(data) == list(range(21))
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [0] * 5 + [1] * 7 + [2] * 9
    assert batches[0][0].shape == (4, 3, 8, 8)
    assert batches[0][0].dtype == torch.float32
    assert data.classes == ("a", "b", "c")
    assert data.images == 21


def test_every_second_image(folder: Path) -> None:
    assert numbers(loader(folder, every=2, **PLAIN)) == list(range(0, 21, 2))


def test_decoded_once_or_each_time_is_the_same_in_evaluation(folder: Path) -> None:
    options = {**PLAIN, "size": 6, "resize": 7}
    kept = list(loader(folder, batch_size=8, preload=True, **options))
    fresh = list(loader(folder, batch_size=8, preload=False, workers=3, **options))
    single = ImageFolder(folder, **options)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(kept, fresh, strict=True))
    assert torch.equal(single[9][0], fresh[1][0][1])
    assert int(single[9][1]) == 1


@pytest.mark.parametrize("preload", [True, False])
@pytest.mark.parametrize("crop", ["resized", "padded", "centre"])
def test_training_is_shuffled_augmented_and_repeatable(
    folder: Path, preload: bool, crop: Any
) -> None:
    def make(seed: int) -> Loader:
        return loader(
            folder,
            train=True,
            crop=crop,
            batch_size=4,
            preload=preload,
            seed=seed,
            padding=2,
            **PLAIN,
        )

    data, again, other = make(0), make(0), make(1)
    first, second = list(data), list(data)
    assert len(first) == len(data) == 5  # the last batch is not full
    for a, b in zip([*first, *second], [*again, *again], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], next(iter(other))[0])
    part = list(data.epoch(1, [2, 4]))
    assert torch.equal(part[0][0], second[2][0])
    assert torch.equal(part[1][0], second[4][0])
    assert first[0][0].shape == (4, 3, 8, 8)
    if crop != "padded":  # whose moved-in black hides the number
        seen = numbers(first)
        assert len(set(seen)) == 20
        labels = [int(label) for _, part in first for label in part]
        assert labels == [0 if n < 5 else 1 if n < 12 else 2 for n in seen]


@pytest.mark.parametrize("preload", [True, False])
def test_a_corrupt_image_is_named_and_left_out(
    folder: Path, preload: bool, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(folder, "b/03.png")
    data = loader(folder, batch_size=4, preload=preload, **PLAIN)
    with caplog.at_level(logging.WARNING, logger="thinet"):
        seen = [numbers(data), numbers(data)]
    assert seen == [[n for n in range(21) if n != 8]] * 2
    assert data.images == 20
    assert [path.name for path in data.corrupt] == ["03.png"]
    if not preload:  # else it was named before the log was listened to
        assert caplog.text.count("cannot be decoded") == 1
        assert "b/03.png" in caplog.text


@pytest.mark.parametrize("preload", [True, False])
def test_too_many_corrupt_images_are_an_error(folder: Path, preload: bool) -> None:
    spoil(folder, "a/00.png", "c/01.png", "c/02.png")
    with pytest.raises(DataError, match=r"2 corrupt images .*c/01\.png .*at most 1 of 21 are left"):
        list(loader(folder, preload=preload, **PLAIN))
    data = loader(folder, preload=preload, max_corrupt=0.15, **PLAIN)
    assert len(numbers(data)) == 18


def test_a_batch_of_corrupt_images_only_is_passed_over(folder: Path) -> None:
    spoil(folder, "a/00.png", "a/01.png")
    data = loader(folder, batch_size=2, preload=False, max_corrupt=0.1, **PLAIN)
    assert [len(images) for images, _ in data] == [2] * 9 + [1]
    assert [len(images) for images, _ in data.epoch(0)] == [0] + [2] * 9 + [1]


def test_a_folder_of_damaged_images_only(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    spoil(tmp_path, "x/a.png")
    (tmp_path / "y" / "b.jpg").touch()
    with pytest.raises(DataError, match="2 corrupt images"):
        loader(tmp_path, preload=True)
    with pytest.raises(DataError, match="cannot be decoded"):
        _ = ImageFolder(tmp_path)[0]


def test_labels_are_needed_for_training(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"has no classes; .*one folder of images a class"):
        loader(tmp_path)
    with pytest.raises(DataError, match="has no classes, so its images have no labels"):
        calibration_batches(tmp_path, labels=True)


def test_calibration_is_an_even_fixed_sample(folder: Path) -> None:
    data = calibration_batches(folder, 12, 5, seed=3, labels=True, **PLAIN)
    batches = list(data)
    assert [len(images) for images, _ in batches] == [5, 5, 2]
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [4, 4, 4]
    assert numbers(batches) == numbers(data)
    assert len(set(numbers(batches))) == 12
    plain = list(calibration_batches(folder, 12, 5, seed=3, **PLAIN))
    assert all(torch.equal(a, b[0]) for a, b in zip(plain, batches, strict=True))
    assert numbers(calibration_batches(folder, 12, 5, seed=4, **PLAIN)) != numbers(batches)


def test_every_second_calibration_image_is_mirrored_on_request(folder: Path) -> None:
    plain = calibration_batches(folder, 12, 5, seed=3, **PLAIN)
    data = calibration_batches(folder, 12, 5, seed=3, mirror=True, **PLAIN)
    for before, after in zip(plain, data, strict=True):
        assert torch.equal(before[::2], after[::2])
        assert torch.equal(before[1::2].flip(-1), after[1::2])
    assert all(torch.equal(a, b) for a, b in zip(data, data, strict=True))  # not mirrored back
    assert data.describe() != plain.describe()
    told = calibration_batches(folder, 12, 5, seed=3, mirror=True, labels=True, **PLAIN)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    model.eval()
    assert evaluate(model, told).loss == pytest.approx(evaluate(model, list(told)).loss, abs=1e-6)


def test_calibration_takes_what_there_is_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = calibration_batches(folder, 1000, **PLAIN)
    assert data.images == 21
    assert sorted(numbers(data)) == list(range(21))
    assert "has 21 images, 1000 were asked for" in caplog.text


def test_progress_of_decoding(folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    loader(folder, progress=lambda *step: told.append(step), **PLAIN)
    assert told == [("decoding images", 21, 21)]


def test_describe_tells_loaders_apart(folder: Path) -> None:
    base = loader(folder, **PLAIN).describe()
    assert loader(folder, **PLAIN).describe() == base
    for change in ({"batch_size": 3}, {"every": 2}, {"seed": 1}, {"train": True}):
        assert loader(folder, **PLAIN, **change).describe() != base


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"every": 1.5}, "every must be a whole number of at least 1, got 1.5"),
        ({"workers": 0}, "workers must be a whole number"),
        ({"max_corrupt": 1.0}, "max_corrupt is a fraction"),
        ({"crop": "zoom"}, "crop must be resized, padded or centre, got 'zoom'"),
        ({"padding": 9}, r"padding must lie between 0 and size \(8\), got 9"),
    ],
)
def test_options_out_of_range(folder: Path, options: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        loader(folder, **PLAIN, **options)


def test_a_folder_larger_than_memory_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 60)
    with pytest.raises(DataError, match="this machine has 0 GB; use preload=False"):
        loader(folder, preload=True, **PLAIN)


def test_an_empty_class_folder_is_named_where_labels_matter(folder: Path) -> None:
    """All behind it would be off by one."""
    (folder / "aa").mkdir()
    for draw in (lambda: loader(folder, size=8), lambda: calibration_batches(folder, labels=True)):
        with pytest.raises(DataError, match=r"no image in aa; labels are counted by folder"):
            draw()
    assert calibration_batches(folder, 12, 5, **PLAIN).images == 12
