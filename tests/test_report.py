"""Reports show what they are given, all of it, in every form."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from thinet.errors import OptionError
from thinet.report import html, markdown, svg, terminal, text
from thinet.report.data import Group, Network, Report, from_dict, to_dict

DENSE = Network("dense", macs=4_000_000, params=200_000, latency_ms=8.0, top1=0.98)
RANDOM = Network("random", 1_000_000, 50_000, 4.0, 0.25, 0.90, (0.8, 0.9))
THINET = Network("thinet", 1_000_000, 50_000, 4.0, 0.95, 0.97, (0.96, 0.97))
GROUPS = (
    Group("conv1", 64, 32, consumers=("conv2",)),
    Group("conv2", 128, 40),
    Group("fc", 10, locked="output of the model <logits>"),
)
FULL = Report(
    "A & B <test>",
    "Two lines.",
    (DENSE, RANDOM, THINET),
    groups=GROUPS,
    notes=("BatchNorm re-estimated.",),
    facts=(("command", "thinet prune x"), ("seed", "0")),
)


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0"), (999, "999"), (1000, "1.00k"), (1_323_184, "1.32M"), (999_900, "1.00M"),
     (15_470_264_320, "15.5G"), (126_000_000, "126M"), (0.5, "0.50")],
)  # fmt: skip
def test_amounts_have_three_digits_and_a_unit(number: float, words: str) -> None:
    assert text.amount(number) == words


def test_changes_are_said_in_their_own_units() -> None:
    assert text.times(4.0, 1.0) == "4.00x"
    assert text.times(4.0, None) == "" == text.times(None, 1.0)
    assert text.points(0.98, 0.97) == "-1.0 points"
    assert text.percent(None) == text.MISSING
    assert text.percent(0.8732) == "87.3%"
    assert text.milliseconds(1.234) == "1.23 ms"


def test_the_big_numbers_compare_the_dense_with_the_chosen_network() -> None:
    assert [(f.label, f.before, f.after, f.change, f.better) for f in text.figures(FULL)] == [
        ("MACs", "4.00M", "1.00M", "4.00x", True),
        ("Parameters", "200k", "50.0k", "4.00x", True),
        ("Latency", "8.00 ms", "4.00 ms", "2.00x", True),
        ("Top-1", "98.0%", "97.0%", "-1.0 points", False),
    ]
    chosen = Report("t", networks=(DENSE, RANDOM, THINET), chosen="random")
    assert text.figures(chosen)[3].after == "90.0%"
    assert text.figures(Report("t", networks=(DENSE,))) == ()


def test_columns_with_nothing_to_show_are_left_out() -> None:
    bare = Report("t", networks=(Network("a", 10, 20), Network("b", 5, 10)))
    assert [heading for heading, _ in text.columns(bare)] == ["MACs", "fewer", "params"]
    assert [heading for heading, _ in text.columns(FULL)][-2:] == [
        "untrained top-1",
        "fine-tuned top-1",
    ]


def test_a_report_survives_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(FULL)))) == FULL


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "not a report of thinet: it has no 'title'"),
        ({"title": "t", "networks": [{"name": "a"}]}, "missing 2 required"),
        (
            {"title": "t", "networks": [{"name": "a", "macs": "9", "params": 1}]},
            "'a' has '9' for macs",
        ),
        ({"title": "t", "groups": 3}, "not iterable"),
        ({"title": "t", "chosen": "x"}, "no network 'x' in the report"),
    ],
)
def test_what_is_no_report_is_refused(data: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        from_dict(data)


def test_two_networks_of_one_name_are_refused() -> None:
    with pytest.raises(OptionError, match="different names"):
        Report("t", networks=(DENSE, DENSE))


class Page(HTMLParser):
    """Text, addresses and open tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.bars: list[tuple[str, float]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag == "rect":
            self.bars.append((named["class"] or "", float(named["width"] or "nan")))
        if tag not in ("meta", "rect", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())


def test_the_page_is_whole_escaped_and_needs_nothing_from_elsewhere() -> None:
    page = Page(html.render(FULL))
    assert page.open == []
    assert page.links == []
    assert "@import" not in html.render(FULL)
    assert "url(" not in html.render(FULL)
    for words in ("A & B <test>", "conv2", "97.0%", "thinet prune x", "BatchNorm re-estimated."):
        assert words in page.words
    assert "fc: output of the model <logits>" in page.words


def test_bars_are_as_long_as_their_numbers() -> None:
    bars = Page(svg.widths(GROUPS)).bars
    assert [css for css, _ in bars] == ["before", "full"] * 2 + ["before", "locked"]
    before, after = bars[2][1], bars[3][1]
    assert after / before == pytest.approx(40 / 128, abs=1e-3)
    accuracy = Page(svg.accuracy_bars(FULL.networks)).bars
    assert [css for css, _ in accuracy] == ["dense", "pale", "full", "pale", "full"]
    assert accuracy[1][1] / accuracy[0][1] == pytest.approx(0.25 / 0.98, abs=1e-3)


def test_one_network_is_not_drawn_as_the_dense_one() -> None:
    bars = Page(svg.accuracy_bars((THINET,))).bars
    assert [css for css, _ in bars] == ["pale", "full"]


def test_long_names_are_cut_to_their_place_and_shown_whole_under_the_mouse() -> None:
    name = "a" * 25 + "z" * 26
    networks = (DENSE, Network(name, 1, 1, top1=0.5, top1_tuned=0.6, curve=(0.6,)))
    for drawing in (svg.accuracy_bars(networks), svg.curves(networks)):
        words = Page(drawing).words
        (shown,) = (word for word in words if word.startswith("…"))
        assert len(shown) <= 26 and name.endswith(shown[1:])
        assert name in words  # as a title
        assert f">{name}<title" not in drawing


def test_steps_are_called_steps() -> None:
    """Of a network cut and trained in turns no accuracy is one without training."""
    curve = (0.5, 0.7, 0.9)
    stepwise = Report(
        "t", networks=(DENSE, Network("small", 9, 9, top1=0.3, top1_tuned=0.9, curve=curve)),
        steps=True,
    )  # fmt: skip
    assert from_dict(json.loads(json.dumps(to_dict(stepwise)))) == stepwise
    for form in (html.render(stepwise), markdown.render(stepwise)):
        assert "after the last cut" in form
        assert "untrained" not in form and "no training" not in form
    drawing = svg.curves(stepwise.networks, steps=True)
    assert drawing.count("<circle") == 3
    assert "steps, each cut and trained" in drawing and "epochs" not in drawing


def test_curves_are_drawn_over_round_ticks() -> None:
    drawing = svg.curves(FULL.networks)
    assert drawing.count("<polyline") == 2
    assert drawing.count("<circle") == 6
    assert "no training" in drawing
    assert [f"{t}%" in Page(drawing).words for t in (20, 40, 60, 80, 100)] == [True] * 5
    assert svg.curves((DENSE,)) == ""


def test_an_empty_report_is_a_title() -> None:
    assert "<svg" not in html.render(Report("only a title"))
    assert markdown.render(Report("only a title")) == "# only a title\n"


def test_markdown_tables() -> None:
    lines = markdown.render(FULL).splitlines()
    assert "| random | 1.00M | 4.00x | 50.0k | 4.00 ms | 2.00x | 25.0% | 90.0% |" in lines
    assert "| `conv1` | 64 | 32 |" in lines
    assert markdown.table(["a", "b"], [["x|y", ""]]).splitlines()[2] == "| x\\|y |   |"


def test_the_terminal_shows_all_in_eighty_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    terminal.show(FULL, console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("thinet", "97.0%", "4.00x", "conv2", "locked  fc: output of the model <logits>"):
        assert words in shown
    assert "█" * 10 + "·" * 10 in shown


def test_long_names_leave_the_numbers_their_place() -> None:
    networks = tuple(
        Network(f"{'path/' * 20}{n}.safetensors", 125_000_000, 850_000, 123.4, 0.923) for n in "ab"
    )
    console = Console(width=80, record=True, file=io.StringIO())
    terminal.show(Report("t", "s", networks=networks), console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    for words in ("125M", "850k", "123 ms", "92.3%", "latency"):
        assert words in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"networks": [{"name": "a", "macs": None, "params": 1}]}, "'a' has None for macs"),
        ({"networks": [{"name": 3, "macs": 1, "params": 1}]}, "3 has 3 for name"),
        (
            {"networks": [{"name": "a", "macs": 1, "params": 1, "curve": [0.5, "x"]}]},
            "'a' has 'x' for curve",
        ),
        (
            {"networks": [{"name": "a", "macs": 1, "params": 1, "top1": float("inf")}]},
            "'a' has inf for top1",
        ),
        ({"groups": [{"name": "g", "channels": "8"}]}, "'g' has '8' for channels"),
        ({"groups": [{"name": "g", "channels": True}]}, "'g' has True for channels"),
        ({"groups": [{"name": "g", "channels": 8, "locked": 1}]}, "'g' has 1 for locked"),
        ({"groups": [{"name": "g", "channels": 0}]}, "'g' has 0 channels"),
    ],
)
def test_values_of_the_wrong_type_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"not a report of thinet: {re.escape(words)}"):
        from_dict({"title": "t", **change})
