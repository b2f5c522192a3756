"""The drawing of a coupling: one picture a stage, layers down the page, groups as rails beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

from thinet.report.coupling import Coupling, Layer, Rail
from thinet.report.text import amount, percent

ROW: Final = 19.0
QUIET: Final = 14.0
"""Heights of a layer that multiplies, and of one that does not (a norm), in px."""

NAMES: Final = 450
"""Where the rails begin, in px."""

BAR: Final = 44
"""Length of the bar of the layer with most multiply-adds, in px."""

RAILS: Final = 330
"""Room that the rails share where they are many, in px."""


def lanes(rails: Sequence[Rail]) -> list[int]:
    """A lane for each rail, so that no two beside each other share one (greedy, by first stop)."""
    ends: list[int] = []
    found = [0] * len(rails)
    for i in sorted(range(len(rails)), key=lambda i: rails[i].stops[0]):
        first, last = rails[i].stops[0], rails[i].stops[-1]
        lane = next((n for n, end in enumerate(ends) if end < first), len(ends))
        ends[lane : lane + 1] = [last]
        found[i] = lane
    return found


def drawings(coupling: Coupling) -> list[str]:
    """An SVG for each stage. A rail that goes through a stage goes through its picture."""
    taken = lanes(coupling.rails)
    count = max(taken, default=0) + 1
    step = max(3.5, min(14.0, RAILS / count))
    costs = [layer.macs for layer in coupling.layers]
    total, most = max(sum(costs), 1), max([*costs, 1])
    at_layer: dict[int, list[int]] = {}
    for rail in coupling.rails:
        for stop in rail.stops:
            at_layer.setdefault(stop, []).append(rail.number)
    found: list[str] = []
    for name, first, end in coupling.stages:
        heights = [ROW if coupling.layers[i].macs else QUIET for i in range(first, end)]
        centres, bottom = _centres(first, heights)
        width = NAMES + step * count + 24
        body = [
            _layer(coupling.layers[i], y, height, width, total, most, at_layer.get(i, ()))
            for (i, y), height in zip(centres.items(), heights, strict=True)
        ]
        for rail, lane in zip(coupling.rails, taken, strict=True):
            if rail.stops[0] < end and rail.stops[-1] >= first:
                body.append(_rail(rail, NAMES + step * (lane + 0.5), centres, bottom))
        found.append(
            f'<svg viewBox="0 0 {width:g} {bottom:g}" width="{width:g}" height="{bottom:g}" '
            f'role="img" aria-label="{escape(name)}">{"".join(body)}</svg>'
        )
    return found


def _centres(first: int, heights: Sequence[float]) -> tuple[dict[int, float], float]:
    """The middle of each layer's row, and the height of all."""
    found: dict[int, float] = {}
    y = 4.0
    for number, height in enumerate(heights):
        found[first + number] = y + height / 2
        y += height
    return found, y + 4.0


def _layer(
    layer: Layer,
    y: float,
    height: float,
    width: float,
    total: int,
    most: int,
    groups: Iterable[int],
) -> str:
    quiet = "" if layer.macs else " quiet"
    marks = " ".join(map(str, groups))
    tip = f"{layer.name}: {layer.kind} {layer.size}, {amount(layer.params)} parameters"
    share = layer.macs / total
    tip += f", {amount(layer.macs)} MACs ({percent(share)})" if layer.macs else ""
    tip += "" if layer.runs else "; it does not run on the example input"
    bar = (
        f'<rect class="bar" x="{NAMES - 64}" y="{y - 4:.1f}" '
        f'width="{max(BAR * layer.macs / most, 0.7):.1f}" height="8"/>'
        f'<text class="what" x="{NAMES - 68}" y="{y:.1f}" dy="0.33em" text-anchor="end">'
        f"{percent(share)}</text>"
        if layer.macs
        else ""
    )
    return (
        f'<g class="layer{quiet}" data-g="{marks}"><title>{escape(tip)}</title>'
        f'<rect class="row" x="0" y="{y - height / 2:.1f}" width="{width:g}" height="{height:g}"/>'
        f'<text x="4" y="{y:.1f}" dy="0.33em">{escape(fit(layer.name, 27))}</text>'
        f'<text class="what" x="206" y="{y:.1f}" dy="0.33em">{escape(fit(_what(layer), 20))}</text>'
        f"{bar}</g>"
    )


def _what(layer: Layer) -> str:
    return layer.size if "→" in layer.size else layer.kind


def _rail(rail: Rail, x: float, centres: Mapping[int, float], bottom: float) -> str:
    """A line through the stage with a square where channels are made, an arrow where mixed."""
    here = [stop for stop in rail.stops if stop in centres]
    inside = range(min(centres), max(centres) + 1)
    top = centres[here[0]] if rail.stops[0] in inside else 0.0
    low = centres[here[-1]] if rail.stops[-1] in inside else bottom
    made = "".join(f"M{x - 3:g} {centres[i] - 3:.1f}h6v6h-6z" for i in rail.makes if i in centres)
    mixed = "".join(f"M{x - 4:g} {centres[i]:.1f}l7-4v8z" for i in rail.mixes if i in centres)
    ticks = "".join(f"M{x - 2.5:g} {centres[i]:.1f}h5" for i in rail.follows if i in centres)
    leads = "".join(
        f"M{NAMES - 10} {centres[i]:.1f}H{x - 4:g}"
        for i in (*rail.makes, *rail.mixes)
        if i in centres
    )
    kind = "held" if rail.group.locked else f"l{rail.colour}"
    tip = f"{rail.group.name}: {rail.group.channels} channels"
    tip += f"; locked: {rail.group.locked}" if rail.group.locked else ""
    return (
        f'<g class="rail {kind}" data-g="{rail.number}"><title>{escape(tip)}</title>'
        f'<path class="lead" d="{leads}"/><path class="wide" d="M{x:g} {top:.1f}V{low:.1f}"/>'
        f'<path class="line" d="M{x:g} {top:.1f}V{low:.1f}{ticks}"/>'
        f'<path class="stop" d="{made}{mixed}"/></g>'
    )


def fit(name: str, letters: int) -> str:
    """A long name by its end."""
    return name if len(name) <= letters else "…" + name[-letters + 1 :]
