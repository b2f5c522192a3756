"""`thinet demo`: the whole job on a small real data set, in about a minute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinet.cli import console, options
from thinet.cli.files import check_output, write_report
from thinet.demo import run


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for report.html and small.safetensors.")
    ] = Path("thinet-demo"),
    seed: options.Seed = 0,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Train a small network on real digits, prune it five ways, compare, save, load again.

    `thinet demo --out thinet-demo`
    """
    page = check_output(out / "report.html", force=force)
    check_output(out / "small.safetensors", force=force)

    with console.progress() as told:
        found = run(out, seed=seed, progress=told)
    write_report(found.report, page)
    console.show(found.report, as_json=as_json)
    console.say(f"\nwrote {page} and {found.model_file}")
