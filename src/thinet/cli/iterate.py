"""`thinet iterate`: cut a network layer by layer or block by block, and fine-tune in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from thinet import __version__
from thinet import data as folders
from thinet.augment import Crop
from thinet.checkpoint import save
from thinet.cli import console, options
from thinet.cli.files import REPORTS, check_folder, check_output, write_report
from thinet.cli.folders import check_classes, labelled
from thinet.cli.inputs import example, pictures, prepared_as, trained, weights_as
from thinet.count import count
from thinet.iterate import iterate as step_by_step
from thinet.loop import IterateResult
from thinet.plan import Plan
from thinet.prune_options import Repair, Sampling
from thinet.recipes import resolve
from thinet.recipes.recipe import Recipe
from thinet.report.data import Group, Network, Report
from thinet.report.rows import sgd_facts
from thinet.report.text import counted
from thinet.steps import StepRecord, forget
from thinet.trace.analyse import find_groups
from thinet.train.config import FinetuneConfig, Precision
from thinet.train.evaluate import evaluate
from thinet.train.processes import current
from thinet.types import Counts


def iterate(
    model: options.ModelName,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(metavar="FILE.safetensors", help="Where the smaller model goes.")
    ],
    weights: options.Weights = None,
    recipe: options.RecipeName = None,
    macs: Annotated[
        float | None, typer.Option(help="Fraction of the multiply-adds that stays, such as 0.5.")
    ] = None,
    params: Annotated[
        float | None, typer.Option(help="Fraction of the parameters that stays.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Fraction of the channels that stays; with --recipe, in place of its."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Without a recipe: groups to cut; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Without a recipe: groups to leave; repeatable."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to choose channels on. Default: DATA."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Calibration images to take.")] = 1000,
    mirror: options.Mirror = False,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to measure the accuracy on, if given."),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Factor on all epochs of the schedule (at least 1 a step).")
    ] = 1.0,
    lr_scale: Annotated[float, typer.Option(help="Factor on its learning rates.")] = 1.0,
    criterion: Annotated[str, typer.Option(help="As for `thinet prune`.")] = "thinet",
    repair: Annotated[
        Repair, typer.Option(help="New weights by least squares, the paper's scalars, or none.")
    ] = "full",
    sampling: Annotated[
        Sampling, typer.Option(help="All outputs, or as the paper ten single ones an image.")
    ] = "exact",
    distill: Annotated[
        bool, typer.Option("--distill", help="Learn from the dense network's outputs too.")
    ] = False,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    precision: Annotated[Precision, typer.Option(help="Mixed precision.")] = "no",
    crop: Annotated[
        Crop, typer.Option(help="Random part of a picture, or moved a little (CIFAR), or none.")
    ] = "resized",
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the run keeps its state, so that the same command goes on after a stop. "
            "Default: OUT.run, removed at the end.",
        ),
    ] = None,
    start_over: options.StartOver = False,
    max_corrupt: options.MaxCorrupt = 0.01,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    classes: options.Classes = None,
    batch: options.Batch = 64,
    seed: options.Seed = 0,
    device: options.Device = None,
    report: options.ReportFile = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Cut step by step, train after each step, as the ThiNet paper does.

    `thinet iterate torchvision:vgg16 images/train --weights vgg16.safetensors
    --recipe vgg16-conv --validation images/val --out vgg16-conv.safetensors`

    Stopped by Ctrl-C or killed, the same command goes on where it was.
    """
    check_output(out, force=force, suffixes=(".safetensors",))
    if report is not None:
        check_output(report, force=force, suffixes=REPORTS)
    folder = state or out.with_name(out.name + ".run")
    check_folder(folder.parent)
    asked: dict[str, Any] = options.strategy(
        recipe, only, skip, macs=macs, params=params, keep=keep
    )
    config = FinetuneConfig(weight_decay=weight_decay, mixed_precision=precision, seed=seed)
    named = trained(model, weights, classes=classes, device=device)
    prepared = pictures(named.model, size, mean, std)
    inputs = example(named.model, prepared.size)
    if recipe is not None:  # whether it fits is known before any image is read
        asked["recipe"] = resolve(recipe, named.model, inputs, keep=keep)
        del asked["keep"]
    before = count(named.model, inputs)
    labels = options.asks_labels([criterion], calibration or data, loss_aware=False)
    console.keeps(options.goes_on(f"the run's state is kept in {folder}", start_over))
    with console.progress() as told:
        train = labelled(
            data, prepared, batch=batch, train=True, crop=crop, seed=seed,
            max_corrupt=max_corrupt, progress=told,
        )  # fmt: skip
        held = validation and labelled(
            validation, prepared, batch=batch, max_corrupt=max_corrupt, progress=told
        )
        batches = folders.calibration_batches(
            calibration or data, images, batch, prepared.size, prepared.mean, prepared.std, seed,
            resize=prepared.resize, labels=bool(labels), mirror=mirror,
            max_corrupt=max_corrupt, progress=told,
        )  # fmt: skip
        notes = check_classes(named.model, inputs, train, held or None, batches)
        dense = evaluate(named.model, held, device=device, progress=told).top1 if held else None
        result = step_by_step(
            named.model, inputs, batches, **asked, train=train, validation=held or None,
            state_dir=folder, resume=not start_over, scale=scale, lr_scale=lr_scale,
            config=config, distill=distill, criterion=criterion, repair=repair, sampling=sampling,
            seed=seed, device=device, on_step=_say, progress=told,
        )  # fmt: skip
    if not current(device).main:
        return  # of several processes one writes and reports
    save(out, result.model, (named.plan or Plan()).then(result.plan))
    if state is None:
        forget(folder)
    console.say(f"wrote {out}")
    facts = (
        ("recipe", result.recipe.name), *options.cut_as(only, skip),
        ("criterion", criterion), *options.labelled_by(labels),
        ("repair", repair), ("weights", weights_as(weights)),
        ("teacher", "the dense network" if distill else "none"), ("data", str(data)),
        ("validation", str(validation or "none")),
        ("sampling", sampling),
        ("calibration", options.calibrated(batches.images, calibration or data, mirror)),
        ("pictures", prepared_as(named.model, prepared, size, mean, std)), ("crop", crop),
        *_schedule(result.recipe), *sgd_facts(config, batch), ("seed", str(seed)),
        ("thinet", __version__), ("written to", str(out)),
    )  # fmt: skip
    channels = {g.name: g.channels for g in find_groups(named.model, inputs)}
    shown = _report(model, out, result, before, dense, channels, notes, facts)
    if report is not None:
        write_report(shown, report)
        console.say(f"wrote {report}")
    console.show(shown, as_json=as_json)


def _say(step: StepRecord) -> None:
    kept = ", ".join(map(str, step.kept.values()))
    scores = "".join(
        f", top-1 {100 * value:.2f}% {when}"
        for value, when in ((step.top1_cut, "cut"), (step.top1, "trained"))
        if value is not None
    )
    console.say(
        f"step {step.number} of {step.steps}, {step.name}: "
        + (f"{kept} channels stay" if kept else "replaced")
        + f"{scores}, {step.seconds:.0f} s; about {step.seconds_left / 60:.0f} min left"
    )


def _schedule(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """For a report: how long is trained after the steps, and at which rates."""
    tunings = [step.tuning for step in recipe.steps]
    rates = sorted({tuning.lr for tuning in tunings})
    shown = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    falls = any(tuning.milestones for tuning in tunings)
    return (
        (
            "epochs",
            f"{sum(tuning.epochs for tuning in tunings)} over {counted(len(tunings), 'step')}",
        ),
        ("learning rate", shown + (", a tenth after a step's milestones" if falls else "")),
    )


def _report(
    model: str,
    out: Path,
    result: IterateResult,
    before: Counts,
    dense: float | None,
    channels: Mapping[str, int],
    notes: tuple[str, ...],
    facts: tuple[tuple[str, str], ...],
) -> Report:
    last = result.steps[-1]
    curve = tuple(step.top1 for step in result.steps if step.top1 is not None)
    return Report(
        title=f"{model}, cut step by step",
        networks=(
            Network("before", before.macs, before.params, top1=dense),
            Network(
                out.name, last.macs, last.params,
                top1=last.top1_cut, top1_tuned=last.top1, curve=curve,
            ),
        ),
        groups=tuple(
            Group(name, channels[name], kept) for name, kept in result.recipe.keep.items()
        ),
        notes=notes,
        facts=facts,
        steps=True,
    )  # fmt: skip
