"""`thinet evaluate`: the accuracy of a model on a folder of labelled images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from thinet.cli import console, options
from thinet.cli.folders import check_classes, labelled
from thinet.cli.inputs import example, pictures, prepared_as, trained, weights_as
from thinet.count import count
from thinet.report.text import amount, percent
from thinet.train.evaluate import evaluate as score


def evaluate(
    model: options.ModelName,
    data: options.Data,
    weights: options.Weights = None,
    size: options.Size = None,
    mean: options.Mean = None,
    std: options.Std = None,
    classes: options.Classes = None,
    every: Annotated[int, typer.Option(min=1, help="Take each N-th image only.", metavar="N")] = 1,
    max_corrupt: options.MaxCorrupt = 0.01,
    batch: options.Batch = 64,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Top-1, top-5 and loss of a model, dense or cut.

    `thinet evaluate torchvision:resnet18 images/val --weights resnet18.safetensors`

    `thinet evaluate torchvision:resnet18 images/val --weights small.safetensors --json`
    """
    named = trained(model, weights, classes=classes, device=device)
    prepared = pictures(named.model, size, mean, std)
    shown_as = prepared_as(named.model, prepared, size, mean, std)
    inputs = example(named.model, prepared.size)
    counts = count(named.model, inputs)
    with console.progress() as told:
        batches = labelled(
            data, prepared, batch=batch, every=every, max_corrupt=max_corrupt, progress=told
        )
        notes = check_classes(named.model, inputs, batches)
        found = score(named.model, batches, device=device, progress=told)
    if as_json:
        facts = {"data": str(data), "weights": weights_as(weights), "pictures": shown_as}
        told_of = {"macs": counts.macs, "params": counts.params, "notes": notes, "facts": facts}
        console.show_json({**asdict(found), **told_of})
        return
    console.out.print(
        f"top-1 {percent(found.top1)}  top-5 {percent(found.top5)}  loss {found.loss:.4f}  "
        f"on {found.images} images; {amount(counts.macs)} MACs, {amount(counts.params)} parameters"
        f"\npictures {shown_as}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
