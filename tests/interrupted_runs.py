"""A small training run with everything random in it, and a driver that kills it again and again.

Run as a program it prints JSON: the digest of the run that nobody stops, and for each round the
digest of the run that was killed, and how often it was. Every try is a process of its own.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.killed_runs import killed_run
from thinet.train.config import FinetuneConfig
from thinet.train.finetune import FinetuneResult, finetune
from thinet.train.identity import fingerprint

EPOCHS = 3
CONFIG = FinetuneConfig(
    lr=0.05, schedule="one-cycle", ema_decay=0.9, clip_norm=1.0, accumulate=2, label_smoothing=0.1
)


class Noisy(Dataset[Any]):
    """Images that are augmented by torch's, Python's and NumPy's global generators."""

    def __len__(self) -> int:
        return 45

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import numpy as np

        image = torch.full((2, 6, 6), index / 45) + torch.randn(2, 6, 6) * 0.1
        image = image * random.uniform(0.9, 1.1) + np.random.rand() * 0.1  # noqa: NPY002
        return image.float(), torch.tensor(index % 3)


def noisy_data(workers: int = 0) -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, shuffle=True, num_workers=workers)


def dropping_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


def digest(result: FinetuneResult) -> str:
    return fingerprint(result.model)


def trained(folder: Path | None, pause: float = 0.0, **options: Any) -> FinetuneResult:
    """The run, with `pause` seconds between the steps."""
    options = {"config": CONFIG, "epochs": EPOCHS, "save_every": 2, "data": noisy_data(), **options}
    return finetune(
        dropping_net(),
        options.pop("data"),
        checkpoint=folder,
        progress=lambda *_: time.sleep(pause),
        **options,
    )


def paused_run(folder: Path) -> str:
    return digest(trained(folder, pause=0.01))


def main() -> None:
    torch.set_num_threads(1)
    whole = digest(trained(None))  # which also imports what the forked processes need
    delays = random.Random(int(sys.argv[1]))
    rounds = []
    for _ in range(int(sys.argv[2])):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(killed_run(paused_run, Path(folder), delays, 0.3))
    print(json.dumps({"whole": whole, "rounds": rounds}))  # noqa: T201


if __name__ == "__main__":
    main()
