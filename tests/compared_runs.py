"""A small comparison, and a driver that kills it again and again.

Run as a program it prints JSON: the cells of the run that nobody stops, and for each round those of
the run that was killed, and how often it was. Every try is a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thinet
from tests.killed_runs import compare_with_whole
from thinet.cells import Comparison
from thinet.train.config import FinetuneConfig

EXAMPLE = torch.zeros(1, 3, 6, 6)
CONFIG = FinetuneConfig(lr=0.05, label_smoothing=0.1)


def plain_net() -> nn.Module:
    """Two convolutions; no BatchNorm, so that `bn-scale` can judge nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3),
    ).eval()  # fmt: skip


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (8, 3, 6, 6) of three classes that differ in one colour."""
    random = torch.Generator().manual_seed(1)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(count):
        labels = torch.arange(8) % 3
        images = torch.randn(8, 3, 6, 6, generator=random)
        images[torch.arange(8), labels] += 0.5
        found.append((images, labels))
    return found


def drawn(seed: int) -> Iterator[torch.Tensor]:
    """Two calibration batches of a seed."""
    random = torch.Generator().manual_seed(100 + seed)
    return (torch.randn(12, 3, 6, 6, generator=random) for _ in range(2))


def compared(folder: Path, **options: Any) -> Comparison:
    """Two criteria, two budgets, one seed, two epochs: four cells."""
    options = {
        "validation": batches(6), "criteria": ("thinet", "random"), "repairs": ("scale",),
        "budgets": (thinet.Budget(keep=0.5), thinet.Budget(keep=0.34)), "seeds": (2,),
        "train": batches(), "epochs": 2, "config": CONFIG, **options,
    }  # fmt: skip
    calibration = options.pop("calibration", drawn)
    return thinet.compare(plain_net(), EXAMPLE, calibration, state_dir=folder, **options)


def facts(result: Comparison) -> list[dict[str, Any]]:
    """The cells without their seconds."""
    return [{k: v for k, v in asdict(cell).items() if k != "seconds"} for cell in result.cells]


def quick(folder: Path) -> str:
    return json.dumps(facts(compared(folder)))


def slow(folder: Path) -> str:
    """There must be time to be killed in."""
    return json.dumps(facts(compared(folder, progress=lambda *_: time.sleep(0.004))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_with_whole(quick, slow)
