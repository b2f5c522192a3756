"""Small drawings as inline SVG: coloured by the page's CSS variables, readable without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from thinet.report.data import Group, Network
from thinet.report.shapes import WIDTH, drawing, rect, spread, text, ticks
from thinet.report.text import percent

LABEL = 190
"""Room for names left of bars, in px of the drawing's own grid."""


def accuracy_bars(networks: Sequence[Network]) -> str:
    """One row a network: top-1 without training (pale) and after fine-tuning (full); the first of
    several is what the others are compared with, and grey."""
    shown = [n for n in networks if n.best is not None]
    if not shown:
        return ""
    tuned = any(n.top1_tuned is not None for n in shown)
    row, top = (34 if tuned else 24), 8
    span = WIDTH - LABEL - 70
    height = top + row * len(shown) + 22
    body = [_grid(span, top, height - 22)]
    for i, network in enumerate(shown):
        y = top + i * row
        name = network.name
        body.append(text(LABEL - 10, y + row / 2, _fit(name), "end", "name", name))
        pair = [(network.top1, "pale"), (network.top1_tuned, "full")]
        bars = [(v, c if tuned and network.top1_tuned is not None else "full") for v, c in pair]
        bars = [(value, css) for value, css in bars if value is not None]
        thick = (row - 8) / len(bars)
        for j, (value, css) in enumerate(bars):
            kind = "dense" if len(networks) > 1 and network is networks[0] else css
            at = y + 4 + j * thick
            body.append(rect(LABEL, at, span * value, thick - 1, kind))
            label = percent(value)
            body.append(text(LABEL + span * value + 6, at + thick / 2, label, "start", "value"))
    return drawing(height, "Top-1 accuracy of each network", body)


def _grid(span: float, top: float, bottom: float) -> str:
    parts: list[str] = []
    for tenth in range(0, 11, 2):
        x = LABEL + span * tenth / 10
        parts.append(f'<line class="grid" x1="{x:g}" x2="{x:g}" y1="{top:g}" y2="{bottom:g}"/>')
        parts.append(text(x, bottom + 14, f"{tenth * 10}%", "middle", "tick"))
    return "".join(parts)


def curves(networks: Sequence[Network], *, steps: bool = False) -> str:
    """Top-1 after each epoch of fine-tuning (or each step of cutting and training), a line a
    network, the dense network dashed."""
    curved = [n for n in networks if n.curve]
    if not curved:
        return ""
    untrained = not steps and all(n.top1 is not None for n in curved)
    lines = [(n, ((n.top1 or 0.0,) if untrained else ()) + n.curve) for n in curved]
    first = 0 if untrained else 1
    dense = networks[0].best if not networks[0].curve else None
    values = [v for _, line in lines for v in line] + ([] if dense is None else [dense])
    low, high, step = ticks(min(values), max(values))
    left, top, right, bottom = 52, 10, WIDTH - 180, 250
    last = max(len(line) for _, line in lines) - 1

    def place(epoch: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * epoch / max(last, 1)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    body: list[str] = []
    for i in range(round((high - low) / step) + 1):
        value = low + step * i
        _, y = place(0, value)
        body.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(text(left - 8, y, f"{100 * value:.0f}%", "end", "tick"))
    for epoch in range(last + 1):
        label = "no training" if epoch + first == 0 else str(epoch + first)
        body.append(text(place(epoch, low)[0], bottom + 16, label, "middle", "tick"))
    across = "steps, each cut and trained" if steps else "epochs of fine-tuning"
    body.append(text((left + right) / 2, bottom + 34, across, "middle", "tick"))
    ends: list[tuple[float, str, str]] = []
    if dense is not None:
        y = place(0, dense)[1]
        body.append(f'<line class="dashed" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        ends.append((y, networks[0].name, "name"))
    for i, (network, line) in enumerate(lines):
        css = f"line{i % 6}"
        path = " ".join("{:.1f},{:.1f}".format(*place(e, v)) for e, v in enumerate(line))
        body.append(f'<polyline class="{css}" points="{path}"/>')
        for epoch, value in enumerate(line):
            x, y = place(epoch, value)
            tip = f"<title>{escape(network.name)}: {percent(value)}</title>"
            body.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>')
        ends.append((place(0, line[-1])[1], network.name, f"text{i % 6}"))
    for y, name, css in spread(ends, 15.0):
        body.append(text(right + 10, y, _fit(name, 24), "start", css, name))
    return drawing(bottom + 46, f"Top-1 accuracy over the {across}", body)


def widths(groups: Sequence[Group]) -> str:
    """Channels of each group: before (outline) and after (filled), in network order."""
    if not groups:
        return ""
    row = 20 if len(groups) <= 40 else 11
    top, span = 4, WIDTH - LABEL - 110
    widest = max(group.channels for group in groups)
    body: list[str] = []
    for i, group in enumerate(groups):
        y = top + i * row
        kept = group.channels if group.kept is None else group.kept
        small = "name small" if row < 20 else "name"
        body.append(text(LABEL - 10, y + row / 2, _fit(group.name), "end", small, group.name))
        body.append(rect(LABEL, y + 2, span * group.channels / widest, row - 5, "before"))
        css = "locked" if group.locked else "full"
        body.append(rect(LABEL, y + 2, span * kept / widest, row - 5, css))
        label = str(group.channels) if kept == group.channels else f"{group.channels} → {kept}"
        if group.locked:
            label += " locked"
        x = LABEL + span * group.channels / widest + 6
        body.append(text(x, y + row / 2, label, "start", small.replace("name", "value")))
    return drawing(top + row * len(groups) + 4, "Channels of each group before and after", body)


def _fit(name: str, letters: int = 26) -> str:
    return name if len(name) <= letters else "…" + name[-letters + 1 :]
