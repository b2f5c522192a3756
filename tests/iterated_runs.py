"""A small run of `thinet.iterate` and a driver that kills it again and again.

Run as a program it prints JSON: the digest of the run that nobody stops, and for each round the
digest of the run that was killed, and how often it was. Every try is a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import thinet
from tests.chains import images, labelled_batches
from tests.killed_runs import compare_with_whole
from thinet.loop import IterateResult
from thinet.plan import Replacement
from thinet.recipes.recipe import Recipe, Step, Tuning
from thinet.train.config import FinetuneConfig
from thinet.train.identity import fingerprint

HEAD = (
    Replacement("pool", "global-average-pool"),
    Replacement("out", "linear", {"in_features": 8, "out_features": 5}),
)
RECIPE = Recipe(
    "three-steps",
    (
        Step("one", {"one": 3}, Tuning(2, 0.02, (1,))),
        Step("out", {}, Tuning(1, 0.02), HEAD),
        Step("two", {"two": 5}, Tuning(2, 0.01)),
    ),
)
CONFIG = FinetuneConfig(ema_decay=0.9, label_smoothing=0.1)


class Small(nn.Module):
    """Two convolutions with norms, a pooling and a fully connected layer behind a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 8, 3)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(torch.relu(self.norm(self.one(x))))
        return self.out(self.drop(self.pool(torch.relu(x)).flatten(1)))


def small_net() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def iterated(folder: Path, **options: Any) -> IterateResult:
    """The run: three steps, five epochs of four batches."""
    options = {
        "recipe": RECIPE, "train": labelled_batches(side=8), "config": CONFIG, **options
    }  # fmt: skip
    calibration = list(images(16, 8).split(8))
    return thinet.iterate(small_net(), images(1, 8), calibration, state_dir=folder, **options)


def digest(result: IterateResult) -> str:
    return fingerprint(result.model) + json.dumps(result.plan.to_json(), sort_keys=True)


def work(folder: Path) -> str:
    return digest(iterated(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_with_whole(work, work)
