"""The paper's experiments, trained and measured: dense network, recipes step by step, baselines.

    python benchmarks/reproduction.py vgg16 DATA --out runs/vgg16
    python benchmarks/reproduction.py resnet50 DATA --out runs/resnet50 --from-scratch

DATA holds `train` and `val`, each with one folder of images a class. The dense network is trained
(or read, `--weights`), then every recipe is run by `thinet.iterate`, and accuracy, parameters,
FLOPs (the authors' rule) and milliseconds are written to OUT/table.md and OUT/results.json. With
`--from-scratch` each small architecture is also trained from random weights, for as many epochs as
the dense training and the recipe's took together, and for twice as many (Liu et al. 2019).

Started again with the same arguments it goes on where it was stopped. A GPU runs it as it stands;
for two CPU cores: `--size 64 --width 0.25 --batch-norm --dense-epochs 30 --scale 0.25`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from thinet import iterate
from thinet.checkpoint import save
from thinet.data import calibration_batches, loader
from thinet.paper import authors_counts, stride_first
from thinet.plan import Plan
from thinet.recipes import resolve
from thinet.recipes.recipe import Recipe
from thinet.report.text import amount
from thinet.surgery.apply import apply_plan
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate
from thinet.train.finetune import EpochRecord, finetune
from thinet.train.scratch import from_scratch
from thinet.vision import torchvision
from thinet.weights import load_weights

VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
POOLS = (1, 3, 6, 9, 12)
NAMES = {
    "vgg16-conv": "ThiNet-Conv",
    "vgg16-gap": "ThiNet-GAP",
    "vgg16-tiny": "ThiNet-Tiny",
    "resnet50-70": "ThiNet-70",
    "resnet50-50": "ThiNet-50",
    "resnet50-30": "ThiNet-30",
}


@dataclass(frozen=True)
class Result:
    """One row: accuracies as fractions, milliseconds of one batch, epochs that were trained."""

    name: str
    top1: float
    top5: float
    params: int
    flops: int
    forward_ms: float
    backward_ms: float
    epochs: int


class Vgg16(nn.Module):
    """torchvision's VGG-16 at any width and picture size."""

    def __init__(self, width: float, size: int, classes: int, norm: bool) -> None:
        super().__init__()
        widths = [max(8, round(channels * width)) for channels in VGG]
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1))
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers.append(nn.ReLU(inplace=True))
            layers += [nn.MaxPool2d(2)] if number in POOLS else []
        side, hidden = size // 32, max(8, round(4096 * width))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * side * side, hidden), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(),
            nn.Linear(hidden, classes),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def small_vgg16() -> Vgg16:
    """What two cores can train: a quarter of the width at 64 pixels, with BatchNorm, 10 classes."""
    return Vgg16(0.25, 64, 10, norm=True)


def resnet50(width: float, classes: int, stride: str) -> nn.Module:
    """torchvision's ResNet-50, the inner layers of its blocks at any width."""
    models = torchvision().models
    model = models.resnet.ResNet(
        models.resnet.Bottleneck, [3, 4, 6, 3], classes, width_per_group=round(64 * width)
    )
    if stride == "first":
        stride_first(model)
    return model


def small_resnet50() -> nn.Module:
    """What two cores can train: a quarter of the inner width, for 64 pixels, 10 classes."""
    return resnet50(0.25, 10, "first")


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    results = [run.dense()]
    for recipe in args.recipes or [n for n in NAMES if n.startswith(args.model)]:
        results += run.recipe(recipe)
        write(args, results)
    write(args, results)


class Run:
    """Data, options and the dense network of one call."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        common = {"size": args.size, "batch_size": args.batch, "workers": args.threads}
        self.train = loader(args.data / "train", train=True, seed=args.seed, **common)
        self.val = loader(args.data / "val", protocol=args.protocol, **common)
        self.calibration = list(
            calibration_batches(
                args.data / "train", args.images, args.batch, args.size, seed=args.seed
            )
        )
        self.example = torch.randn(1, 3, args.size, args.size)
        self.model = self.fresh()

    def fresh(self) -> nn.Module:
        """The dense architecture with random weights."""
        args, classes = self.args, len(self.train.classes)
        torch.manual_seed(args.seed)
        if args.model == "vgg16":
            model: nn.Module = Vgg16(args.width, args.size, classes, args.batch_norm)
        else:
            model = resnet50(args.width, classes, args.stride)
        return model.to(memory_format=torch.channels_last)

    def trained(self, model: nn.Module, epochs: int, name: str) -> nn.Module:
        """From random weights, one-cycle, with a state of its own."""
        config = FinetuneConfig(
            lr=self.args.lr, schedule="one-cycle", nesterov=True, label_smoothing=0.1,
            decay_norm_and_bias=False, mixed_precision=self.args.precision, seed=self.args.seed,
        )  # fmt: skip
        return finetune(
            model, self.train, epochs=epochs, config=config, validation=self.val,
            checkpoint=self.args.out / f"{name}.run", on_epoch=say(name), device=self.device,
        ).model  # fmt: skip

    def dense(self) -> Result:
        name = {"vgg16": "VGG-16", "resnet50": "ResNet-50"}[self.args.model]
        epochs = 0
        if self.args.weights is not None:
            load_weights(self.model, self.args.weights)
        else:
            epochs = self.args.dense_epochs
            self.model = self.trained(self.model, epochs, "dense")
        self.dense_epochs = epochs
        self.model.eval()
        save(self.args.out / "dense.safetensors", self.model, Plan())
        return self.measured(name, self.model, epochs)

    def recipe(self, name: str) -> list[Result]:
        """A recipe step by step, and its architecture from scratch if that was asked for."""
        args, start, plan, epochs = self.args, self.model.to(self.device), Plan(), 0
        example = self.example.to(self.device)
        recipe = resolve(name, start, example)
        if name == "vgg16-gap":
            # As in the paper, the pooled head goes onto the network of vgg16-conv.
            conv = self.iterated(resolve("vgg16-conv", start, example), start)
            start, plan = conv.model, conv.plan
            epochs = sum(step.epochs for step in conv.steps)
            recipe = Recipe(name, recipe.steps[-1:], recipe.source)
        found = self.iterated(recipe, start)
        plan = plan.then(found.plan)
        epochs += sum(step.epochs for step in found.steps)
        save(args.out / f"{name}.safetensors", found.model, plan)
        results = [self.measured(NAMES[name], found.model, self.dense_epochs + epochs)]
        for times in (1, 2) if args.from_scratch else ():
            total = times * (epochs + (self.dense_epochs or args.dense_epochs))
            model = self.fresh()
            apply_plan(model, plan)
            model = from_scratch(model, seed=args.seed)
            model = self.trained(model, total, f"{name}-scratch-{times}")
            results.append(self.measured(f"{NAMES[name]} from scratch x{times}", model, total))
        return results

    def iterated(self, recipe: Recipe, start: nn.Module) -> Any:
        args = self.args
        return iterate(
            start, self.example.to(self.device), self.calibration, recipe=recipe,
            train=self.train, validation=self.val, state_dir=args.out / f"{recipe.name}.run",
            scale=args.scale, lr_scale=args.lr_scale, criterion=args.criterion,
            repair=args.repair, sampling=args.sampling, distill=args.distill, seed=args.seed,
            config=FinetuneConfig(mixed_precision=args.precision, seed=args.seed),
            on_step=lambda step: print(
                f"{recipe.name} {step.number}/{step.steps} {step.name}: {step.top1_cut:.2%} cut, "
                f"{step.top1:.2%} trained, {step.seconds:.0f} s, "
                f"{step.seconds_left / 60:.0f} min left", flush=True,
            ),
        )  # fmt: skip

    def measured(self, name: str, model: nn.Module, epochs: int) -> Result:
        model = model.to(self.device).eval()
        scored = evaluate(model, self.val, device=self.device)
        params, flops = authors_counts(model, self.example.to(self.device))
        forward, backward = milliseconds(model, self.args.batch, self.args.size)
        result = Result(name, scored.top1, scored.top5, params, flops, forward, backward, epochs)
        print(row(result), flush=True)
        return result


def milliseconds(model: nn.Module, batch: int, size: int, runs: int = 10) -> tuple[float, float]:
    """Median milliseconds of a forward and a backward pass of one batch, in evaluation mode."""
    device = next(model.parameters()).device
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    times: list[tuple[float, float]] = []
    for _ in range(runs + 2):
        marks = [now(device)]
        loss = functional.cross_entropy(model(x), y)
        marks.append(now(device))
        loss.backward()
        marks.append(now(device))
        times.append((1000 * (marks[1] - marks[0]), 1000 * (marks[2] - marks[1])))
    model.zero_grad(set_to_none=True)
    forward, backward = zip(*times[2:], strict=True)
    return median(forward), median(backward)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def say(name: str) -> Callable[[EpochRecord], None]:
    def told(record: EpochRecord) -> None:
        scored = record.validation
        assert scored is not None
        print(f"{name} epoch {record.epoch}: {scored.top1:.2%}, {record.seconds:.0f} s", flush=True)

    return told


HEADER = (
    "| Model | Top-1 | Top-5 | #Param | #FLOPs | forward ms | backward ms | epochs |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row(r: Result) -> str:
    return (
        f"| {r.name} | {100 * r.top1:.2f} | {100 * r.top5:.2f} | {amount(r.params)} | "
        f"{amount(r.flops)} | {r.forward_ms:.2f} | {r.backward_ms:.2f} | {r.epochs} |"
    )


def write(args: argparse.Namespace, results: list[Result]) -> None:
    """The table and the numbers, with how they were made."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    del settings["data"], settings["out"]
    told = {"settings": settings, "machine": machine, "results": [asdict(r) for r in results]}
    (args.out / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    options = " ".join(f"{name}={value}" for name, value in settings.items())
    lines = [HEADER, *map(row, results), "", f"{machine}; batch {args.batch}.", "", f"`{options}`"]
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=("vgg16", "resnet50"))
    parser.add_argument("data", type=Path, help="folder that holds train and val")
    parser.add_argument("--out", type=Path, required=True, help="folder for all that comes out")
    parser.add_argument("--recipes", nargs="+", choices=sorted(NAMES), help="default: the model's")
    parser.add_argument("--weights", type=Path, help="of the dense network, else it is trained")
    parser.add_argument("--size", type=int, default=224, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=float, default=1.0, help="factor on all channels")
    parser.add_argument("--batch-norm", action="store_true", help="VGG-16 with BatchNorm")
    parser.add_argument("--stride", choices=("first", "middle"), default="first")
    parser.add_argument("--protocol", choices=("keep-ratio", "fixed"), default="keep-ratio")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dense-epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.05, help="peak, of training from scratch")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the recipe's epochs")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="factor on its rates")
    parser.add_argument("--images", type=int, default=1000, help="for choosing channels")
    parser.add_argument("--criterion", default="thinet")
    parser.add_argument("--repair", choices=("scale", "full", "none"), default="full")
    parser.add_argument("--sampling", choices=("exact", "paper"), default="exact")
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
