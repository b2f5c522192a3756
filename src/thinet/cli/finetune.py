"""`thinet finetune`: train a model, dense or cut, and go on where an earlier run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from thinet import __version__
from thinet.augment import Crop
from thinet.checkpoint import save
from thinet.cli import console, options
from thinet.cli.files import REPORTS, check_folder, check_output, write_report
from thinet.cli.folders import check_classes, labelled
from thinet.cli.inputs import (
    example,
    network,
    pictures,
    prepared_as,
    trained,
    weights_as,
)
from thinet.count import count
from thinet.errors import OptionError
from thinet.plan import Plan
from thinet.report.data import Network, Report
from thinet.report.rows import sgd_facts
from thinet.report.text import counted
from thinet.thin import thin as without_zero_taps
from thinet.train.config import FinetuneConfig, Precision, Schedule
from thinet.train.evaluate import evaluate
from thinet.train.finetune import EpochRecord
from thinet.train.finetune import finetune as train
from thinet.train.group_sparsity import GroupSparsity
from thinet.train.processes import current
from thinet.train.scratch import from_scratch
from thinet.train.state import forget
from thinet.types import Progress


def finetune(
    model: options.ModelName,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(metavar="FILE.safetensors", help="Where the trained model goes.")
    ],
    weights: options.Weights = None,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to evaluate on before and after each epoch."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 10,
    lr: Annotated[float, typer.Option(help="Peak learning rate of SGD.")] = 0.01,
    schedule: Annotated[Schedule, typer.Option(help="Of the learning rate.")] = "cosine",
    milestones: Annotated[
        str | None, typer.Option(metavar="4,8", help="Epochs after which `step` divides by ten.")
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="Of SGD.")] = 5e-4,
    label_smoothing: Annotated[float, typer.Option(help="Share spread over all classes.")] = 0.0,
    teacher: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights of the dense model, to learn from it too."),
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of an average of the weights, such as 0.999.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient.")] = None,
    accumulate: Annotated[int, typer.Option(help="Batches that make one step.")] = 1,
    precision: Annotated[Precision, typer.Option(help="Mixed precision.")] = "no",
    group_sparsity: Annotated[
        float | None,
        typer.Option(
            metavar="LAMBDA",
            help="Drive whole kernel taps to zero (Group-wise Brain Damage): weight of the "
            "penalty, such as 1e-4; 0 only holds and fixes taps.",
        ),
    ] = None,
    group_keep: Annotated[
        float | None, typer.Option(help="Fraction of each convolution's taps that stays.")
    ] = None,
    group_truncate: Annotated[
        float | None, typer.Option(help="Norm from which on a tap is not pulled at.")
    ] = None,
    group_layers: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Convolutions that lose taps; repeatable."),
    ] = None,
    thin: Annotated[
        bool,
        typer.Option(
            "--thin", help="Write convolutions that lost taps as thinner products of those left."
        ),
    ] = False,
    scratch: Annotated[
        bool,
        typer.Option(
            "--from-scratch",
            help="Train the same, cut or not, from random weights: the baseline that pruning has "
            "to beat (Liu et al. 2019).",
        ),
    ] = False,
    crop: Annotated[
        Crop, typer.Option(help="Random part of a picture, or moved a little (CIFAR), or none.")
    ] = "resized",
    flip: Annotated[bool, typer.Option(help="Mirror every other image.")] = True,
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
    """Train a model on labelled images. A cut model stays cut; its plan stays in the file.

        thinet finetune torchvision:resnet18 images/train --weights small.safetensors
        --validation images/val --epochs 10 --lr 0.01 --out tuned.safetensors

    Stopped by Ctrl-C or killed, the same command goes on where it was.
    """
    check_output(out, force=force, suffixes=(".safetensors",))
    if report is not None:
        check_output(report, force=force, suffixes=REPORTS)
    folder = state or out.with_name(out.name + ".run")
    check_folder(folder.parent)

    config = FinetuneConfig(
        lr=lr, schedule=schedule, milestones=whole_numbers(milestones), momentum=momentum,
        weight_decay=weight_decay, label_smoothing=label_smoothing, ema_decay=ema,
        clip_norm=clip, accumulate=accumulate, mixed_precision=precision, seed=seed,
        group_sparsity=_taps(group_sparsity, group_keep, group_truncate, group_layers),
    )  # fmt: skip
    if thin and config.group_sparsity is None:
        raise OptionError(
            "--thin leaves out taps that are zero; make and hold them so: --group-sparsity LAMBDA "
            "--group-keep 0.5"
        )
    named = trained(model, weights, classes=classes, device=device)
    start = from_scratch(named.model, seed=seed) if scratch else named.model
    if thin and config.group_sparsity and config.group_sparsity.keep >= 1:
        without_zero_taps(start)  # those that are zero by now are all there will be
    dense = network(model, teacher, classes=classes, device=device).model if teacher else None
    prepared = pictures(named.model, size, mean, std)
    inputs = example(named.model, prepared.size)
    counts = count(named.model, inputs)
    console.keeps(options.goes_on(f"the run's state is kept in {folder}", start_over))
    with console.progress() as told:
        images = labelled(
            data, prepared, batch=batch, train=True, crop=crop, flip=flip, seed=seed,
            max_corrupt=max_corrupt, progress=told,
        )  # fmt: skip
        held = validation and labelled(
            validation, prepared, batch=batch, max_corrupt=max_corrupt, progress=told
        )
        notes = check_classes(named.model, inputs, images, held or None)
        before = evaluate(start, held, device=device).top1 if held and not thin else None
        resumed = Resumed(told)

        def finished(r: EpochRecord) -> None:
            resumed.finished(r.epoch)
            scored = f", top-1 {100 * r.validation.top1:.2f}%" if r.validation else ""
            console.say(
                f"epoch {r.epoch} of {epochs}: loss {r.loss:.4f}{scored}, {r.seconds:.1f} s"
            )

        result = train(
            start, images, epochs=epochs, config=config, validation=held or None,
            teacher=dense, checkpoint=folder, resume=not start_over, progress=resumed,
            device=device, on_epoch=finished,
        )  # fmt: skip
    if not current(device).main:
        return  # of several processes one writes and reports
    curve = tuple(r.validation.top1 for r in result.history if r.validation is not None)
    tuned, plan = result.model, named.plan or Plan()
    if thin:
        made = without_zero_taps(tuned)
        tuned, plan = made.model, plan.then(made.plan)
        counts = count(tuned, inputs)
    save(out, tuned, plan)
    console.say(f"wrote {out}")
    if state is None:
        forget(folder)
    shown = Report(
        title=f"{model}, fine-tuned",
        networks=(
            Network(
                out.name, counts.macs, counts.params, top1=before,
                top1_tuned=curve[-1] if curve else None, curve=curve,
            ),
        ),
        notes=notes,
        facts=(
            ("weights", "random" if scratch else weights_as(weights)),
            ("teacher", str(teacher or "none")),
            ("data", str(data)), ("validation", str(validation or "none")),
            ("pictures", prepared_as(named.model, prepared, size, mean, std)),
            ("crop", crop + (", mirrored" if flip else "")),
            ("epochs", str(epochs)), ("learning rate", _rates(config)), *sgd_facts(config, batch),
            ("seed", str(seed)), ("thinet", __version__),
            ("written to", str(out)),
        ),
    )  # fmt: skip
    if report is not None:
        write_report(shown, report)
        console.say(f"wrote {report}")
    console.show(shown, as_json=as_json)


def _rates(config: FinetuneConfig) -> str:
    falls = f" after epochs {', '.join(map(str, config.milestones))}" if config.milestones else ""
    return f"{config.lr:g}, {config.schedule}{falls}"


class Resumed:
    """Progress of the training that first says where a stopped run goes on."""

    def __init__(self, told: Progress) -> None:
        self._told, self._first = told, True

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._first and what.startswith("epoch "):  # as "epoch 3 of 10"
            self._first = False
            whole, begun = int(what.split()[1]) - 1, done - 1
            parts = [f"epoch {whole}"] if whole else []
            parts += [counted(begun, "step")] if begun else []
            if parts:
                console.say(f"going on after {' and '.join(parts)}")
        self._told(what, done, total)

    def finished(self, epoch: int) -> None:
        """An epoch's end, which a run that was stopped after its last step comes to first."""
        if self._first:
            self._first = False
            console.say(f"going on at the end of epoch {epoch}")


def _taps(
    strength: float | None, keep: float | None, truncate: float | None, layers: list[str] | None
) -> GroupSparsity | None:
    """Which kernel taps are driven out, if any.

    Raises:
        OptionError: out of range, or said of nothing.
    """
    given = {"keep": keep, "truncate": truncate, "layers": tuple(layers) if layers else None}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if strength is not None:
        return GroupSparsity(strength, **options)
    if options:
        names = " and ".join(f"--group-{name}" for name in options)
        raise OptionError(f"{names} belongs to --group-sparsity LAMBDA; give it too (0 is allowed)")
    return None


def whole_numbers(text: str | None) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        OptionError: it is anything else.
    """
    try:
        return tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise OptionError(f"--milestones takes epochs such as 4,8, got {text!r}") from error
