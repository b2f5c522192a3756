"""Methods over budgets and seeds in every form of a report: the numbers and where they lie."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from thinet.cells import Cell, Comparison, Dense, Point, Spread
from thinet.errors import OptionError
from thinet.report import html, markdown, terminal
from thinet.report.chart import BOTTOM, LEFT, RIGHT, TOP, method_chart
from thinet.report.data import Network, Report, from_dict, to_dict
from thinet.report.methods import compared, method_lines, method_table, spread


def point(
    criterion: str, budget: str, top1: float, deviation: float | None, **more: object
) -> Point:
    values: dict[str, object] = {"macs": 500_000.0, "params": 20_000.0, **more}
    return Point(criterion, "full", budget, 2, 0, 1.5, top1=Spread(top1, deviation), **values)  # pyright: ignore[reportArgumentType]


DENSE = Network("dense", 1_000_000, 50_000, top1=0.9)
POINTS = (
    point("thinet", "keep=0.7", 0.85, 0.01, top1_tuned=Spread(0.88, 0.02)),
    point("thinet", "keep=0.3", 0.55, 0.05, top1_tuned=Spread(0.75, 0.0)),
    point("a<b", "keep=0.7", 0.7, None, top1_tuned=Spread(0.8)),
    Point("bn-scale", "full", "keep=0.7", 0, 3, 0.5),
)
FULL = Report("t", networks=(DENSE,), points=POINTS, notes=("bn-scale failed",))


def test_spreads_are_said_as_percentages() -> None:
    assert spread(Spread(0.8436, 0.0021)) == "84.4±0.2%"
    assert spread(Spread(0.8436)) == "84.4%"
    assert spread(None) == "–"


def test_the_table_has_the_dense_network_first_and_says_what_failed() -> None:
    headings, rows = method_table(FULL)
    assert headings == [
        "method", "budget", "MACs", "params", "untrained top-1", "fine-tuned top-1", "seeds",
    ]  # fmt: skip
    assert rows[0] == ["dense", "", "1.00M", "50.0k", "90.0%", "", ""]
    assert rows[1][4:] == ["85.0±1.0%", "88.0±2.0%", "2 of 2"]
    assert rows[4] == ["bn-scale, full", "keep=0.7", "–", "–", "failed", "–", "0 of 3"]
    alone = Report("t", networks=(DENSE,), points=(point("l2", "keep=0.5", 0.5, None),))
    assert method_table(alone)[0][4:] == ["top-1"]
    five = point("l2", "keep=0.5", 0.5, 0.1, top5=Spread(0.8, 0.1))
    known = Report("t", networks=(DENSE,), points=(five,))
    assert method_table(known)[0][4:] == ["top-1", "top-5"]
    assert method_table(known, top5=False)[0][4:] == ["top-1"]
    assert method_table(Report("t")) == ([], [])


def test_lines_run_over_the_channels_or_the_multiply_adds_that_stay() -> None:
    first, second = method_lines(FULL, tuned=False)
    assert [(m.x, m.y.mean) for m in first.marks] == [(0.3, 0.55), (0.7, 0.85)]
    assert (second.name, len(second.marks)) == ("a<b, full", 1)
    assert [m.y.mean for m in method_lines(FULL, tuned=True)[0].marks] == [0.75, 0.88]
    mixed = (*POINTS[:2], point("thinet", "macs=0.25", 0.5, None, macs=260_000.0))
    (line,) = method_lines(Report("t", networks=(DENSE,), points=mixed), tuned=False)
    assert [m.x for m in line.marks] == [0.26, 0.5, 0.5]


def scale(drawing: str, *, across: bool) -> tuple[float, float]:
    """Value and position of the first tick of an axis, and of the last: value per position."""
    ticks = [
        (float(y if not across else x), float(percent) / 100)
        for x, y, anchor, percent in re.findall(
            r'class="tick" x="([\d.]+)" y="([\d.]+)" dy="0.35em" text-anchor="(\w+)">(\d+)%',
            drawing,
        )
        if (anchor == "middle") == across
    ]
    (at, value), (to, last) = ticks[0], ticks[-1]
    per = (last - value) / (to - at)
    return value - per * at, per


def read_off(drawing: str, places: str) -> list[tuple[float, float]]:
    """What the points of a shape say, by the labels of both axes."""
    (x0, dx), (y0, dy) = scale(drawing, across=True), scale(drawing, across=False)
    pairs = [pair.split(",") for pair in places.split()]
    return [(x0 + dx * float(x), y0 + dy * float(y)) for x, y in pairs]


@pytest.mark.parametrize("tuned", [False, True])
def test_marks_and_bands_lie_where_the_axes_say(tuned: bool) -> None:
    drawing = method_chart(FULL, tuned=tuned)
    low, high = POINTS[1], POINTS[0]
    numbers = [(p.top1_tuned if tuned else p.top1) or Spread(0) for p in (low, high)]
    (first, second) = re.findall(r'<polyline class="(line\d)" points="([^"]+)"', drawing)
    means = [(0.3, numbers[0].mean), (0.7, numbers[1].mean)]
    assert (first[0], second[0]) == ("line0", "line1")
    assert read_off(drawing, first[1]) == [pytest.approx(m, abs=2e-3) for m in means]
    (band,) = re.findall(r'<polygon class="line0" points="([^"]+)"', drawing)
    edges = [
        (x, n.mean + s * (n.deviation or 0)) for s in (1, -1) for x, n in zip((0.3, 0.7), numbers)
    ]
    edges = [*edges[:2], edges[3], edges[2]]
    assert read_off(drawing, band) == [pytest.approx(e, abs=2e-3) for e in edges]
    tips = re.findall(r"<title>(.*?)</title>", drawing)
    assert tips[0] == f"thinet, full, keep=0.3: {spread(numbers[0])}"
    assert len(tips) == 3 and tips[2].startswith("a&lt;b, full, keep=0.7: ")
    ((dense,),) = [re.findall(r'class="dashed"[^>]* y1="([\d.]+)"', drawing)]
    assert read_off(drawing, f"{LEFT},{dense}")[0][1] == pytest.approx(0.9, abs=2e-3)
    assert "channels that stay" in drawing


def test_a_single_budget_and_many_methods_can_be_drawn() -> None:
    points = tuple(point(f"c{i}", "macs=0.5", 0.02 * i, 0.3) for i in range(8))
    drawing = method_chart(Report("t", networks=(DENSE,), points=points), tuned=False)
    assert drawing.count("<polygon") == drawing.count("<polyline") == 8
    assert 'class="line0 again"' in drawing and "multiply-adds that stay" in drawing
    places = re.findall(r'points="([^"]+)"', drawing)
    pairs = [tuple(map(float, pair.split(","))) for place in places for pair in place.split()]
    assert all(LEFT - 4 <= x <= RIGHT + 4 and TOP <= y <= BOTTOM for x, y in pairs)
    assert method_chart(Report("t", points=POINTS[3:]), tuned=False) == ""


def test_every_form_shows_the_methods() -> None:
    page = html.render(FULL)
    assert page.count("<svg") == 2
    for words in ("Without training", "After fine-tuning", "a&lt;b, full", "85.0±1.0%", "failed"):
        assert words in page
    lines = markdown.render(FULL).splitlines()
    assert "| thinet, full | keep=0.3 | 500k | 20.0k | 55.0±5.0% | 75.0±0.0% | 2 of 2 |" in lines
    console = Console(width=80, record=True, file=io.StringIO())
    terminal.show(FULL, console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("bn-scale, full", "keep=0.3", "88.0±2.0%", "0 of 3", "note  bn-scale failed"):
        assert words in shown


def test_methods_survive_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(FULL)))) == FULL
    broken = to_dict(FULL)
    broken["points"][0]["top1"]["mean"] = "much"
    with pytest.raises(OptionError, match="'thinet, full, keep=0.7' has 'much' for mean"):
        from_dict(broken)


def test_a_comparison_becomes_a_report() -> None:
    def cell(seed: int, **more: object) -> Cell:
        return Cell("l2", "none", "keep=0.5", seed, **more)  # pyright: ignore[reportArgumentType]

    cells = (
        cell(0, macs=5, params=4, top1=0.5, notes=("conv: by weight sum",)),
        cell(1, macs=5, params=4, top1=0.7, notes=("conv: by weight sum",)),
        cell(2, error="RepairError: singular"), cell(3, error="RepairError: singular"),
    )  # fmt: skip
    dense = Dense(10, 8, 0.9, 0.99, 0.1, 200)
    assert (
        compared(Comparison(dense, cells, others=4), "title")
        .notes[-1]
        .startswith(
            "4 more cells are in the folder that were not asked for this time; give their criteria"
        )
    )
    report = compared(Comparison(dense, cells), "title", (("data", "x"),))
    assert (
        report.summary
        == "4 cells, 2 of them failed. Dense: 90.0% top-1, 99.0% top-5 on 200 images."
    )
    assert report.notes == (
        "l2, none, keep=0.5 failed: RepairError: singular (seed 2, 3)",
        "l2: conv: by weight sum",
    )
    other = replace(cells[0], budget="keep=0.2", notes=("conv: by weight sum", "wide"))
    assert compared(Comparison(dense, (*cells, other)), "title").notes[1:] == (
        "l2: conv: by weight sum",
        "l2, keep=0.2: wide",
    )
    assert (report.networks, report.points) == (
        (Network("dense", 10, 8, top1=0.9, top5=0.99),), Comparison(dense, cells).points
    )  # fmt: skip
