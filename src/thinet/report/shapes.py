"""The shapes that drawings are made of, as SVG text; colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 760
"""Of every drawing, in px of its own grid."""


def drawing(height: float, title: str, body: Sequence[str]) -> str:
    """A whole drawing of these shapes."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def rect(x: float, y: float, width: float, height: float, css: str) -> str:
    """A bar from its upper left corner; a negative width counts as none."""
    return (
        f'<rect class="{css}" x="{x:g}" y="{y:.1f}" width="{max(width, 0):.1f}" '
        f'height="{height:.1f}" rx="2"/>'
    )


def text(x: float, y: float, words: str, anchor: str, css: str, tip: str = "") -> str:
    """Words centred on a height; `tip` shows under the mouse."""
    title = f"<title>{escape(tip)}</title>" if tip and tip != words else ""
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" dy="0.35em" text-anchor="{anchor}">'
        f"{escape(words)}{title}</text>"
    )


def ticks(least: float, most: float) -> tuple[float, float, float]:
    """Lowest and highest tick and the step between, round numbers, at most six steps."""
    for step in (0.01, 0.02, 0.05, 0.1, 0.2):
        low, high = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
        if high - low <= 6:
            return low * step, max(high, low + 1) * step, step
    return 0.0, 1.0, 0.2


def spread(labels: list[tuple[float, str, str]], gap: float) -> list[tuple[float, str, str]]:
    """Labels moved down as far as needed not to lie on each other."""
    placed: list[tuple[float, str, str]] = []
    for y, name, css in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, name, css))
    return placed
