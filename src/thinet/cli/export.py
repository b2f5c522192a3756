"""`thinet export`: a model as a file that other runtimes read, checked against torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from thinet.cli import console, options
from thinet.cli.files import check_output
from thinet.cli.inputs import example, pictures, trained
from thinet.errors import OptionError
from thinet.export.check import TOLERANCE, Exported
from thinet.export.onnx import OPSET, to_onnx
from thinet.export.program import to_exported_program
from thinet.report.text import amount


def export(
    model: options.ModelName,
    weights: options.Weights = None,
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE.onnx", help="Write it as ONNX.")
    ] = None,
    exported_program: Annotated[
        Path | None, typer.Option(metavar="FILE.pt2", help="Write it for `torch.export.load`.")
    ] = None,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = OPSET,
    fixed_batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images in a batch. Default: any number."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference, relative to an output's largest number.")
    ] = TOLERANCE,
    size: options.Size = None,
    classes: options.Classes = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a model, dense or cut, as ONNX or as an exported program, and check the file.

    `thinet export torchvision:resnet18 --weights small.safetensors --onnx small.onnx`

    `thinet export net.py:build --weights small.safetensors --size 32 --exported-program small.pt2`

    What the file gives on example inputs, with batches of several sizes, is compared with the
    model; a file that differs is not kept. It takes normalised images, as the model does.
    """
    if onnx is None and exported_program is None:
        raise OptionError("nothing to write; give --onnx FILE.onnx, --exported-program FILE.pt2")
    if onnx is not None:
        check_output(onnx, force=force, suffixes=(".onnx",))
    if exported_program is not None:
        check_output(exported_program, force=force, suffixes=(".pt2",))
    named = trained(model, weights, classes=classes, device="cpu")
    side = pictures(named.model, size, None, None).size
    inputs = example(named.model, side, batch=fixed_batch or 1)
    dynamic = fixed_batch is None
    written: list[Exported] = []
    if onnx is not None:
        written.append(
            to_onnx(
                named.model, inputs, onnx, opset=opset, dynamic_batch=dynamic, tolerance=tolerance
            )
        )
    if exported_program is not None:
        written.append(
            to_exported_program(
                named.model, inputs, exported_program, dynamic_batch=dynamic, tolerance=tolerance
            )
        )
    if as_json:
        console.show_json({"files": [{**asdict(e), "path": str(e.path)} for e in written]})
        return
    for file in written:
        kind = f"ONNX, opset {file.opset}" if file.opset else "exported program"
        console.out.print(
            f"wrote {file.path} ({kind}, {amount(file.bytes)}B): differs from torch by "
            f"{file.error:.1e} of the largest output, batches of "
            f"{', '.join(map(str, file.batches))}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
