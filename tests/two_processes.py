"""What each of several processes does in `test_distributed`; started by `accelerate launch`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thinet.errors import OptionError
from thinet.train import state
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate
from thinet.train.finetune import finetune
from thinet.train.identity import fingerprint
from thinet.train.processes import current

CONFIG = FinetuneConfig(lr=0.1, schedule="cosine")


def samples(count: int = 26) -> TensorDataset:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(count, 5, generator=random, dtype=torch.float64)
    return TensorDataset(images, images[:, :3].argmax(1))


def loader(**options: Any) -> DataLoader[Any]:
    """Seven batches, the last of two: with two processes, the last step has one batch only."""
    return DataLoader(samples(), 4, **options)


FAILURES = (torch.OutOfMemoryError, KeyboardInterrupt, ZeroDivisionError)


def raising(error: type[BaseException]) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def outcome(work: Callable[[], object]) -> str:
    """What a call raised."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001  an interrupt is among them
        return type(error).__name__
    return "nothing"


class Branching(nn.Module):
    """Parameters that no image ever reaches, and some that only some batches reach."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.rare = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x)
        out = self.head(hidden)
        return out + self.rare(hidden) if float(x[0, 0]) > 0 else out


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    processes = current()
    writers: list[int] = []
    real = state.write

    def noted(*given: Any) -> None:
        writers.append(processes.rank)
        real(*given)

    state.write = noted
    plain = finetune(Branching(False), loader(shuffle=True), epochs=2, config=CONFIG)
    torch.manual_seed(processes.rank)  # the first process's weights are to be everybody's
    normed = Branching(True)
    with torch.no_grad():
        normed.head.weight += processes.rank
    run = folder / "run"
    told: list[Any] = []
    options: dict[str, Any] = {"epochs": 2, "config": CONFIG, "validation": loader()}
    result = finetune(normed, loader(), checkpoint=run, on_epoch=told.append, **options)
    try:
        finetune(normed, loader(), epochs=1, device="meta")
        refused = ""
    except OptionError as error:
        refused = str(error)
    answer = {
        "failed": [
            outcome(lambda: finetune(normed, [torch.zeros(4, 5)], epochs=1, checkpoint=run)),
            *(outcome(lambda e=e: processes.main_first(raising(e))) for e in FAILURES),
        ],
        "world": processes.world,
        "weights": {name: t.tolist() for name, t in plain.model.state_dict().items()},
        "digest": fingerprint(result.model),
        "history": [asdict(record) for record in result.history],
        "told": len(told),
        "writers": writers,
        "evaluation": asdict(evaluate(Branching(False), loader())),
        "refused": refused,
    }
    (folder / f"{processes.rank}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
