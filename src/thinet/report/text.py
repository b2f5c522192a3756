"""Numbers as people read them, and the sentences and tables that every form of a report shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thinet.report.data import Network, Report

MISSING = "–"


def amount(number: float) -> str:
    """Three significant digits and a unit: 1323184 -> '1.32M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size * 0.9995:
            return f"{_digits(number / size)}{unit}"
    return str(int(number)) if float(number).is_integer() else _digits(number)


def _digits(number: float) -> str:
    if abs(number) >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if abs(number) >= 9.995 else f"{number:.2f}"


def percent(fraction: float | None) -> str:
    """0.8732 -> '87.3%'."""
    return MISSING if fraction is None else f"{100 * fraction:.1f}%"


def milliseconds(value: float | None) -> str:
    """1.2345 -> '1.23 ms'."""
    return MISSING if value is None else f"{_digits(value)} ms"


def counted(number: int, what: str) -> str:
    """(1, 'thread') -> '1 thread', (2, 'thread') -> '2 threads'."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def times(before: float | None, after: float | None) -> str:
    """How many times smaller: (4.0, 1.0) -> '4.00x'; empty where one of them is not known."""
    return f"{before / after:.2f}x" if before and after else ""


def points(before: float | None, after: float | None) -> str:
    """The change of an accuracy in percentage points, signed; empty if one is not known."""
    if before is None or after is None:
        return ""
    return f"{100 * (after - before):+.1f} points"


@dataclass(frozen=True)
class Figure:
    """One of the big numbers: what it was, what it is, and the change."""

    label: str
    before: str
    after: str
    change: str
    better: bool


def figures(report: Report) -> tuple[Figure, ...]:
    """The big numbers of a report; empty where nothing was made smaller."""
    dense, small = report.dense, report.headline
    if dense is None or small is None:
        return ()
    found: list[Figure] = []

    def cost(label: str, show: Callable[[float], str], old: float, new: float) -> None:
        found.append(Figure(label, show(old), show(new), times(old, new), new < old))

    cost("MACs", amount, dense.macs, small.macs)
    cost("Parameters", amount, dense.params, small.params)
    if dense.latency_ms is not None and small.latency_ms is not None:
        cost("Latency", milliseconds, dense.latency_ms, small.latency_ms)
    if dense.best is not None and small.best is not None:
        change = points(dense.best, small.best)
        better = small.best >= dense.best
        found.append(Figure("Top-1", percent(dense.best), percent(small.best), change, better))
    return tuple(found)


Column = tuple[str, Callable[[Network], str]]


def columns(report: Report) -> tuple[Column, ...]:
    """Heading and cell of each column of the table of networks that has something to show."""
    dense = report.dense

    def compared(value: Callable[[Network], float | None]) -> Callable[[Network], str]:
        return lambda n: times(value(dense), value(n)) if dense is not None else ""

    several = len(report.networks) > 1
    shown: list[Column] = [("MACs", lambda n: amount(n.macs))]
    if several:
        shown.append(("fewer", compared(lambda n: n.macs)))
    shown.append(("params", lambda n: amount(n.params)))
    if any(n.latency_ms is not None for n in report.networks):
        shown.append(("latency", lambda n: milliseconds(n.latency_ms)))
        if several:
            shown.append(("faster", compared(lambda n: n.latency_ms)))
    if any(n.top1 is not None for n in report.networks):
        tuned = any(n.top1_tuned is not None for n in report.networks)
        cut = "after the last cut" if report.steps else "untrained top-1"
        shown.append((cut if tuned else "top-1", lambda n: percent(n.top1)))
    if any(n.top1_tuned is not None for n in report.networks):
        shown.append(("fine-tuned top-1", lambda n: percent(n.top1_tuned)))
    return tuple(shown)


def locked_reasons(report: Report) -> tuple[str, ...]:
    """One sentence a reason, naming the groups that share it."""
    by_reason: dict[str, list[str]] = {}
    for group in report.groups:
        if group.locked is not None:
            by_reason.setdefault(group.locked, []).append(group.name)
    sentences: list[str] = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        sentences.append(f"{shown}: {reason}")
    return tuple(sentences)
