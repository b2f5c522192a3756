"""`thinet inspect`: what can go, what can't, and why."""

from __future__ import annotations

from thinet.cli import console, options
from thinet.cli.files import REPORTS, check_output, write_report
from thinet.cli.inputs import example, network, pictures
from thinet.count import count
from thinet.report.data import Network, Report
from thinet.report.rows import found_groups
from thinet.trace.analyse import find_groups


def inspect(
    model: options.ModelName,
    weights: options.Weights = None,
    size: options.Size = None,
    classes: options.Classes = None,
    report: options.ReportFile = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show the groups of channels of a model: what can go, what can't, and why.

    `thinet inspect torchvision:resnet50`

    `thinet inspect net.py:build --size 32 --report groups.html`
    """
    if report is not None:
        check_output(report, force=force, suffixes=REPORTS)

    named = network(model, weights, classes=classes, device="cpu")
    side = pictures(named.model, size, None, None).size
    inputs = example(named.model, side)
    groups = find_groups(named.model, inputs)
    counts = count(named.model, inputs)
    free = [group for group in groups if group.locked is None]
    makers = {name for group in free for name in group.producers}
    macs = sum(c.macs for name, c in counts.by_module.items() if name in makers)
    share = macs / counts.macs if counts.macs else 0.0
    result = Report(
        title=f"{model} at {side} x {side}",
        summary=(
            f"{len(free)} of {len(groups)} groups can be cut; their filters make "
            f"{100 * share:.1f}% of the multiply-adds."
        ),
        networks=(Network(model, counts.macs, counts.params),),
        groups=found_groups(groups),
    )
    if report is not None:
        write_report(result, report)
        console.say(f"wrote {report}")
    console.show(result, as_json=as_json)
