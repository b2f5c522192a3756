"""Accuracy against what stays, a line for each method with a band over its seeds."""

from __future__ import annotations

from html import escape

from thinet.report.data import Report
from thinet.report.methods import Line, kept_what, method_lines, spread
from thinet.report.shapes import WIDTH, drawing, text, ticks
from thinet.report.shapes import spread as apart

LEFT, TOP, RIGHT, BOTTOM = 52, 10, WIDTH - 200, 300
COLOURS = 6
"""Lines beyond the sixth have the same colours again, dashed."""


def method_chart(report: Report, *, tuned: bool) -> str:
    """The drawing as SVG; empty where nothing was measured.

    Marks are means over seeds, bands one sample standard deviation to both sides; the dashed grey
    line is the dense network.
    """
    lines = method_lines(report, tuned=tuned)
    if not lines:
        return ""
    dense = report.dense.top1 if report.dense is not None else None
    marks = [mark for line in lines for mark in line.marks]
    values = [_edge(m.y.mean + sign * (m.y.deviation or 0.0)) for m in marks for sign in (-1, 1)]
    values += [] if dense is None else [dense]
    low, high, step = ticks(min(values), max(values))
    first, last, stride = ticks(min(m.x for m in marks), max(m.x for m in marks))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (RIGHT - LEFT) * (x - first) / (last - first)
        return across, BOTTOM - (BOTTOM - TOP) * (_edge(y) - low) / (high - low)

    body: list[str] = []
    for i in range(round((high - low) / step) + 1):
        y = place(first, low + step * i)[1]
        body.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(text(LEFT - 8, y, f"{100 * (low + step * i):.0f}%", "end", "tick"))
    for i in range(round((last - first) / stride) + 1):
        x, label = place(first + stride * i, low)[0], f"{100 * (first + stride * i):.0f}%"
        body.append(text(x, BOTTOM + 16, label, "middle", "tick"))
    body.append(text((LEFT + RIGHT) / 2, BOTTOM + 34, kept_what(report), "middle", "tick"))
    ends: list[tuple[float, str, str]] = []
    if dense is not None and report.dense is not None:
        y = place(first, dense)[1]
        body.append(f'<line class="dashed" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        ends.append((y, report.dense.name, "name"))
    for number, line in enumerate(lines):
        css = f"line{number % COLOURS}" + (" again" if number >= COLOURS else "")
        places = [place(m.x, m.y.mean) for m in line.marks]
        upper = [place(m.x, m.y.mean + (m.y.deviation or 0.0)) for m in line.marks]
        lower = [place(m.x, m.y.mean - (m.y.deviation or 0.0)) for m in line.marks]
        if upper != lower:
            body.append(_shape("polygon", css, _widened([*upper, *reversed(lower)])))
        body.append(_shape("polyline", css, places))
        body += _circles(line, css, places)
        ends.append((places[-1][1], line.name, f"text{number % COLOURS}"))
    for y, name, css in apart(ends, 15.0):
        body.append(text(RIGHT + 10, y, name, "start", css))
    when = "after fine-tuning" if tuned else "without training"
    return drawing(BOTTOM + 46, f"Top-1 accuracy of each method {when}", body)


def _edge(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))


def _shape(tag: str, css: str, places: list[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<{tag} class="{css}" points="{points}"/>'


def _widened(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The band of a single mark has a width too."""
    if len(places) > 2:
        return places
    (x, top), (_, bottom) = places
    return [(x - 4, top), (x + 4, top), (x + 4, bottom), (x - 4, bottom)]


def _circles(line: Line, css: str, places: list[tuple[float, float]]) -> list[str]:
    found: list[str] = []
    for mark, (x, y) in zip(line.marks, places, strict=True):
        tip = escape(f"{line.name}, {mark.budget}: {spread(mark.y)}")
        found.append(
            f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{tip}</title></circle>'
        )
    return found
