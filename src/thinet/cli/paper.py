"""`thinet paper`: the paper's tables of sizes beside ours, counted from networks that are cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from thinet import paper as sizes
from thinet.cli import console, options
from thinet.report.text import MISSING

TITLES = {
    1: "Table 1: VGG-16 on ImageNet",
    3: "Table 3: ResNet-50 on ImageNet",
    4: "Table 4: transfer of VGG-16",
}


def paper(
    stride: Annotated[
        sizes.Stride,
        typer.Option(
            help="Convolution of ResNet-50's blocks that halves the picture: the first, as in "
            "Caffe and the paper, or the middle one, as in torchvision."
        ),
    ] = "first",
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Table 4 (CUB-200, Indoor-67) instead of 1 and 3.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """The sizes that the ThiNet paper prints, beside those of the same networks cut by thinet.

    `thinet paper`

    `thinet paper --json`

    Parameters and FLOPs by the authors' rule: weights without biases and two numbers for each
    BatchNorm channel; twice the multiply-adds. Accuracies are the paper's own.
    """
    rows = sizes.table_4() if transfer else sizes.tables(stride)
    if as_json:
        console.write(json.dumps([sizes.to_dict(row) for row in rows], indent=2) + "\n")
        return
    for number in sorted({row.table for row in rows}):
        chosen = [row for row in rows if row.table == number]
        console.out.print(_table(chosen, TITLES[number], transfer))
    agreeing = sum(row.agrees for row in rows)
    console.out.print(
        f"{agreeing} of {len(rows)} networks agree with the paper to the printed digit.",
        highlight=False,
    )


def _table(rows: Sequence[sizes.Row], title: str, transfer: bool) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("network", no_wrap=True)
    for heading in ("params", "paper", "FLOPs", "paper", "paper\ntop-1", "paper\ntop-5"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        accuracies = (
            MISSING if a is None else f"{a:.2f}" for a in (row.paper_top1, row.paper_top5)
        )
        table.add_row(
            f"{row.name}, {row.dataset}" if transfer else row.name,
            row.printed_params, row.paper_params, row.printed_flops, row.paper_flops, *accuracies,
            style=None if row.agrees else "yellow",
        )  # fmt: skip
    return table
