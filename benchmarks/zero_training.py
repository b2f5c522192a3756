"""Accuracy of a CIFAR ResNet right after pruning, with no training step or after the same few.

    python benchmarks/zero_training.py                       # ResNet-56, one calibration set
    python benchmarks/zero_training.py --network resnet20 --seeds 3
    python benchmarks/zero_training.py --torch-pruning       # beside Torch-Pruning 1.6.1
    python benchmarks/zero_training.py --torch-pruning --epochs 1 --lr 0.01 0.02 --distill

Only the first convolution of each block is pruned, as in the paper, on 1,000 unlabelled training
images; accuracy is top-1 on every second test image. `keep` rows take the same fraction of every
block, `x` rows reach the same cost with widths from error curves. "Joint refit" refits producers
and consumers together afterwards, below 0.4 of the costs in two rounds. "+ BN" re-estimates
BatchNorm statistics on the same images. `--epochs` fine-tunes each result, one-cycle on all
training images, with each peak rate in turn; the best is shown.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import thinet
from thinet.data import calibration_batches, loader
from thinet.models import resolve
from thinet.refine import ITERATIONS
from thinet.repair import RepairSettings
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate

HERE = Path(__file__).parent
BATCH = 50  # small batches stay in memory that the allocator keeps, which is several times faster
EXAMPLE = torch.zeros(1, 3, 32, 32)
INNER = "layer*.conv1"


@dataclass(frozen=True)
class Method:
    """One row: a name and a function from (dense model, batches, speed-up) to a smaller model."""

    name: str
    run: Callable[[nn.Module, list[Any], float], nn.Module]


def ours(name: str, *, uniform: bool = True, refined: bool = False, **options: Any) -> Method:
    """`speed` is the kept fraction of channels for uniform rows, else a MAC speed-up."""

    def run(model: nn.Module, batches: list[Any], speed: float) -> nn.Module:
        budget = thinet.Budget(keep=speed) if uniform else thinet.Budget(macs=1 / speed)
        return thinet.prune(
            model, EXAMPLE, batches, budget=budget, only=INNER, divisor=1,
            repair_settings=RepairSettings(refine=ITERATIONS if refined else 0), **options,
        ).model  # fmt: skip

    return Method(name, run)


UNIFORM = (
    ours("random", criterion="random", repair="none"),
    ours("weight sum", criterion="weight-sum", repair="none"),
    ours("APoZ", criterion="apoz", repair="none"),
    ours("Taylor 2017", criterion="taylor", repair="none"),
    ours("ThiNet, no w", criterion="thinet", repair="none"),
    ours("ThiNet with w (the paper)", criterion="thinet", repair="scale"),
    ours("OMP with w (the TPAMI code)", criterion="thinet-omp", repair="scale"),
    ours("random, full repair", criterion="random", repair="full"),
    ours("weight sum, full repair", criterion="weight-sum", repair="full"),
    ours("ThiNet, full repair", criterion="thinet", repair="full"),
    ours("block-OBS, full repair", criterion="block-obs", repair="full"),
    ours("block-OBS, joint refit", criterion="block-obs", repair="full", refined=True),
)

BY_ERROR = (
    ours("ThiNet, widths by error", uniform=False),
    ours("block-OBS, widths by error", uniform=False, criterion="block-obs"),
    ours("ThiNet, widths by error, joint refit", uniform=False, refined=True),
    ours(
        "block-OBS, widths by error, joint refit",
        uniform=False,
        refined=True,
        criterion="block-obs",
    ),
)


def torch_pruning(name: str, importance: str, *, everywhere: bool) -> Method:
    """A criterion of Torch-Pruning on the same layers, its ratio searched for the speed-up."""

    def run(model: nn.Module, batches: list[Any], speed: float) -> nn.Module:
        import torch_pruning as tp

        dense = thinet.count(model, EXAMPLE).macs
        inner = {n for n, _ in model.named_modules() if n.endswith(".conv1") and "." in n}

        def at(ratio: float) -> nn.Module:
            small = copy.deepcopy(model)
            score = getattr(tp.importance, importance)()
            layers = dict(small.named_modules())
            mixing = {n: m for n, m in layers.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
            ignored = [m for n, m in mixing.items() if n not in inner]
            pruner = tp.pruner.MetaPruner(
                small, EXAMPLE, score, global_pruning=everywhere, pruning_ratio=ratio,
                max_pruning_ratio=0.95, ignored_layers=ignored, round_to=1,
            )  # fmt: skip
            if "Taylor" in importance:
                images, labels = batches[0]
                nn.functional.cross_entropy(small(images), labels).backward()
            pruner.step()
            return small.eval()

        low, high = 0.0, 0.95
        for _ in range(10):
            middle = (low + high) / 2
            if dense / thinet.count(at(middle), EXAMPLE).macs < speed:
                low = middle
            else:
                high = middle
        return at(high)

    return Method(f"Torch-Pruning {name}, {'global' if everywhere else 'local'}", run)


RIVALS = tuple(
    torch_pruning(name, importance, everywhere=everywhere)
    for name, importance in (
        ("L2", "MagnitudeImportance"),
        ("Taylor", "TaylorImportance"),
        ("FPGM", "FPGMImportance"),
        ("LAMP", "LAMPImportance"),
        ("BN scale", "BNScaleImportance"),
    )
    for everywhere in (False, True)
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet56", choices=("resnet20", "resnet56"))
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--weights", type=Path, help="default: in $DATA/weights")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--mirror", action="store_true", help="every second image of them")
    parser.add_argument("--seeds", type=int, default=1, help="calibration sets")
    parser.add_argument("--keep", type=float, nargs="*", default=(0.5, 0.3))
    parser.add_argument("--speed", type=float, nargs="*", default=(1.99, 3.23))
    parser.add_argument("--only", nargs="*", default=(), help="rows: names, or the start of names")
    parser.add_argument("--torch-pruning", action="store_true")
    parser.add_argument("--bn", action="store_true", help="each row also with BN re-estimated")
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning, the same for all")
    parser.add_argument("--lr", type=float, nargs="+", default=(0.02,), help="peak rates to try")
    parser.add_argument("--distill", action="store_true", help="fine-tune from the dense network")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="of fine-tuning")
    parser.add_argument("--json", type=Path, help="append each row to this file")
    given = parser.parse_args(argv)
    folder = Path(os.environ.get("DATA", ".data"), "weights")
    weights = given.weights or folder / f"cifar_{given.network}_jpeg.safetensors"
    model = resolve(f"{HERE / 'cifar_resnet.py'}:{given.network}", weights=weights).eval()
    test = loader(given.data / "test", size=32, batch_size=BATCH, every=2, preload=True)
    dense = thinet.count(model, EXAMPLE).macs
    print(f"dense: {evaluate(model, test).top1:.2%} of {test.images} test images")
    print(f"| method | MACs | top-1 | + BN | spread | seconds | {given.epochs} epochs (rate) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, speed in rows(given):
        found = [_one(method, speed, model, test, given, seed) for seed in range(given.seeds)]
        raw, bn, seconds = ([f[key] for f in found] for key in ("top1", "top1_bn", "seconds"))
        again = f"{sum(bn) / len(bn):.2%}" if given.bn else ""
        print(
            f"| {method.name} | {dense / found[0]['macs']:.2f}x | {sum(raw) / len(raw):.2%} | "
            f"{again} | {max(raw) - min(raw):.2%} | {sum(seconds) / len(seconds):.1f} | "
            f"{best(found)} |",
            flush=True,
        )
        if given.json:
            with given.json.open("a") as file:
                row = {"method": method.name, "asked": speed, "runs": found}
                file.write(json.dumps(row) + "\n")


def best(found: list[dict[str, Any]]) -> str:
    """The mean over calibration sets at the rate where it is highest."""
    means = {lr: sum(f["tuned"][lr] for f in found) / len(found) for lr in found[0]["tuned"]}
    lr = max(means, key=means.__getitem__, default=None)
    return "" if lr is None else f"{means[lr]:.2%} ({lr})"


def rows(given: argparse.Namespace) -> Iterable[tuple[Method, float]]:
    for methods, speeds in (
        (UNIFORM, given.keep),
        (BY_ERROR, given.speed),
        (RIVALS if given.torch_pruning else (), given.speed),
    ):
        for speed in speeds:
            for method in methods:
                if not given.only or any(method.name.startswith(o) for o in given.only):
                    yield method, speed


def _one(
    method: Method, speed: float, model: nn.Module, test: Any, given: argparse.Namespace, seed: int
) -> dict[str, Any]:
    labelled = "Taylor" in method.name
    source = calibration_batches(
        given.data / "train",
        256 if labelled else given.images,
        BATCH,
        32,
        seed=seed,
        labels=labelled,
        mirror=given.mirror,
    )
    batches: list[Tensor] = list(source)
    start = time.perf_counter()
    small = method.run(model, batches, speed)
    seconds = time.perf_counter() - start
    again = float("nan")
    if given.bn:
        again = evaluate(thinet.recalibrate_bn(small, batches), test).top1
    return {
        "macs": thinet.count(small, EXAMPLE).macs,
        "top1": evaluate(small, test).top1,
        "top1_bn": again,
        "seconds": seconds,
        "tuned": {lr: _tuned(small, model, test, given, lr) for lr in given.lr if given.epochs},
    }


def _tuned(
    small: nn.Module, teacher: nn.Module, test: Any, given: argparse.Namespace, lr: float
) -> float:
    train = loader(
        given.data / "train", train=True, size=32, crop="padded", batch_size=128, preload=True
    )
    config = FinetuneConfig(
        lr=lr, schedule="one-cycle", nesterov=True, mixed_precision=given.precision
    )
    tuned = thinet.finetune(
        small.to(memory_format=torch.channels_last), train, epochs=given.epochs, config=config,
        teacher=teacher if given.distill else None,
    ).model  # fmt: skip
    return evaluate(tuned, test).top1


if __name__ == "__main__":
    main(sys.argv[1:])
