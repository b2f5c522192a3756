"""The page of `thinet inspect --html`: a network drawn so that a person sees what is coupled."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from thinet.report.coupling import Coupling, Rail, folded
from thinet.report.html import STYLE
from thinet.report.rails import drawings
from thinet.report.text import MISSING, amount, percent
from thinet.trace.choices import OTHER

OPEN: Final = 160
"""Layers up to which all stages are shown open."""

NAMED: Final = 3
"""Producers and consumers that a row of the table names; the others are counted."""

MORE_STYLE: Final = """
main { max-width: 1680px; padding: 32px 24px; }
.sides { display: grid; grid-template-columns: minmax(0, 11fr) minmax(420px, 9fr); gap: 20px; }
.sides > .panel { align-self: start; }
.table { position: sticky; top: 12px; max-height: calc(100vh - 24px); overflow: auto; }
.table td, .table th { white-space: normal; padding: 5px 8px; vertical-align: top; }
.table td { font-size: 13px; overflow-wrap: anywhere; }
.table td.number { white-space: nowrap; }
.table th:last-child { text-align: left; }
.table td.names { text-align: left; font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.table td.names i { color: var(--soft); font-style: normal; }
.table tbody tr { cursor: pointer; }
.table tr.locked td { color: var(--soft); }
.table tr.reason td { text-align: left; padding-top: 0; font-size: 12.5px; }
.table tr.has-reason td { border-bottom: 0; }
.table tr.on td { background: color-mix(in srgb, var(--full) 14%, transparent); }
.swatch { float: left; width: 10px; height: 10px; border-radius: 2px; margin: 4px 7px 0 0; }
.swatch { background: var(--c); }
details { border-top: 1px solid var(--rule); }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; padding: 5px 0; font-size: 13px; color: var(--soft); }
summary b { color: var(--ink); font-weight: 600; }
.buttons { float: right; }
button {
  font: inherit; font-size: 13px; color: var(--ink); background: none; cursor: pointer;
  border: 1px solid var(--rule); border-radius: 6px; padding: 1px 9px;
}
.map svg { width: auto; min-width: 0; max-width: none; }
.map svg text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.map svg .quiet text { font-size: 10px; fill: var(--soft); }
.map svg text.what { fill: var(--soft); font-size: 11px; }
.map svg .quiet text.what { font-size: 9.5px; }
.map .bar { fill: var(--pale); }
.map .row { fill: transparent; }
.map .layer.on .row { fill: color-mix(in srgb, var(--full) 14%, transparent); }
.map .rail { color: var(--c); cursor: pointer; }
.map .line { stroke: currentColor; stroke-width: 1.6; fill: none; }
.map .wide { stroke: transparent; stroke-width: 7; fill: none; }
.map .lead { stroke: currentColor; stroke-width: 0.6; opacity: 0.28; fill: none; }
.map .stop { fill: currentColor; }
.held .line { stroke-dasharray: 3 2; }
.chosen .map .rail { opacity: 0.13; }
.chosen .map .rail.on { opacity: 1; }
.chosen .map .rail.on .lead { opacity: 0.9; }
.chosen .map .rail.on .line { stroke-width: 2.6; }
.held { --c: var(--dense); }
@media (max-width: 1100px) { .sides { grid-template-columns: minmax(0, 1fr); } }
""" + "".join(f".l{i} {{ --c: var(--l{i}); }} " for i in range(6))

SCRIPT: Final = """
const all = [...document.querySelectorAll("[data-g]")];
const of = (e) => e.dataset.g ? e.dataset.g.split(" ") : [];
let pinned = null;
function show(groups) {
  const wanted = new Set(groups);
  document.body.classList.toggle("chosen", wanted.size > 0);
  for (const e of all) e.classList.toggle("on", of(e).some((g) => wanted.has(g)));
}
for (const e of all) {
  e.addEventListener("mouseenter", () => { if (!pinned) show(of(e)); });
  e.addEventListener("mouseleave", () => { if (!pinned) show([]); });
  e.addEventListener("click", (event) => {
    event.stopPropagation();
    pinned = pinned === e || !of(e).length ? null : e;
    show(pinned ? of(pinned) : []);
    const row = pinned && document.querySelector(`tr[data-g="${of(pinned)[0]}"]`);
    if (row && pinned.tagName !== "TR") row.scrollIntoView({ block: "nearest" });
  });
}
document.addEventListener("click", () => { pinned = null; show([]); });
for (const button of document.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    for (const d of document.querySelectorAll("details")) d.open = button.dataset.open === "1";
  });
}
"""

LEGEND: Final = (
    "Layers in running order, with their share of the multiply-adds. A rail is a group "
    "of channels that can only go together: a square where a layer makes them, an arrow where one "
    "mixes them (ThiNet's layer i+1), a tick where norms and buffers follow. Grey and dashed: "
    "locked. Point at a rail, a layer or a row to see what it is coupled with; click to hold it."
)


def render(title: str, summary: str, coupling: Coupling) -> str:
    """The whole HTML document; nothing in it comes from elsewhere."""
    pictures = "".join(_stage(coupling, i, svg) for i, svg in enumerate(drawings(coupling)))
    if len(coupling.layers) > OPEN:
        (overview,) = drawings(folded(coupling))
        pictures = f"<h2>Stages, and the groups that join them</h2>{overview}{pictures}"
    buttons = (
        '<span class="buttons"><button data-open="1">open all</button> '
        '<button data-open="0">close all</button></span>'
    )
    body = (
        f'<h1>{escape(title)}</h1><p class="summary">{escape(summary)}</p>'
        f'<p class="caption">{LEGEND}</p><div class="sides">'
        f'<div class="panel map">{buttons}{pictures}</div>'
        f'<div class="panel table">{_table(coupling.rails)}{_choices(coupling)}</div></div>'
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _stage(coupling: Coupling, number: int, svg: str) -> str:
    name, first, end = coupling.stages[number]
    layers = coupling.layers[first:end]
    share = sum(layer.macs for layer in layers) / max(sum(x.macs for x in coupling.layers), 1)
    met = [r for r in coupling.rails if any(first <= stop < end for stop in r.stops)]
    shown = " open" if len(coupling.layers) <= OPEN else ""
    return (
        f"<details{shown}><summary><b>{escape(name)}</b> {len(layers)} layers, "
        f"{percent(share)} of the MACs, {len(met)} groups</summary>{svg}</details>"
    )


def _table(rails: Sequence[Rail]) -> str:
    heads = ("made by", "channels", "MACs", "params", "mixed by")
    head = "".join(f"<th>{h}</th>" for h in heads)
    rows = "".join(map(_row, rails))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(rail: Rail) -> str:
    group = rail.group
    kind = "held" if group.locked else f"l{rail.colour}"
    numbers = (str(group.channels), _amount(group.macs), _amount(group.params))
    cells = "".join(f'<td class="number">{n}</td>' for n in numbers)
    css = "locked has-reason" if group.locked else ""
    row = (
        f'<tr class="{css}" data-g="{rail.number}"><td class="names">'
        f'<span class="swatch {kind}"></span>{_names((group.name, *group.producers[1:]))}</td>'
        f'{cells}<td class="names">{_names(group.consumers)}</td></tr>'
    )
    if group.locked:
        row += (
            f'<tr class="locked reason" data-g="{rail.number}"><td colspan="5">locked: '
            f"{escape(group.locked)}</td></tr>"
        )
    return row


def _amount(number: int | None) -> str:
    return MISSING if number is None else amount(number)


def _names(names: Sequence[str]) -> str:
    shown = "<br>".join(map(escape, names[:NAMED]))
    return shown + (f"<br><i>and {len(names) - NAMED} more</i>" if len(names) > NAMED else "")


def _choices(coupling: Coupling) -> str:
    """What the layout leaves to choose, in the words of `--choice`."""
    if not coupling.choices:
        return ""
    items = "".join(
        f"<li><code>{escape(key)}={escape(value)}</code> (or {escape(OTHER[value])})</li>"
        for key, value in coupling.choices
    )
    what = f"{len(coupling.choices)} choices made where the layout leaves one (--choice)"
    return f"<details><summary>{what}</summary><ul>{items}</ul></details>"
