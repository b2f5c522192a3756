"""Accuracy right after pruning, with no training step or after the same few.

    python benchmarks/zero_training.py                       # ResNet-56, one calibration set
    python benchmarks/zero_training.py --network resnet20 --seeds 3
    python benchmarks/zero_training.py --torch-pruning       # beside Torch-Pruning 1.6.1
    python benchmarks/zero_training.py --torch-pruning --epochs 1 --lr 0.01 0.02 --distill
    python benchmarks/zero_training.py --network torchvision:resnet50 --weights FILE \\
        --data .data/imagenette --size 224 --classes 10 --groups 'layer*.conv[12]'

Of the two CIFAR networks only the first convolution of each block is pruned, as in the paper; any
other network is named as on the command line, with the `--groups` to prune. All see 1,000 training
images, without labels but for Taylor; accuracy is top-1 on every second test image. `keep` rows
take the same fraction of every group, `x` rows reach the same cost with widths from error curves.
"Joint refit" refits producers and consumers together afterwards, below 0.4 of the costs in two
rounds. "+ BN" re-estimates BatchNorm statistics on the same images. `--epochs` fine-tunes each
result, one-cycle on all training images, with each peak rate in turn; the best is shown.
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
from thinet.models import FORMS, resolve
from thinet.refine import ITERATIONS
from thinet.repair import RepairSettings
from thinet.selection import select_groups
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate

HERE = Path(__file__).parent
BATCH = 50  # small batches stay in memory that the allocator keeps, which is several times faster
CIFAR = ("resnet20", "resnet56")


@dataclass(frozen=True)
class Case:
    """The dense network, an example input, and patterns of the groups that are pruned."""

    model: nn.Module
    example: Tensor
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """One row: a name and a function from (case, batches, speed-up) to a smaller model."""

    name: str
    run: Callable[[Case, list[Any], float], nn.Module]


def ours(name: str, *, uniform: bool = True, refined: bool = False, **options: Any) -> Method:
    """`speed` is the kept fraction of channels for uniform rows, else a MAC speed-up."""

    def run(case: Case, batches: list[Any], speed: float) -> nn.Module:
        budget = thinet.Budget(keep=speed) if uniform else thinet.Budget(macs=1 / speed)
        return thinet.prune(
            case.model, case.example, batches, budget=budget, only=case.groups, divisor=1,
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
    ours("ThiNet, by the loss", uniform=False, loss_aware=True),
    ours(
        "block-OBS, by the loss, joint refit",
        uniform=False,
        refined=True,
        criterion="block-obs",
        loss_aware=True,
    ),
)


def torch_pruning(name: str, importance: str, *, everywhere: bool) -> Method:
    """A criterion of Torch-Pruning on the same layers, its ratio searched for the speed-up."""

    def run(case: Case, batches: list[Any], speed: float) -> nn.Module:
        import torch_pruning as tp

        model, example = case.model, case.example
        dense = thinet.count(model, example).macs
        groups = select_groups(thinet.find_groups(model, example), case.groups)
        inner = {name for group in groups for name in group.producers}
        gradients = of_loss(model, batches) if "Taylor" in importance else ()

        def at(ratio: float) -> nn.Module:
            small = copy.deepcopy(model)
            score = getattr(tp.importance, importance)()
            layers = dict(small.named_modules())
            mixing = {n: m for n, m in layers.items() if isinstance(m, (nn.Conv2d, nn.Linear))}
            ignored = [m for n, m in mixing.items() if n not in inner]
            pruner = tp.pruner.MetaPruner(
                small, example, score, global_pruning=everywhere, pruning_ratio=ratio,
                max_pruning_ratio=0.95, ignored_layers=ignored, round_to=1,
            )  # fmt: skip
            if gradients:
                for parameter, gradient in zip(small.parameters(), gradients, strict=True):
                    parameter.grad = gradient.clone()
            pruner.step()
            return small.eval()

        low, high = 0.0, 0.95
        for _ in range(10):
            middle = (low + high) / 2
            if dense / thinet.count(at(middle), example).macs < speed:
                low = middle
            else:
                high = middle
        return at(high)

    return Method(f"Torch-Pruning {name}, {'global' if everywhere else 'local'}", run)


def of_loss(model: nn.Module, batches: list[Any]) -> tuple[Tensor, ...]:
    """Gradients of the loss, summed over the labelled batches."""
    parameters = tuple(model.parameters())
    total = tuple(torch.zeros_like(p) for p in parameters)
    for images, labels in batches:
        loss = nn.functional.cross_entropy(model(images), labels)
        for whole, part in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            whole += part
    return total


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="resnet56", help=f"{', '.join(CIFAR)}, or {FORMS}")
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--weights", type=Path, help="of the CIFAR networks: in $DATA/weights")
    parser.add_argument("--classes", type=int)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--groups", nargs="+", default=("layer*.conv1",), help="patterns")
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
    spec, weights = given.network, given.weights
    if spec in CIFAR:
        folder = Path(os.environ.get("DATA", ".data"), "weights")
        weights = weights or folder / f"cifar_{spec}_jpeg.safetensors"
        spec = f"{HERE / 'cifar_resnet.py'}:{spec}"
    model = resolve(spec, weights=weights, num_classes=given.classes)
    case = Case(model, torch.zeros(1, 3, given.size, given.size), tuple(given.groups))
    held_out = next(given.data / name for name in ("test", "val") if (given.data / name).is_dir())
    test = loader(held_out, size=given.size, batch_size=BATCH, every=2, preload=True)
    dense = thinet.count(model, case.example).macs
    print(f"dense: {evaluate(model, test).top1:.2%} of {test.images} test images")
    print(f"| method | MACs | top-1 | + BN | spread | seconds | {given.epochs} epochs (rate) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, speed in rows(given):
        found = [_one(method, speed, case, test, given, seed) for seed in range(given.seeds)]
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
    method: Method, speed: float, case: Case, test: Any, given: argparse.Namespace, seed: int
) -> dict[str, Any]:
    source = calibration_batches(
        given.data / "train", given.images, BATCH, given.size,
        seed=seed, labels="Taylor" in method.name, mirror=given.mirror,
    )  # fmt: skip
    batches = list(source)
    start = time.perf_counter()
    small = method.run(case, batches, speed)
    seconds = time.perf_counter() - start
    again, rates = float("nan"), given.lr if given.epochs else ()
    if given.bn:
        again = evaluate(thinet.recalibrate_bn(small, batches), test).top1
    return {
        "macs": thinet.count(small, case.example).macs,
        "top1": evaluate(small, test).top1,
        "top1_bn": again,
        "seconds": seconds,
        "tuned": {lr: _tuned(small, case.model, test, given, lr) for lr in rates},
    }


def _tuned(
    small: nn.Module, teacher: nn.Module, test: Any, given: argparse.Namespace, lr: float
) -> float:
    train = loader(
        given.data / "train", train=True, size=given.size, batch_size=128, preload=True,
        crop="padded" if given.size == 32 else "resized",
    )  # fmt: skip
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
