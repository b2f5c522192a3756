"""`thinet prune`: from a trained network and a folder of images to a smaller network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thinet import __version__
from thinet import data as folders
from thinet.checkpoint import save
from thinet.cli import console, options
from thinet.cli.files import REPORTS, check_output, write_report
from thinet.cli.folders import check_classes, labelled
from thinet.cli.inputs import example, pictures, prepared_as, trained, weights_as
from thinet.errors import OptionError
from thinet.plan import Plan
from thinet.prune import prune as cut_and_repair
from thinet.prune_options import Repair, Sampling, Widths
from thinet.recipes import resolve
from thinet.recipes.apply import prune_by_recipe
from thinet.repair import RepairSettings
from thinet.report.data import Network, Report
from thinet.report.rows import (
    pruned_facts,
    pruned_groups,
    pruned_notes,
    timed_where,
    timing_notes,
)
from thinet.selection import check_names, select_groups
from thinet.timing import latencies
from thinet.trace.analyse import analyse
from thinet.train.evaluate import evaluate


def prune(
    model: options.ModelName,
    calibration: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Images to measure on; labels are not needed."),
    ],
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
    latency: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the time of a forward pass that stays, measured here on one picture "
            "(batch 1)."
        ),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of the channels of every group that stays.")
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(help="`thinet`, `thinet-omp`, `block-obs`, `weight-sum`, `apoz`, ..."),
    ] = "thinet",
    repair: Annotated[
        Repair, typer.Option(help="New weights by least squares, the paper's scalars, or none.")
    ] = "full",
    refine: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Iterations of refitting producers and consumers together after a full repair, 0 "
            "for none. Default: 5 for --macs and --params where one pass over the images is cheap.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Groups to cut, such as 'layer*.conv1'; repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Groups to leave whole; repeatable."),
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate-bn", help="Re-estimate BatchNorm statistics at the end.")
    ] = False,
    sampling: Annotated[
        Sampling, typer.Option(help="All outputs, or as the paper ten single ones an image.")
    ] = "exact",
    widths: Annotated[
        Widths | None,
        typer.Option(
            help="Share --macs or --params out by error (default), by dynamic programming over the "
            "same errors, or uniformly."
        ),
    ] = None,
    divisor: Annotated[
        int | None,
        typer.Option(min=1, help="Widths by error are multiples of it in wide groups; default 8."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Reach --macs or --params in so many steps, each chosen on what the one before "
            "left. Default: two below 0.4 where --refine is on, else one.",
        ),
    ] = None,
    width: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP=N",
            help="What stays of one group, as a number of channels or a fraction; --macs or "
            "--params shares out the others around it. Repeatable.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="GiB to work with above the model's; more waits in a temporary file. Default: 2, "
            "or as much more as the work cannot do without."
        ),
    ] = None,
    choice: options.Choice = None,
    normalised: options.Normalised = False,
    loss_aware: options.LossAware = False,
    images: Annotated[int, typer.Option(min=1, help="Calibration images to take.")] = 1000,
    mirror: options.Mirror = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labelled images to measure the accuracy on, if given."),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Take each N-th image of --data only.")
    ] = 1,
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
    """Make a trained model smaller in one shot, without training, and write it to a file.

    `thinet prune torchvision:resnet18 --weights resnet18.safetensors
    --calibration images/train --macs 0.5 --out small.safetensors`

    `thinet prune net.py:build --weights net.safetensors --size 32 --calibration images
    --keep 0.5 --only 'layer*.conv1' --data images/val --report small.html
    --out small.safetensors`

    `thinet prune torchvision:resnet50 --weights resnet50.safetensors
    --calibration images/train --recipe resnet50-50 --out small.safetensors`
    """
    check_output(out, force=force, suffixes=(".safetensors",))
    if report is not None:
        check_output(report, force=force, suffixes=REPORTS)

    asked: dict[str, Any] = options.strategy(
        recipe, only, skip, macs=macs, params=params, latency=latency, keep=keep
    )
    asked |= options.shared_out(asked, widths=widths, divisor=divisor, rounds=rounds)
    asked |= options.shared_out(asked, width=width) and {"fixed": options.fixed(width)}
    asked |= options.freed(asked, choice=choice, normalised=normalised)
    if loss_aware:
        if recipe is not None:
            raise OptionError("--recipe chooses as the paper does; leave --loss-aware out")
        asked["loss_aware"] = True
    if refine is not None:
        asked["repair_settings"] = RepairSettings(refine=refine)
    named = trained(model, weights, classes=classes, device=device)
    prepared = pictures(named.model, size, mean, std)
    inputs = example(named.model, prepared.size)
    if recipe is not None:  # whether it fits is known before any image is read
        asked["recipe"] = resolve(recipe, named.model, inputs, keep=keep)
        del asked["keep"]
    if width:  # its names are known before any image is read
        freed = {name: asked[name] for name in ("normalised", "choices")}
        asked["analysis"] = analyse(named.model, inputs, **freed)
        groups = select_groups(asked["analysis"].groups, asked["only"], asked["skip"])
        check_names("--width", asked["fixed"], groups)
    labels = options.asks_labels([criterion], calibration, loss_aware=loss_aware)
    plan, before, after = named.plan or Plan(), None, None
    with console.progress() as told:
        held = data and labelled(
            data, prepared, batch=batch, every=every, max_corrupt=max_corrupt, progress=told
        )
        batches = folders.calibration_batches(
            calibration, images, batch, prepared.size, prepared.mean, prepared.std, seed,
            resize=prepared.resize, labels=bool(labels), mirror=mirror,
            max_corrupt=max_corrupt, progress=told,
        )  # fmt: skip
        # whether the labels fit is known before the work
        notes = check_classes(named.model, inputs, held or None, batches)
        if held:
            before = evaluate(named.model, held, device=device, progress=told).top1
        result = (cut_and_repair if recipe is None else prune_by_recipe)(
            named.model, inputs, batches, **asked, criterion=criterion, repair=repair,
            recalibrate=recalibrate, sampling=sampling, memory=memory, seed=seed, progress=told,
        )  # fmt: skip
        save(out, result.model, plan.then(result.plan))
        if held:
            after = evaluate(result.model, held, device=device, progress=told).top1
    console.say(f"wrote {out}")
    done = result.report
    times: tuple[float | None, ...] = (None, None)
    if latency is not None:
        timed = latencies({"before": named.model, out.name: result.model}, inputs)
        times = tuple(t.best_ms for t in timed.values())
        notes += (f"timed in turns: {timed_where(inputs)}", *timing_notes(timed))
    shown = Report(
        title=f"{model}, pruned",
        networks=(
            Network("before", done.macs_before, done.params_before, times[0], before),
            Network(out.name, done.macs_after, done.params_after, times[1], after),
        ),
        groups=pruned_groups(done),
        notes=(*pruned_notes(done), *notes),
        facts=(
            *pruned_facts(done), ("weights", weights_as(weights)), *options.cut_as(only, skip),
            *_widths(result.plan.settings.get("widths"), divisor or 8),
            ("sampling", sampling),
            ("calibration", options.calibrated(batches.images, calibration, mirror)),
            ("top-1 on", f"{held.images} images of {data}" if held else "none"),
            ("pictures", prepared_as(named.model, prepared, size, mean, std)),
            ("seed", str(seed)), ("thinet", __version__), ("written to", str(out)),
        ),
    )  # fmt: skip
    if report is not None:
        write_report(shown, report)
        console.say(f"wrote {report}")
    console.show(shown, as_json=as_json)


def _widths(shared: str | None, divisor: int) -> tuple[tuple[str, str], ...]:
    """For a report: how the budget was shared out."""
    if shared is None:  # a recipe
        return ()
    by = shared if shared == "uniform" else f"by {shared}, multiples of {divisor} in wide groups"
    return (("widths", by),)
