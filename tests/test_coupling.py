"""The page of `thinet inspect --html`: layers, rails and words, on a net with hand-known groups."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import DenseNet, GroupedNet
from thinet.cli.app import run
from thinet.count import count
from thinet.report import coupling_html
from thinet.report.coupling import Coupling, coupling, folded, stages
from thinet.report.data import Group, from_dict, to_dict
from thinet.report.rails import lanes
from thinet.report.rows import found_groups
from thinet.trace.analyse import analyse

torch.set_num_threads(1)
ODD = "<b>&amp'\""


class Hand(nn.Module):
    """stem (4) + block (4, with its norm) -> head (4 x 2 x 2 -> 3); side runs by an odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(16, 3)
        self.unused = nn.Linear(2, 2)
        self.sides = nn.ModuleDict({ODD: nn.Conv2d(4, 6, 1)})
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.block(x)))
        side = F.softmax(self.sides[ODD](x), 1).mean((2, 3))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1)) + self.last(side)


def drawn(model: nn.Module, x: Any) -> Coupling:
    return coupling(model, analyse(model, x), count(model, x))


def hand() -> Coupling:
    return drawn(Hand().eval(), torch.randn(1, 3, 4, 4))


def test_layers_stand_in_running_order_with_their_costs() -> None:
    side = f"sides.{ODD}"
    layers = {layer.name: layer for layer in hand().layers}
    assert list(layers) == ["stem", "block", "norm", side, "head", "last", "unused"]
    # 4 x 4 pixels
    assert [layers[n].macs for n in layers] == [16 * 4 * 27, 16 * 16, 0, 16 * 24, 48, 18, 0]
    assert [layers[n].params for n in layers] == [112, 20, 8, 30, 51, 21, 6]
    assert layers["stem"].size == "3 → 4, 3x3"
    assert layers["head"].size == "16 → 3"
    assert [n for n in layers if not layers[n].runs] == ["unused"]


def test_rails_join_what_is_coupled() -> None:
    found = hand()
    names = [layer.name for layer in found.layers]
    rails = {
        rail.group.name: [[names[i] for i in at] for at in (rail.makes, rail.mixes, rail.follows)]
        for rail in found.rails
    }
    side = f"sides.{ODD}"
    assert rails == {
        "stem": [["stem", "block"], ["block", side, "head"], ["norm"]],
        side: [[side], ["last"], []],
        "head": [["head", "last"], [], []],
    }
    locked = {rail.group.name: rail.group.locked for rail in found.rails}
    assert locked["stem"] is None
    assert locked["head"] == "it is an output of the model"
    assert "aten._softmax" in str(locked[side])


def test_costs_of_a_group_are_what_its_channels_take_part_in() -> None:
    model, x = Hand().eval(), torch.randn(1, 3, 4, 4)
    stem, side, head = found_groups(model, analyse(model, x).groups, count(model, x))
    # All of stem, block, norm and the consumers' weights; not the consumers' biases.
    assert stem.params == 112 + 20 + 8 + 24 + 48
    assert stem.macs == 16 * 4 * 27 + 16 * 16 + 16 * 24 + 48
    assert (side.params, side.macs) == (30 + 18, 16 * 24 + 18)
    assert (head.params, head.macs) == (51 + 21, 48 + 18)


class Page(HTMLParser):
    """Tags that are open, texts, and what is asked from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.groups: list[tuple[str, str]] = []
        self.away: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.away += [k for k in given if k in ("src", "href", "srcset", "xlink:href")]
        if "data-g" in given:
            self.groups.append((tag, given["data-g"] or ""))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_says_it_all_and_needs_nothing() -> None:
    html = coupling_html.render(f"a {ODD} net", "two groups", hand())
    page = Page(html)
    assert not page.away
    assert not re.search(r"https?://|@import|url\(", html)
    text = " ".join(page.texts)
    assert f"a {ODD} net" in text
    assert f"sides.{ODD}" in text
    assert ODD not in html
    assert escape(f"sides.{ODD}") in html
    assert "locked: it is an output of the model" in text
    assert "aten._softmax in the model itself" in text
    # A rail and a row for each group, and a second row for the reason of each locked one.
    rows = [g for tag, g in page.groups if tag == "tr"]
    assert rows == ["0", "1", "1", "2", "2"]
    layers = [g for tag, g in page.groups if tag == "g"]
    assert layers[:7] == ["0", "0", "0", "0 1", "0 2", "1 2", ""]
    assert layers[7:] == ["0", "1", "2"]


def test_rails_beside_each_other_have_lanes_of_their_own() -> None:
    rails = drawn(DenseNet().eval(), DenseNet().example()).rails
    taken = lanes(rails)
    for i, a in enumerate(rails):
        for j, b in enumerate(rails[:i]):
            apart = a.stops[-1] < b.stops[0] or b.stops[-1] < a.stops[0]
            assert apart or taken[i] != taken[j]


def test_stages_cover_all_layers_and_long_ones_are_taken_apart() -> None:
    short = ["a.x", "a.y", "b", "c", "d.x", "d.y"]
    assert stages(short) == (("a", 0, 2), ("b to c", 2, 4), ("d", 4, 6))
    deep = ["stem", *(f"body.{i}.{leaf}" for i in range(30) for leaf in ("conv", "norm"))]
    found = stages(deep)
    assert found[0] == ("stem", 0, 1)
    assert found[1:] == tuple((f"body.{i}", 1 + 2 * i, 3 + 2 * i) for i in range(30))


class Deep(nn.Module):
    """A stream of 4 channels through many blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def test_a_deep_network_is_shown_by_its_stages_first() -> None:
    found = drawn(Deep(60).eval(), torch.randn(1, 3, 4, 4))
    assert len(found.layers) == 182
    short = folded(found)
    assert [layer.name for layer in short.layers][:2] == ["stem", "blocks.0"]
    assert sum(layer.macs for layer in short.layers) == sum(layer.macs for layer in found.layers)
    assert [rail.group.name for rail in short.rails] == ["stem"]  # the others stay in one block
    assert short.rails[0].number == 0
    html = coupling_html.render("deep", "", found)
    Page(html)
    assert "<details open" not in html
    assert "Stages, and the groups that join them" in html
    assert len(html) < 400_000


def test_choices_are_shown_as_they_are_given() -> None:
    html = coupling_html.render("grouped", "", drawn(GroupedNet().eval(), GroupedNet().example()))
    assert "<code>grouped:groups=whole</code> (or within)" in html


def test_costs_of_groups_go_through_json() -> None:
    group = Group("a", 3, locked="why", producers=("a",), consumers=("b",), macs=7, params=9)
    report = from_dict({"title": "t", "groups": [asdict(group)]})
    assert report.groups == (group,)
    assert from_dict(json.loads(json.dumps(to_dict(report)))) == report


FILE = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    )
"""


def test_inspect_writes_the_page_and_shows_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "net.py").write_text(FILE)
    command = ["inspect", "net.py:build", "--size", "2"]
    assert run([*command, "--html", "page.html"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 groups can be cut" in out
    assert re.search(r"made by +channels +MACs +params +mixed by", out)
    # 4 x 3 + 4 x 5 products a pixel and 12 + 4 + 8 + 20 parameters; 4 x 20 + 10 and 20 + 10
    assert re.search(r"^ *0 +4 +128 +44 +3 *$", out, re.M), out
    assert re.search(r"^ *3 +5 +90 +30 +6 *$", out, re.M), out
    assert re.search(r"^ *6 +2 +10 +12 +locked *$", out, re.M), out
    page = Page((tmp_path / "page.html").read_text())
    assert "net.py:build at 2 x 2" in page.texts
    assert run([*command, "--html", "page.html"]) != 0
    assert "--force" in capsys.readouterr().err
    assert run([*command, "--json"]) == 0
    groups = from_dict(json.loads(capsys.readouterr().out)).groups
    assert [(g.name, g.macs, g.params) for g in groups] == [
        ("0", 128, 44),
        ("3", 90, 30),
        ("6", 10, 12),
    ]
    assert (groups[0].producers, groups[0].consumers) == (("0",), ("3",))
    assert groups[2].locked == "it is an output of the model"
