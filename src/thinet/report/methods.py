"""Methods side by side: the rows of their table and the lines of their drawings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thinet.cells import Comparison, Point, Spread
from thinet.report.data import Network, Report
from thinet.report.text import MISSING, amount, counted, percent

Column = tuple[str, Callable[[Point], str]]


@dataclass(frozen=True)
class Mark:
    """One method at one budget in a drawing: `x` is the fraction that stays."""

    x: float
    y: Spread
    budget: str


@dataclass(frozen=True)
class Line:
    """One method in a drawing, its marks from left to right."""

    name: str
    marks: tuple[Mark, ...]


def compared(comparison: Comparison, title: str, facts: tuple[tuple[str, str], ...] = ()) -> Report:
    """What `thinet.compare` returned as a report; failed cells are among its notes."""
    dense, cells = comparison.dense, comparison.cells
    failed = len(comparison.failed)
    return Report(
        title=title,
        summary=(
            counted(len(cells), "cell")
            + (f", {failed} of them failed" if failed else "")
            + f". Dense: {percent(dense.top1)} top-1, {percent(dense.top5)} top-5 on "
            f"{dense.images} images."
        ),
        networks=(Network("dense", dense.macs, dense.params, top1=dense.top1, top5=dense.top5),),
        points=comparison.points,
        notes=(*_failures(comparison), *_remarks(comparison), *_others(comparison)),
        facts=facts,
    )


def _failures(comparison: Comparison) -> list[str]:
    seeds: dict[str, list[str]] = {}
    for cell in comparison.failed:
        sentence = f"{cell.criterion}, {cell.repair}, {cell.budget} failed: {cell.error}"
        seeds.setdefault(sentence, []).append(str(cell.seed))
    return [f"{sentence} (seed {', '.join(found)})" for sentence, found in seeds.items()]


def _remarks(comparison: Comparison) -> list[str]:
    """What the cuts reported, once a criterion; with the budgets where it is not true of all."""
    every: dict[str, dict[str, None]] = {}
    noted: dict[tuple[str, str], dict[str, None]] = {}
    for cell in comparison.cells:
        every.setdefault(cell.criterion, {})[cell.budget] = None
        for note in cell.notes:
            noted.setdefault((cell.criterion, note), {})[cell.budget] = None
    return [
        f"{criterion}{'' if at == every[criterion] else ', ' + ', '.join(at)}: {note}"
        for (criterion, note), at in noted.items()
    ]


def _others(comparison: Comparison) -> list[str]:
    if not comparison.others:
        return []
    return [
        f"{comparison.others} more cells are in the folder that were not asked for this time; give "
        "their criteria, repairs, budgets and seeds as well to see them here"
    ]


def spread(value: Spread | None) -> str:
    """Mean and sample standard deviation of a fraction: '84.4±0.2%'."""
    if value is None:
        return MISSING
    if value.deviation is None:
        return percent(value.mean)
    return f"{100 * value.mean:.1f}±{100 * value.deviation:.1f}%"


def method_table(report: Report, *, top5: bool = True) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the methods, the dense network first; empty without methods.

    Args:
        top5: show it too, where it is not 1 for all.
    """
    points = report.points
    if not points:
        return [], []
    tuned = any(p.top1_tuned is not None for p in points)
    columns: list[Column] = [
        ("method", lambda p: p.method),
        ("budget", lambda p: p.budget),
        ("MACs", lambda p: MISSING if p.macs is None else amount(p.macs)),
        ("params", lambda p: MISSING if p.params is None else amount(p.params)),
        (
            "untrained top-1" if tuned else "top-1",
            lambda p: spread(p.top1) if p.seeds else "failed",
        ),
    ]
    if tuned:
        columns.append(("fine-tuned top-1", lambda p: spread(p.top1_tuned)))
    if top5 and any(p.top5 is not None and p.top5.mean < 1 for p in points):
        columns.append(("untrained top-5" if tuned else "top-5", lambda p: spread(p.top5)))
        if tuned:
            columns.append(("fine-tuned top-5", lambda p: spread(p.top5_tuned)))
    if any(p.failed for p in points):
        columns.append(("seeds", lambda p: f"{p.seeds} of {p.seeds + p.failed}"))
    rows = [[cell(point) for _, cell in columns] for point in points]
    dense = report.dense
    if dense is not None:
        known = [dense.name, "", amount(dense.macs), amount(dense.params), percent(dense.top1)]
        rest = [percent(dense.top5) if "top-5" in name and "fine" not in name else ""
                for name, _ in columns[len(known):]]  # fmt: skip
        rows.insert(0, known + rest)
    return [heading for heading, _ in columns], rows


def method_lines(report: Report, *, tuned: bool) -> tuple[Line, ...]:
    """A line for each method that was measured, before or after fine-tuning."""
    by_method: dict[str, list[Mark]] = {}
    for point in report.points:
        y, x = point.top1_tuned if tuned else point.top1, _kept(report, point)
        if y is not None and x is not None:
            by_method.setdefault(point.method, []).append(Mark(x, y, point.budget))
    return tuple(
        Line(name, tuple(sorted(marks, key=lambda mark: mark.x)))
        for name, marks in by_method.items()
    )


def kept_what(report: Report) -> str:
    """What the fraction on the horizontal axis is of."""
    return "channels that stay" if _all_keep(report) else "multiply-adds that stay"


def _kept(report: Report, point: Point) -> float | None:
    if _all_keep(report):
        return float(point.budget.removeprefix("keep="))
    if report.dense is None or point.macs is None:
        return None
    return point.macs / report.dense.macs


def _all_keep(report: Report) -> bool:
    return all(point.budget.startswith("keep=") for point in report.points)
