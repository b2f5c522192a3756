"""Where a layout leaves a choice: the caller's word, through the verbs and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.more_nets import LayerNormNet
from tests.nets import GroupedNet, PlainVGG
from tests.oracle import as_double, check, randomise
from thinet.checkpoint import load_plan
from thinet.cli import options
from thinet.cli.app import run
from thinet.errors import OptionError
from thinet.trace.choices import KINDS, OTHER, check_choices

torch.set_num_threads(1)
KEY = "grouped:groups"


def net(cls: type[nn.Module] = GroupedNet) -> nn.Module:
    return randomise(cls()).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("choice", "widths"),
    # 8 -> 12 channels in 4 groups: 4 whole groups, or 2 (in) and 3 (out) of every group.
    [("whole", {"conv1": 4, "conv2": 5}), ("within", {"conv1": 2, "grouped": 3, "conv2": 5})],
)
def test_the_groups_are_the_chosen_ones_and_cut_exactly(
    choice: str, widths: dict[str, int]
) -> None:
    model, x = net().double(), as_double(images(2))
    groups = thinet.find_groups(model, x, choices={KEY: choice})
    assert {g.name: g.channels for g in groups if g.locked is None} == widths

    def cut(*args: Any, **kwargs: Any) -> nn.Module:
        return thinet.cut(*args, **kwargs, choices={KEY: choice})

    small = cut(model, x, {"conv1": [0]}, verify=True)
    assert small.grouped.groups == (1 if choice == "whole" else 4)
    check(model, x, groups, {name: [0] for name in widths}, cut)


def test_pruning_follows_the_choice_and_the_plan_records_it() -> None:
    model = net()
    for choice in KINDS["groups"]:
        result = thinet.prune(
            model, images(1), [images(12)], budget=thinet.Budget(keep=0.5), choices={KEY: choice}
        )
        assert result.plan.settings["choices"] == {KEY: choice}
        assert result.plan.settings["normalised"] is False
        assert result.model.grouped.groups == (2 if choice == "whole" else 4)


def test_normalised_groups_are_pruned_on_request(tmp_path: Path) -> None:
    model = net(LayerNormNet)
    for normalised, kept in ((False, 6), (True, 3)):
        result = thinet.prune(
            model, images(1), [images(12)], budget=thinet.Budget(keep=0.5), normalised=normalised
        )
        assert result.model.conv1.out_channels == result.model.norm.normalized_shape[0] == kept
        assert result.plan.settings["normalised"] is normalised
    thinet.save(tmp_path / "small.safetensors", result.model, result.plan)
    again = thinet.load(tmp_path / "small.safetensors", model)
    assert torch.equal(again(images(2)), result.model(images(2)))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"groupd:groups": "within"}, "'groupd:groups', which this model does not leave"),
        ({"grouped": "within"}, "such as 'grouped:groups'"),
        ({KEY: "inside"}, "is 'whole' or 'within'; got 'inside'"),
        ({KEY: "inner"}, "is 'whole' or 'within'; got 'inner'"),
    ],
)
def test_a_choice_that_is_not_there_is_refused(given: dict[str, str], text: str) -> None:
    model, x = net(), images(1)
    with pytest.raises(OptionError, match=text):
        thinet.find_groups(model, x, choices=given)
    with pytest.raises(OptionError, match=text):
        thinet.cut(model, x, {"conv2": [0]}, choices=given)
    with pytest.raises(OptionError, match=text):
        thinet.prune(model, x, [x], budget=thinet.Budget(keep=0.5), choices=given)


class SplitNet(nn.Module):
    """Two halves by sizes that are equal, the second of which goes on, as in YOLO's blocks."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.stem, self.enter = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 16, 1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(inner))
        self.leave, self.width = nn.Conv2d(16 + 8 * inner, 4, 1), 8

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(self.stem(x).relu()).split((self.width, self.width), 1))
        for conv in self.inner:
            parts.append(conv(parts[-1]).relu())
        return self.leave(torch.cat(parts, 1))


@pytest.mark.parametrize("inner", [1, 2, 4])
def test_another_choice_is_tried_where_it_spares_more(inner: int) -> None:
    """Also where each operation that the refused groups touch is made cheaper by another."""
    model, x = randomise(SplitNet(inner)).eval().double(), as_double(images(2))
    groups = thinet.find_groups(model, x)
    free = {g.name: g.channels for g in groups if g.locked is None}
    assert free == {"stem": 6, "enter": 8, **{f"inner.{n}": 8 for n in range(inner)}}
    check(model, x, groups, {"enter": [0, 5], "inner.0": [2]}, thinet.cut)


def test_a_model_without_choices_says_so() -> None:
    with pytest.raises(OptionError, match="it leaves nothing to choose"):
        thinet.find_groups(net(PlainVGG), images(1), choices={KEY: "within"})


def test_every_value_has_another() -> None:
    for kind, values in KINDS.items():
        for value in values:
            assert OTHER[OTHER[value]] == value != OTHER[value]
            check_choices({f"a:{kind}": value}, {f"a:{kind}": values[0]})


def test_choices_on_the_command_line() -> None:
    assert options.choices(["a.b:groups=within", ":layout=inner"]) == {
        "a.b:groups": "within",
        ":layout": "inner",
    }
    for wrong in ("within", "a.b=within", "a.b:groups"):
        with pytest.raises(OptionError, match="--choice takes MODULE:KIND=VALUE"):
            options.choices([wrong])


FILE = """
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 2),
    )
"""


def test_pruning_from_the_command_line_follows_the_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "images").mkdir()
    for i in range(8):
        pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / f"images/{i}.png")
    common = ["prune", "net.py:build", "--size", "8", "--calibration", "images", "--force"]
    common += ["--out", "small.safetensors", "--json"]
    for choice, kept in (("whole", {"0": 2}), ("within", {"0": 1, "2": 1})):
        assert run([*common, "--keep", "0.5", "--choice", f"2:groups={choice}"]) == 0
        plan = load_plan(tmp_path / "small.safetensors")
        assert {name: len(units) for name, units in plan.keep.items()} == kept
        assert plan.settings["choices"] == {"2:groups": choice}
    capsys.readouterr()
    assert run([*common, "--recipe", "resnet", "--choice", "2:groups=whole"]) != 0
    assert (
        "leave --choice and --normalised out"
        in json.loads(capsys.readouterr().out)["error"]["message"]
    )
