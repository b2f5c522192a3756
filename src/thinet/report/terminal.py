"""A report in a terminal, by rich."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from thinet.report.data import Report
from thinet.report.methods import method_table
from thinet.report.text import MISSING, amount, columns, figures, locked_reasons

BAR_CELLS = 20
NAMED = 3
"""Layers that a row names; the others are counted."""


def show(report: Report, console: Console, *, groups: bool = True) -> None:
    """Print a report: title, networks, groups (if asked for), notes."""
    console.print(render(report, groups=groups))


def render(report: Report, *, groups: bool = True) -> RenderableType:
    """The report as something that rich can print."""
    parts: list[RenderableType] = [Text(report.title, style="bold")]
    if report.summary:
        parts.append(Text(report.summary))
    if report.points:
        parts.append(methods_table(report))
    elif report.networks:
        parts.append(networks_table(report))
    if groups and report.groups:
        parts.append(groups_table(report))
        parts.extend(Text(f"locked  {line}", style="yellow") for line in locked_reasons(report))
    parts.extend(
        Text(f"{f.label}: {f.before} -> {f.after}  {f.change}".rstrip(), style="bold")
        for f in figures(report)
    )
    parts.extend(Text(f"note  {note}", style="cyan") for note in report.notes)
    return Group(*parts)


def networks_table(report: Report) -> Table:
    """One row a network."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("network", overflow="fold")
    shown = columns(report)
    for heading, cell in shown:
        width = max([*map(len, heading.split()), *(len(cell(n)) for n in report.networks)])
        table.add_column(heading, justify="right", min_width=width)
    headline = report.headline
    for network in report.networks:
        style = "bold green" if network is headline else None
        table.add_row(network.name, *(cell(network) for _, cell in shown), style=style)
    return table


def methods_table(report: Report) -> Table:
    """One row a method and budget, the dense network first."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    headings, rows = method_table(report, top5=False)  # which would not fit
    for number, heading in enumerate(headings):
        width = max(map(len, heading.split()))
        table.add_column(
            heading, justify="right" if number > 1 else "left", min_width=width, no_wrap=number < 2
        )
    for row in rows:
        table.add_row(*row, style="yellow" if "failed" in row else None)
    return table


def groups_table(report: Report) -> Table:
    """One row a group: channels before and after, with a bar; or, where nothing is cut, its costs
    and the layers that make and mix its channels."""
    pruned = any(g.kept is not None for g in report.groups)
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group" if pruned else "made by", overflow="fold")
    table.add_column("channels", justify="right")
    if pruned:
        table.add_column("kept", justify="right")
        table.add_column("", no_wrap=True)
    else:
        table.add_column("MACs", justify="right", no_wrap=True)
        table.add_column("params", justify="right", no_wrap=True)
        table.add_column("mixed by", overflow="fold")
        table.add_column("", no_wrap=True)
    for group in report.groups:
        if pruned:
            kept = group.channels if group.kept is None else group.kept
            cells = [str(kept), _bar(kept / group.channels)]
        else:
            costs = [MISSING if n is None else amount(n) for n in (group.macs, group.params)]
            cells = [*costs, _named(group.consumers), "locked" if group.locked else ""]
        name = group.name if pruned else _named((group.name, *group.producers[1:]))
        style = "dim" if group.locked else None
        table.add_row(name, str(group.channels), *cells, style=style)
    return table


def _named(modules: Sequence[str]) -> str:
    """One a line."""
    more = [f"and {len(modules) - NAMED} more"] if len(modules) > NAMED else []
    return "\n".join([*modules[:NAMED], *more])


def _bar(fraction: float) -> str:
    full = round(fraction * BAR_CELLS)
    return "█" * full + "·" * (BAR_CELLS - full)
