"""`thinet inspect`: what can go, what can't, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from thinet.cli import console, options
from thinet.cli.files import REPORTS, check_output, write_report, write_text
from thinet.cli.inputs import example, network, pictures
from thinet.count import count
from thinet.errors import OptionError
from thinet.report import coupling_html
from thinet.report.coupling import coupling
from thinet.report.data import Network, Report
from thinet.trace.analyse import analyse
from thinet.trace.groups import never_run


def inspect(
    model: options.ModelName,
    weights: options.Weights = None,
    size: options.Size = None,
    classes: options.Classes = None,
    choice: options.Choice = None,
    normalised: options.Normalised = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Also draw the network and its groups as a page to look at."
        ),
    ] = None,
    report: options.ReportFile = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show the groups of channels of a model: what can go, what can't, and why.

    `thinet inspect torchvision:resnet50`

    `thinet inspect net.py:build --size 32 --html coupling.html`
    """
    chosen = options.choices(choice)
    if html is not None:
        check_output(html, force=force, suffixes=(".html",))
    if report is not None:
        check_output(report, force=force, suffixes=REPORTS)
        if html is not None and html.resolve() == report.resolve():
            raise OptionError(f"--html and --report are both {html}; give two names")

    named = network(model, weights, classes=classes, device="cpu")
    side = pictures(named.model, size, None, None).size
    inputs = example(named.model, side)
    analysis = analyse(named.model, inputs, normalised=normalised, choices=chosen)
    counts = count(named.model, inputs)
    drawn = coupling(named.model, analysis, counts)
    free = [group for group in analysis.groups if group.locked is None]
    full, terms = analysis.costs.full, analysis.costs.macs_terms
    macs = sum(term.at({}, full) for term in terms if term.sizes)
    share = macs / counts.macs if counts.macs else 0.0
    result = Report(
        title=f"{model} at {side} x {side}",
        summary=(
            f"{len(free)} of {len(analysis.groups)} groups can be cut; the layers that they "
            f"make thinner hold {100 * share:.1f}% of the multiply-adds."
        ),
        networks=(Network(model, counts.macs, counts.params),),
        groups=tuple(rail.group for rail in drawn.rails),
        notes=never_run(analysis, named.model),
    )
    if report is not None:
        write_report(result, report)
        console.say(f"wrote {report}")
    if html is not None:
        write_text(html, coupling_html.render(result.title, result.summary, drawn))
        console.say(f"wrote {html}")
    console.show(result, as_json=as_json)
