"""`thinet compare`: criteria, repairs and budgets side by side on one network, over seeds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from thinet import __version__
from thinet import data as folders
from thinet.augment import Crop
from thinet.budget import Budget
from thinet.cells import Cell
from thinet.cli import console, options
from thinet.cli.files import check_folder, check_output, write_report
from thinet.cli.folders import check_classes, labelled
from thinet.cli.inputs import example, pictures, prepared_as, trained, weights_as
from thinet.compare import compare as side_by_side
from thinet.errors import OptionError
from thinet.journal import SETTINGS
from thinet.prune_options import Repair, Sampling, Widths
from thinet.report.methods import compared
from thinet.report.rows import sgd_facts
from thinet.report.text import counted
from thinet.train.config import FinetuneConfig, Precision, Schedule


def compare(
    model: options.ModelName,
    data: options.Data,
    calibration: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Images to measure on, drawn anew for each seed."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for cells.jsonl, report.html and report.json; the same command goes on "
            "there after a stop.",
        ),
    ],
    weights: options.Weights = None,
    criteria: Annotated[
        str, typer.Option(metavar="A,B,...", help="As for `thinet prune --criterion`.")
    ] = "thinet,weight-sum",
    repairs: Annotated[
        str, typer.Option(metavar="A,B,...", help="Of `full`, `scale`, `none`.")
    ] = "full",
    keep: Annotated[
        str | None, typer.Option(metavar="0.7,0.5", help="Fractions of every group that stay.")
    ] = None,
    macs: Annotated[
        str | None, typer.Option(metavar="0.7,0.5", help="Fractions of the multiply-adds.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="0.7,0.5", help="Fractions of the parameters.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many: 0, 1, ...")] = 1,
    train: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to fine-tune each cell on. Default: no training."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of fine-tuning, with --train. Default: 1.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of SGD, with --train. Default: 0.01.")
    ] = None,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    precision: Annotated[Precision, typer.Option(help="Mixed precision.")] = "no",
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the dense network's outputs too.")
    ] = False,
    crop: Annotated[
        Crop, typer.Option(help="Random part of a picture, or moved a little (CIFAR), or none.")
    ] = "resized",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Groups to cut, such as 'layer*.conv1'; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Groups to leave whole; repeatable."),
    ] = None,
    recalibrate: Annotated[
        bool,
        typer.Option(
            "--recalibrate-bn/--no-recalibrate-bn", help="Re-estimate BatchNorm statistics."
        ),
    ] = True,
    sampling: Annotated[
        Sampling, typer.Option(help="All outputs, or as the paper ten single ones an image.")
    ] = "exact",
    widths: Annotated[
        Widths, typer.Option(help="Share --macs and --params out by error or uniformly.")
    ] = "error",
    divisor: Annotated[
        int, typer.Option(min=1, help="Widths by error are multiples of it in wide groups.")
    ] = 8,
    choice: options.Choice = None,
    normalised: options.Normalised = False,
    loss_aware: options.LossAware = False,
    images: Annotated[int, typer.Option(min=1, help="Calibration images to take.")] = 1000,
    mirror: options.Mirror = False,
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Take each N-th image of DATA only.")
    ] = 1,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try cells again that failed in an earlier run.")
    ] = False,
    start_over: Annotated[
        bool, typer.Option("--start-over", help="Forget what the folder holds.")
    ] = False,
    max_corrupt: options.MaxCorrupt = 0.01,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    classes: options.Classes = None,
    batch: options.Batch = 64,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Compare methods: accuracy before and after fine-tuning, mean and spread over seeds.

    `thinet compare torchvision:resnet18 images/val --weights resnet18.safetensors
    --calibration images/train --criteria random,weight-sum,apoz,thinet --keep 0.7,0.5,0.3
    --seeds 3 --train images/train --epochs 1 --out runs/compare`

    Each cell (criterion, repair, budget, seed) is a line of cells.jsonl as soon as it is finished.
    Stopped or killed, the same command goes on; with more criteria, repairs, budgets or seeds it
    adds these. A cell that fails is shown with its reason, and the exit code is 1.
    """
    budgets = [
        Budget(**{kind: fraction})
        for kind, text in (("keep", keep), ("macs", macs), ("params", params))
        for fraction in _numbers(kind, text)
    ]
    if not budgets:
        raise OptionError("give budgets, such as --keep 0.7,0.5,0.3 or --macs 0.5")
    if train is None and (epochs is not None or lr is not None or distill):
        raise OptionError(
            "--epochs, --lr and --distill are of fine-tuning; say on what: --train DIR"
        )
    epochs, lr = epochs or 1, 0.01 if lr is None else lr
    config = FinetuneConfig(
        lr=lr, schedule=schedule, weight_decay=weight_decay, mixed_precision=precision
    )
    chosen, asked = _words(criteria), _repairs(repairs)
    check_folder(out)
    if not (out / SETTINGS).exists():  # else they are of this comparison
        for name in REPORTS:
            check_output(out / name, force=start_over, suffixes=(Path(name).suffix,))
    named = trained(model, weights, classes=classes, device=device)
    # known before any image is read; the model's file may have added some
    labels = options.asks_labels(chosen, calibration, loss_aware=loss_aware)
    prepared = pictures(named.model, size, mean, std)
    inputs = example(named.model, prepared.size)
    console.keeps(options.goes_on(f"finished cells are kept in {out}", start_over))
    with console.progress() as told:
        held = labelled(
            data, prepared, batch=batch, every=every, max_corrupt=max_corrupt, progress=told
        )
        shown = train and labelled(
            train, prepared, batch=batch, train=True, crop=crop, max_corrupt=max_corrupt,
            progress=told,
        )  # fmt: skip
        notes = check_classes(named.model, inputs, held, shown)

        there: list[int] = []

        def drawn(seed: int) -> folders.Loader:
            found = folders.calibration_batches(
                calibration, images, batch, prepared.size, prepared.mean, prepared.std, seed,
                resize=prepared.resize, labels=bool(labels), mirror=mirror,
                max_corrupt=max_corrupt, progress=told,
            )  # fmt: skip
            there.append(found.images)
            return found

        tuning: dict[str, Any] = {}
        if shown is not None:

            def ordered(seed: int) -> folders.Loader:
                shown.folder.seed = seed  # decoded once, in another order for each seed
                return shown

            tuning = {"train": ordered, "epochs": epochs, "config": config, "distill": distill}
        result = side_by_side(
            named.model, inputs, drawn, validation=held, budgets=budgets, criteria=chosen,
            repairs=asked, seeds=seeds, **tuning, only=only or None,
            skip=skip or None, recalibrate=recalibrate, sampling=sampling, widths=widths,
            divisor=divisor, choices=options.choices(choice), normalised=normalised,
            loss_aware=loss_aware, state_dir=out, resume=not start_over, retry=retry,
            device=device, on_cell=_Teller(), progress=told,
        )  # fmt: skip
    report = compared(
        result,
        f"{model}, methods compared",
        (
            ("data", str(data)),
            ("calibration", options.calibrated(max(there, default=images), calibration, mirror)),
            *options.labelled_by(labels),
            ("weights", weights_as(weights)),
            ("pictures", prepared_as(named.model, prepared, size, mean, std)),
            (
                "fine-tuning",
                f"{counted(epochs, 'epoch')} on {train}, lr {lr:g}" if train else "none",
            ),
            *((("crop", crop), *sgd_facts(config, batch)) if train else ()),
            *options.cut_as(only, skip), ("sampling", sampling),
            ("widths", f"by {widths}, divisor {divisor}"),
            ("teacher", "the dense network" if distill else "none"),
            ("errors of outputs", "weighed by the loss" if loss_aware else "as they are"),
            ("BatchNorm", "re-estimated" if recalibrate else "as it was"),
            ("seeds", str(seeds)), ("thinet", __version__),
            ("cells", str(out / "cells.jsonl")),
        ),
    )  # fmt: skip
    report = replace(report, notes=(*notes, *report.notes))
    for name in REPORTS:
        write_report(report, out / name)
    console.show(report, as_json=as_json, extra=result.to_dict())
    if not as_json:
        console.say(f"\nwrote {out / 'report.html'}")
    if result.failed:
        raise typer.Exit(1)


REPORTS = ("report.html", "report.json")


class _Teller:
    """A line for each finished cell, with the time that the others will take at this pace."""

    def __init__(self) -> None:
        self._began, self._told = time.monotonic(), 0

    def __call__(self, cell: Cell, done: int, total: int) -> None:
        self._told += 1
        left = (time.monotonic() - self._began) / self._told * (total - done) / 60
        scores = ((cell.top1, "cut"), (cell.top1_tuned, "trained"))
        told = [f"top-1 {100 * value:.2f}% {when}" for value, when in scores if value is not None]
        told += [f"failed: {cell.error}"] if cell.error else []
        console.say(
            f"cell {done} of {total}, {cell.name}: {', '.join(told)}, {cell.seconds:.1f} s; "
            f"about {left:.0f} min left"
        )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _repairs(text: str) -> list[Any]:
    unknown = [word for word in _words(text) if word not in get_args(Repair)]
    if unknown:
        raise OptionError(
            f"--repairs takes names of {', '.join(get_args(Repair))}, got {unknown[0]!r}"
        )
    return _words(text)


def _numbers(name: str, text: str | None) -> list[float]:
    try:
        return [float(word) for word in _words(text or "")]
    except ValueError as error:
        raise OptionError(f"--{name} takes fractions such as 0.7,0.5, got {text!r}") from error
