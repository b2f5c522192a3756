"""The paper's tables to the printed digit, from networks that are really cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from thinet import paper
from thinet.cli.app import run
from thinet.errors import OptionError
from thinet.vision import torchvision

COUNTS = {
    "VGG-16": (138_344_128, 30_940_528_640),
    "ThiNet-Conv": (131_440_480, 9_582_411_776),
    "ThiNet-GAP": (8_318_816, 9_336_168_448),
    "ThiNet-Tiny": (1_323_184, 2_009_157_632),
    "ResNet-50": (25_556_032, 7_716_052_736),
    "ThiNet-70": (16_944_246, 4_880_149_800),
    "ThiNet-50": (12_380_864, 3_412_943_872),
    "ThiNet-30": (8_664_318, 2_195_070_102),
}
"""Parameters and FLOPs by the authors' rule, worked out twice apart from this code."""


@pytest.fixture(scope="module")
def rows() -> dict[str, paper.Row]:
    return {row.name: row for row in paper.tables()}


@pytest.mark.parametrize("name", COUNTS)
def test_the_sixteen_integers(rows: dict[str, paper.Row], name: str) -> None:
    assert (rows[name].params, rows[name].flops) == COUNTS[name]


def test_every_figure_is_the_papers_to_the_printed_digit(rows: dict[str, paper.Row]) -> None:
    assert list(rows) == list(COUNTS)
    assert all(row.agrees for row in rows.values())
    assert (rows["ThiNet-30"].printed_flops, rows["ThiNet-30"].paper_flops) == ("2.20B", "2.20B")


def test_transfer_networks_to_the_printed_digit() -> None:
    """Table 4: CUB-200 and Indoor-67, five networks each; AlexNet with its groups."""
    rows = paper.table_4()
    assert [(row.dataset, row.name) for row in rows if not row.agrees] == []
    assert len(rows) == 10
    printed = {(row.dataset, row.name): (row.printed_params, row.printed_flops) for row in rows}
    assert printed["CUB-200", "VGG-16"] == ("135.07M", "30.93B")
    assert printed["CUB-200", "ThiNet-Tiny"] == ("1.12M", "2.01B")
    assert printed["CUB-200", "AlexNet"] == ("57.68M", "1.44B")
    assert printed["Indoor-67", "ThiNet-Conv"] == ("127.62M", "9.57B")
    assert printed["Indoor-67", "ThiNet-GAP"] == ("7.84M", "9.34B")


def test_the_second_point_of_the_journal_version() -> None:
    """Four tenths of the first ten layers."""
    net = paper.traced(torchvision().models.vgg16)
    assert paper.cut_counts(net, "vgg16-conv", keep=0.4) == (130_503_922, 6_909_260_288)


def test_torchvisions_stride_is_told_apart() -> None:
    """Stride in the 3 x 3: the same parameters, more operations, which the paper does not print."""
    net = paper.traced(lambda: paper.resnet50("middle"))
    counts = [paper.cut_counts(net), paper.cut_counts(net, "resnet50-30")]
    assert [f"{flops / 1e9:.2f}B" for _, flops in counts] == ["8.18B", "2.33B"]
    assert [params for params, _ in counts] == [COUNTS["ResNet-50"][0], COUNTS["ThiNet-30"][0]]


def test_both_stride_conventions_of_resnet50() -> None:
    with torch.device("meta"):
        first, middle = paper.resnet50("first", 7), paper.resnet50("middle", 7)

    def strides(model: nn.Module) -> list[tuple[int, int]]:
        return [
            (block.conv1.stride[0], block.conv2.stride[0])
            for name, block in model.named_modules()
            if name in ("layer1.0", "layer2.0", "layer2.1", "layer4.0")
        ]

    assert strides(first) == [(1, 1), (2, 1), (1, 1), (2, 1)]
    assert strides(middle) == [(1, 1), (1, 2), (1, 1), (1, 2)]
    with pytest.raises(OptionError, match="first or the middle convolution, not 'last'"):
        paper.resnet50("last")  # type: ignore[arg-type]


def test_the_authors_counting_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2),
        nn.Flatten(), nn.Linear(6 * 25, 10),
    )  # fmt: skip
    weights = 4 * 3 * 9 + 6 * 2 + 150 * 10
    macs = 4 * 3 * 9 * 25 + 6 * 2 * 25 + 150 * 10
    inputs = torch.zeros(1, 3, 5, 5)
    assert paper.authors_counts(model, inputs) == (weights + 8, 2 * (macs + 8))


def test_the_command_prints_both_tables_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rows: dict[str, paper.Row]
) -> None:
    monkeypatch.setattr(paper, "tables", lambda stride: tuple(rows.values()))
    assert run(["paper", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(o["name"], o["params"], o["flops"]) for o in told] == [
        (name, *counts) for name, counts in COUNTS.items()
    ]
    assert (told[3]["paper_params"], told[3]["paper_flops"]) == ("1.32M", "2.01B")
    assert (told[5]["paper_top1"], told[5]["paper_top5"]) == (72.04, 90.67)
    assert run(["paper"]) == 0
    shown = capsys.readouterr().out
    assert "Table 1: VGG-16 on ImageNet" in shown
    assert "8 of 8 networks agree with the paper to the printed digit." in shown


@pytest.mark.parametrize("transfer", [False, True])
def test_numbers_are_whole_in_eighty_columns(
    transfer: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    rows: dict[str, paper.Row],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    named = tuple(rows.values())
    if transfer:
        named = tuple(replace(row, table=4, dataset="Indoor-67") for row in named)
    monkeypatch.setattr(paper, "tables", lambda stride: named)
    monkeypatch.setattr(paper, "table_4", lambda: named)
    assert run(["paper", *(["--transfer"] if transfer else [])]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    for row in named:
        assert row.printed_params in shown and row.printed_flops in shown
