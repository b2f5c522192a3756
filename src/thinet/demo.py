"""The whole job on a small real data set, offline: the handwritten digits of scikit-learn.

A VGG-style network is trained in seconds, pruned to a quarter of its multiply-adds in five ways,
measured with and without fine-tuning, written to a file, and read back in a new process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from thinet.budget import Budget
from thinet.checkpoint import load, save
from thinet.count import count
from thinet.errors import MissingExtraError, VerificationError
from thinet.outcome import PruneResult
from thinet.prune import prune
from thinet.prune_options import Repair
from thinet.report.data import Network, Report
from thinet.report.rows import pruned_groups
from thinet.seeds import seeded
from thinet.timing import latencies
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate
from thinet.train.finetune import finetune
from thinet.types import Progress

KEEP_MACS = 0.25
METHODS: tuple[tuple[str, str, Repair], ...] = (
    ("random", "random", "none"),
    ("weight-sum", "weight-sum", "none"),
    ("apoz", "apoz", "none"),
    ("thinet (scale)", "thinet", "scale"),
    ("thinet (full)", "thinet", "full"),
)
"""Name in the table, criterion, repair; the last one is written to the file."""

DENSE_EPOCHS, TUNE_EPOCHS = 12, 3
BATCH, TIMED_BATCH = 64, 256
SECONDS = 0.8
"""Of timed runs for each network."""

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Digits:
    """1,797 real handwritten digits, 8 x 8 pixels, normalised: 1,200 to train on, 597 to test."""

    train: Pairs
    test: Pairs
    calibration: list[torch.Tensor]


@dataclass(frozen=True)
class Demo:
    """What the demonstration measured and wrote."""

    report: Report
    model_file: Path
    largest_difference: float


class DigitsVGG(nn.Module):
    """A VGG in small: four 3 x 3 convolutions with BatchNorm, two poolings, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = 1
        for i, width in enumerate((48, 48, 96, 96), start=1):
            self.features.add_module(f"conv{i}", nn.Conv2d(inputs, width, 3, padding=1, bias=False))
            self.features.add_module(f"bn{i}", nn.BatchNorm2d(width))
            self.features.add_module(f"relu{i}", nn.ReLU(inplace=True))
            if i % 2 == 0:
                self.features.add_module(f"pool{i}", nn.MaxPool2d(2))
            inputs = width
        self.fc1 = nn.Linear(inputs * 2 * 2, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) normalised images to (n, 10) logits."""
        return self.fc2(self.fc1(self.features(images).flatten(1)).relu())


def digits() -> Digits:
    """The data set, split and batched the same way each time.

    Raises:
        MissingExtraError: scikit-learn, which brings the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "the demo's images come with scikit-learn: pip install 'thinet[demo]'"
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(targets, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    images = (images - images[train].mean()) / images[train].std()

    def batches(chosen: torch.Tensor) -> Pairs:
        return [(images[part], labels[part]) for part in chosen.split(BATCH)]

    return Digits(batches(train), batches(test), [x for x, _ in batches(train)])


def run(out: Path, *, seed: int = 0, progress: Progress | None = None) -> Demo:
    """Do all of it and write `small.safetensors` into a folder that exists.

    Runs on one thread, which such small layers are fastest on and which makes the figures those of
    every machine, the milliseconds apart.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        VerificationError: the file gives other outputs in a new process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with seeded("demo", seed):
            return _run(out, seed, progress or (lambda what, done, total: None))
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seed: int, told: Progress) -> Demo:
    start = time.perf_counter()
    data = digits()
    config = FinetuneConfig(lr=0.1, nesterov=True, schedule="one-cycle", seed=seed)
    tune = FinetuneConfig(lr=0.01, nesterov=True, seed=seed)
    dense = finetune(
        DigitsVGG(), _shuffled(data.train), epochs=DENSE_EPOCHS, config=config, device="cpu",
        progress=_counted(told, "training the dense network", DENSE_EPOCHS),
    ).model  # fmt: skip

    example = data.test[0][0][:1]
    pruned: dict[str, PruneResult] = {}
    for done, (name, criterion, repair) in enumerate(METHODS):
        told("pruning", done, len(METHODS))
        pruned[name] = prune(
            dense, example, data.calibration,
            budget=Budget(macs=KEEP_MACS), criterion=criterion, repair=repair,
            recalibrate=True, seed=seed, widths="uniform",
        )  # fmt: skip
    told("pruning", len(METHODS), len(METHODS))

    timed = latencies(
        {"dense": dense, **{name: result.model for name, result in pruned.items()}},
        torch.cat([x for x, _ in data.test])[:TIMED_BATCH],
        seconds=SECONDS,
    )
    networks = [_network("dense", dense, example, timed["dense"].median_ms, data)]
    tuned: dict[str, nn.Module] = {}
    for done, (name, result) in enumerate(pruned.items()):
        trained = finetune(
            result.model, _shuffled(data.train), epochs=TUNE_EPOCHS, config=tune,
            validation=data.test, device="cpu",
        )  # fmt: skip
        curve = tuple(r.validation.top1 for r in trained.history if r.validation is not None)
        tuned[name] = trained.model
        networks.append(
            _network(name, result.model, example, timed[name].median_ms, data, curve=curve)
        )
        told("fine-tuning each for the same few epochs", done + 1, len(pruned))

    best = METHODS[-1][0]
    model_file = out / "small.safetensors"
    save(model_file, tuned[best], pruned[best].plan)
    gap = difference_in_new_process(model_file, tuned[best], data)
    report = Report(
        title="thinet demo: handwritten digits",
        summary=(
            "A small VGG trained on 1,200 real digits, pruned to a quarter of its multiply-adds "
            "in five ways. Same calibration images, same widths, same few epochs of fine-tuning "
            "for all; measured on 597 digits that no network has seen."
        ),
        networks=tuple(networks),
        chosen=best,
        groups=pruned_groups(pruned[best].report),
        notes=(
            "BatchNorm statistics are re-estimated for every method alike.",
            f"latency is the median of a forward pass over {TIMED_BATCH} images, all networks "
            "timed in turn.",
            f"small.safetensors, loaded in a new process, gives outputs that differ by {gap:g}.",
        ),
        facts=(
            ("command", f"thinet demo --seed {seed}"),
            ("torch", torch.__version__),
            ("threads", str(torch.get_num_threads())),
            ("seconds", f"{time.perf_counter() - start:.0f}"),
        ),
    )
    return Demo(report, model_file, gap)


def difference_in_new_process(path: Path, model: nn.Module, data: Digits) -> float:
    """The largest difference between a model's test outputs and those of its file, loaded by a
    process that knows nothing but the file and `DigitsVGG`.

    Raises:
        VerificationError: the outputs are not the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder) / "outputs.safetensors"
        command = [sys.executable, "-m", "thinet.demo", str(path), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise VerificationError(f"{path} does not load in a new process:\n{done.stderr}")
        theirs = load_file(outputs)["outputs"]
    gap = float((theirs - test_outputs(model, data)).abs().max())
    if gap > 1e-5:
        raise VerificationError(f"{path}, loaded in a new process, gives outputs {gap:g} apart")
    return gap


def test_outputs(model: nn.Module, data: Digits) -> torch.Tensor:
    """Logits (597, 10) of the test images."""
    with torch.inference_mode():
        return torch.cat([model.eval()(images) for images, _ in data.test])


def _shuffled(pairs: Pairs) -> torch.utils.data.DataLoader[tuple[torch.Tensor, ...]]:
    images, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    dataset = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)


def _counted(told: Progress, what: str, epochs: int) -> Progress:
    """Progress over a whole run in place of one bar an epoch."""

    def update(epoch: str, done: int, total: int) -> None:
        told(what, (int(epoch.split()[1]) - 1) * total + done, epochs * total)

    return update


def _network(
    name: str,
    model: nn.Module,
    example: torch.Tensor,
    latency_ms: float,
    data: Digits,
    curve: tuple[float, ...] = (),
) -> Network:
    counts = count(model, example)
    top1 = evaluate(model, data.test, device="cpu").top1
    tuned = curve[-1] if curve else None
    return Network(name, counts.macs, counts.params, latency_ms, top1, tuned, curve)


def _child(arguments: list[str]) -> None:
    """Load a file as a stranger would, and write the outputs."""
    path, outputs = arguments
    torch.set_num_threads(1)
    small = load(path, DigitsVGG())
    save_file({"outputs": test_outputs(small, digits())}, outputs)


if __name__ == "__main__":
    _child(sys.argv[1:])
