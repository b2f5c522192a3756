"""Crops and flips of a batch, against each image done by hand."""

from __future__ import annotations

import torch
from torch.nn import functional

from thinet.augment import AREA, padded_crops, random_boxes, resized_crops
from thinet.seeds import generator

PIXELS = torch.randint(1, 256, (40, 3, 6, 6), generator=generator("pixels"), dtype=torch.uint8)


def test_padded_crops_are_crops_of_the_padded_image_mirrored_or_not() -> None:
    made = padded_crops(PIXELS, 2, True, generator("crop"))
    assert made.shape == PIXELS.shape
    assert made.dtype == torch.uint8
    found = []
    for image, result in zip(PIXELS, made):
        padded = functional.pad(image, [2] * 4)
        candidates = {
            (top, left, mirrored): crop.flip(2) if mirrored else crop
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for crop in [padded[:, top : top + 6, left : left + 6]]
        }
        hits = [key for key, crop in candidates.items() if torch.equal(crop, result)]
        assert len(hits) == 1
        found += hits
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
    assert 8 < sum(mirrored for _, _, mirrored in found) < 32


def test_no_padding_and_no_flip_changes_nothing() -> None:
    assert torch.equal(padded_crops(PIXELS, 0, False, generator("crop")), PIXELS)


def test_boxes_lie_in_the_picture_and_have_the_asked_area() -> None:
    x, y, w, h = random_boxes(2000, 60, 40, generator("boxes")).T
    assert float(torch.stack([x, y]).min()) >= 0
    assert float((x + w).max()) <= 60 + 1e-4
    assert float((y + h).max()) <= 40 + 1e-4
    share = w * h / 2400
    assert float(share.max()) <= AREA[1] + 1e-6
    assert 0.5 < float(share.mean()) < 0.7


def test_resized_crops_of_a_ramp_are_the_ramp_at_the_sampled_places() -> None:
    ramp = torch.arange(32.0).expand(5, 3, 32, 32)
    made = resized_crops(ramp, 16, False, generator("resize"))
    x, _, w, _ = random_boxes(5, 32, 32, generator("resize")).T
    centres = (torch.arange(16) + 0.5) / 16
    wanted = (x[:, None] + centres * w[:, None] - 0.5).clamp(0, 31)
    assert torch.allclose(made, wanted[:, None, None, :].expand_as(made), atol=1e-3)


def test_resized_crops_are_mirrored_one_time_in_two() -> None:
    ramp = torch.arange(32.0).expand(200, 3, 32, 32)
    made = resized_crops(ramp, 16, True, generator("resize"))
    falling = (made[:, 0, 0, 0] > made[:, 0, 0, -1]).sum()
    assert 70 < int(falling) < 130
