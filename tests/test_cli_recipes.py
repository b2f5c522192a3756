"""Recipes on the command line: in one shot, step by step, and with the wrong options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import thinet
from tests.pictures import Run, draw
from thinet.cli.app import run
from thinet.report.data import from_dict

NET = """
import torch
from tests.chains import DeepStem, SmallVgg


def blocks():
    torch.manual_seed(0)
    return DeepStem()


def chain():
    torch.manual_seed(0)
    return SmallVgg()
"""


@pytest.fixture
def thin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a command line in a folder with net.py and images: exit code, stdout, stderr."""
    (tmp_path / "net.py").write_text(NET)
    draw(tmp_path / "images", classes=5, each=4, side=16, step=40)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(list(arguments))
        return code, *capsys.readouterr()

    return call


ITERATE = (
    "iterate",
    "net.py:blocks",
    "images",
    "--size",
    "16",
    "--batch",
    "10",
    "--out",
    "s.safetensors",
)
PRUNE = (
    "prune",
    "net.py:chain",
    "--calibration",
    "images",
    "--size",
    "16",
    "--out",
    "s.safetensors",
)


def test_iterate_runs_a_recipe_writes_the_model_and_removes_its_state(thin: Run) -> None:
    code, out, err = thin(
        *ITERATE, "--recipe", "resnet", "--scale", "0.1", "--validation", "images", "--json"
    )
    assert code == 0, err
    report = from_dict(json.loads(out))
    assert [(g.name, g.channels, g.kept) for g in report.groups] == [
        ("a.reduce", 8, 4),
        ("a.spatial", 8, 4),
        ("b.reduce", 12, 6),
        ("b.spatial", 12, 6),
    ]
    assert [network.name for network in report.networks] == ["before", "s.safetensors"]
    assert len(report.networks[1].curve) == 2
    assert "step 1 of 2, a: 4, 4 channels stay, top-1 " in err
    assert "min left" in err
    from tests.chains import DeepStem

    small = thinet.load("s.safetensors", DeepStem())
    assert thinet.count(small, torch.zeros(1, 3, 16, 16)).params == report.networks[1].params
    assert sorted(path.name for path in Path().iterdir()) == ["images", "net.py", "s.safetensors"]


def test_iterate_takes_a_budget_group_by_group_and_keeps_a_named_state(thin: Run) -> None:
    code, _, err = thin(
        *ITERATE, "--keep", "0.5", "--only", "a.*", "--scale", "0.1", "--state", "run"
    )
    assert code == 0, err
    steps = json.loads(Path("run/steps.json").read_text())
    assert [record["name"] for record in steps["records"]] == ["a.reduce", "a.spatial"]
    code, _, err = thin(
        *ITERATE, "--force", "--keep", "0.5", "--only", "b.*", "--scale", "0.1", "--state", "run"
    )
    assert code == 2
    assert "run holds a run that was started differently: order was ['a.reduce'" in err


def test_prune_by_recipe_in_one_shot(thin: Run) -> None:
    code, out, err = thin(*PRUNE, "--recipe", "vgg16-gap", "--keep", "0.25", "--json")
    assert code == 0, err
    kept = [group["kept"] for group in json.loads(out)["groups"]]
    assert kept[:10] == [2, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    plan = thinet.load_plan("s.safetensors")
    assert plan.settings["recipe"] == "vgg16-gap"
    assert [r.builder for r in plan.replaced] == ["identity", "global-average-pool", "linear"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((*PRUNE, "--recipe", "vgg16-conv", "--macs", "0.5"), "--recipe says what is cut; leave"),
        ((*PRUNE, "--recipe", "vgg16-tiny", "--keep", "0.5"), "fixes how much stays"),
        (
            (*PRUNE, "--recipe", "resnet50"),
            "no recipe is named 'resnet50'; did you mean resnet or resnet50-70",
        ),
        ((*PRUNE, "--recipe", "resnet50-30"), "this SmallVgg has 0 blocks"),
        ((*ITERATE,), "give one of --recipe, --macs, --params, --keep; none given"),
        ((*ITERATE, "--recipe", "vgg16-gap"), "this DeepStem has 10"),
    ],
)
def test_mistakes_with_recipes_are_one_message_and_no_file(
    thin: Run, arguments: tuple[str, ...], text: str
) -> None:
    code, _, err = thin(*arguments)
    assert code == 2
    assert text in " ".join(err.split())
    assert not Path("s.safetensors").exists()
