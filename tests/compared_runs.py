"""A small comparison, and a driver that kills it again and again.

Run as a program it prints JSON: the cells of the run that nobody stops, and for each round those of
the run that was killed, and how often it was. Every try is a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thinet
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


def in_a_process(folder: Path, answer: Path) -> int:
    child = os.fork()
    if child == 0:
        answer.write_text(
            json.dumps(facts(compared(folder, progress=lambda *_: time.sleep(0.004))))
        )
        os._exit(0)
    return child


def killed_run(folder: Path, delays: random.Random, longest: float) -> tuple[Any, int]:
    """Start it, kill it, start it again, until it is through."""
    answer, kills = folder / "answer", 0
    while True:
        child = in_a_process(folder / "run", answer)
        deadline = time.monotonic() + delays.uniform(0.0, longest) * (1 + kills / 10)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert status == 0
                return json.loads(answer.read_text()), kills
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return json.loads(answer.read_text()), kills
        kills += 1


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compared(Path(folder))  # also imports what the forked processes need
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        whole = facts(compared(Path(folder)))
        seconds = time.monotonic() - began
    delays = random.Random(int(sys.argv[1]))
    rounds = []
    for _ in range(int(sys.argv[2])):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(killed_run(Path(folder), delays, seconds / 2))
    print(json.dumps({"whole": whole, "rounds": rounds}))  # noqa: T201


if __name__ == "__main__":
    main()
