"""`thinet bench`: measured milliseconds of a model, beside the dense one if it was cut."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import torch
import typer

from thinet.cli import console, options
from thinet.cli.inputs import example, network, pictures
from thinet.count import count
from thinet.errors import OptionError
from thinet.report.data import Network, Report
from thinet.report.rows import timed_where, timing_notes
from thinet.timing import latencies


def bench(
    model: options.ModelName,
    weights: options.Weights = None,
    size: options.Size = None,
    classes: options.Classes = None,
    batch: options.Batch = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Threads of torch. Default: torch's own choice."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of timed runs for each model.")] = 2.0,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Time forward passes. A model that was cut is timed in turns with the dense one.

    The table has the fastest run of each, which other work on the machine disturbed least.

    `thinet bench torchvision:resnet50 --batch 8`

    `thinet bench torchvision:resnet50 --weights small.safetensors`
    """
    if not seconds > 0:
        raise OptionError(f"--seconds must be above zero, got {seconds}")

    if threads is not None:
        torch.set_num_threads(threads)
    named = network(model, weights, classes=classes, device=device)
    models = {model: named.model}
    if named.plan is not None:
        dense = network(model, None, classes=classes, device=device).model
        models = {model: dense, f"{model}, cut": named.model}
    inputs = example(named.model, pictures(named.model, size, None, None).size, batch=batch)
    console.say(f"timing: {timed_where(inputs)}")
    timed = latencies(models, inputs, seconds=seconds)
    counted = {name: count(net, inputs[:1]) for name, net in models.items()}
    result = Report(
        title=f"{model}, {inputs.shape[2]} x {inputs.shape[3]}, batch {batch}",
        networks=tuple(
            Network(name, counted[name].macs, counted[name].params, timed[name].best_ms)
            for name in models
        ),
        notes=timing_notes(timed),
        facts=(("device", str(inputs.device)), ("threads", str(torch.get_num_threads()))),
    )
    timings = {name: asdict(t) for name, t in timed.items()}
    console.show(result, as_json=as_json, extra={"latencies": timings})
