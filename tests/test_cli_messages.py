"""What the command line says besides its results: warnings, notes, facts, and clean JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.pictures import Run, draw
from thinet.cli.finetune import Resumed
from thinet.cli.inputs import pictures, prepared_as
from thinet.report.data import from_dict

NET = """
import sys

import torch
from torch import nn


class Loud(nn.Sequential):
    def forward(self, x):
        print("forward was here")
        return super().forward(x)


def build(num_classes=2, kind=nn.Sequential):
    torch.manual_seed(0)
    return kind(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )


def loud():
    print("the builder was here")
    return build(kind=Loud)


def leaves():
    sys.exit(3)


def own():
    model = build()
    model.default_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5)}
    return model
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py and two classes of pictures."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(NET)
    draw(folder / "images", classes=2, each=6)
    return folder


def commands(out: Path) -> dict[str, tuple[str, ...]]:
    """A call of each command that takes labelled images."""
    common = ("--size", "8", "--classes")
    calibration = ("--calibration", "images", "--images", "12")
    return {
        "evaluate": ("evaluate", "net.py:build", "images", *common),
        "prune": ("prune", "net.py:build", *calibration, "--data", "images", "--keep", "0.5",
                  "--out", str(out / "small.safetensors"), *common),
        "finetune": ("finetune", "net.py:build", "images", "--epochs", "1", "--batch", "4",
                     "--out", str(out / "tuned.safetensors"), *common),
        "iterate": ("iterate", "net.py:build", "images", "--keep", "0.5", "--scale", "0.01",
                    "--batch", "4", "--out", str(out / "steps.safetensors"), *common),
        "compare": ("compare", "net.py:build", "images", *calibration, "--criteria", "l2",
                    "--keep", "0.5", "--out", str(out / "cells"), *common),
    }  # fmt: skip


COMMANDS = ("evaluate", "prune", "finetune", "iterate", "compare")


@pytest.mark.parametrize("command", COMMANDS)
def test_fewer_class_folders_than_outputs_are_said(command: str, thin: Run, tmp_path: Path) -> None:
    says = "images has 2 class folders, the model has 5 outputs: label k is the k-th folder by name"
    code, out, err = thin(*commands(tmp_path)[command], "5", "--json")
    assert code == 0
    assert err.count(f"warning: {says}") == 1
    assert [note for note in json.loads(out)["notes"] if note.startswith(says)]
    if command == "evaluate":
        code, out, err = thin(*commands(tmp_path)[command], "2", "--json")
        assert code == 0 and "class folders" not in out + err


@pytest.mark.parametrize("command", COMMANDS)
def test_more_class_folders_than_outputs_are_refused(
    command: str, thin: Run, tmp_path: Path
) -> None:
    code, _, err = thin(*commands(tmp_path)[command], "1")
    assert code == 2
    assert "error: images has 2 class folders, the model has 1 output; give images of" in err
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


@pytest.mark.parametrize("command", [*COMMANDS, "export"])
def test_a_call_without_weights_is_warned(command: str, thin: Run, tmp_path: Path) -> None:
    exported = ("export", "net.py:build", "--exported-program", str(tmp_path / "x.pt2"),
                "--size", "8")  # fmt: skip
    arguments = exported if command == "export" else (*commands(tmp_path)[command], "2")
    code, _, err = thin(*arguments)
    assert code == 0
    says = "warning: no --weights: those that net.py:build makes are used, random ones if it loads"
    assert err.count(says) == 1


def test_a_name_of_a_library_without_weights_is_random(thin: Run) -> None:
    code, _, err = thin(
        "evaluate", "torchvision:squeezenet1_1", "images", "--size", "32", "--classes", "2"
    )
    assert code == 0
    assert "warning: no --weights: those of torchvision:squeezenet1_1 are random numbers" in err


def test_json_is_alone_on_stdout_whatever_the_model_prints(thin: Run) -> None:
    arguments = ("net.py:loud", "images", "--size", "8")
    code, out, err = thin("evaluate", *arguments, "--json")
    assert code == 0
    assert json.loads(out)["images"] == 12
    assert "the builder was here" in err and "forward was here" in err
    code, out, _ = thin("evaluate", *arguments)
    assert out.startswith("the builder was here")


def test_a_builder_that_leaves_is_an_error_of_the_model(thin: Run) -> None:
    code, out, err = thin("inspect", "net.py:leaves", "--size", "8", "--json")
    assert code == 2
    told = json.loads(out)["error"]
    assert told["type"] == "ModelError"
    assert told["message"].startswith("net.py:leaves ended the program while it was made: sys.exit")
    assert told["message"] in err


def test_what_the_user_wrote_is_shown_as_it_is(thin: Run) -> None:
    code, _, err = thin("inspect", ":x:[red]")
    assert code == 2
    assert "model ':x:[red]' is not understood" in err


def test_the_preprocessing_and_its_source_are_shown(thin: Run, tmp_path: Path) -> None:
    code, out, _ = thin("evaluate", "net.py:own", "images", "--std", "0.25")
    assert code == 0
    shown = "8 x 8 (the model's default_cfg), mean 0.5,0.5,0.5 (the model's default_cfg), "
    assert out.splitlines()[1] == f"pictures {shown}std 0.25,0.25,0.25 (--std)"
    _, out, _ = thin("evaluate", "net.py:own", "images", "--json")
    assert json.loads(out)["facts"]["pictures"] == f"{shown}std 0.229,0.224,0.225 (ImageNet's)"
    _, out, _ = thin(*commands(tmp_path)["prune"], "2", "--json")
    assert json.loads(out)["facts"]["pictures"].startswith("8 x 8 (--size), mean 0.485,0.456,0.406")
    plain = torch.nn.Linear(1, 1)
    usual = prepared_as(plain, pictures(plain, None, None, None), None, None, None)
    assert usual.startswith("224 x 224 (ImageNet's)")


def test_pages_say_how_they_were_made(thin: Run, tmp_path: Path) -> None:
    wanted = {
        "prune": {"weights", "only", "skip", "calibration", "pictures", "thinet", "seed"},
        "finetune": {"weights", "teacher", "data", "validation", "crop", "epochs", "learning rate",
                     "batch", "pictures", "thinet"},
        "iterate": {"weights", "teacher", "data", "crop", "epochs", "learning rate", "batch",
                    "recipe", "thinet"},
    }  # fmt: skip
    for command, names in wanted.items():
        more = ("--only", "*", "--skip", "4") if command == "prune" else ()
        page = tmp_path / f"{command}.html"
        code, out, err = thin(
            *commands(tmp_path)[command], "2", *more, "--report", str(page), "--json"
        )
        assert code == 0
        facts = json.loads(out)["facts"]
        assert names <= set(facts)
        assert f"wrote {facts['written to']}\nwrote {page}\n" in err
        assert all(value in page.read_text() for value in (facts["weights"], facts["thinet"]))
    costs = (*commands(tmp_path)["prune"], "2", "--force", "--json")
    costs = tuple("--macs" if word == "--keep" else word for word in costs)
    facts = json.loads(thin(*costs, "--divisor", "4")[1])["facts"]
    assert facts["widths"] == "by error, multiples of 4 in wide groups"


def test_a_budget_of_latency_is_shown_in_milliseconds(
    thin: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinet.one_round.time_share", lambda *_: 0.5)
    arguments = tuple(
        "--latency" if word == "--keep" else word for word in commands(tmp_path)["prune"]
    )
    code, out, _ = thin(*arguments, "2")
    assert code == 0
    assert re.search(r"Latency: [\d.]+ ms -> [\d.]+ ms", out)
    assert re.search(r"note  timed in turns: batch 1, \d+ threads?, on cpu", out)
    report = from_dict(json.loads(thin(*arguments, "2", "--force", "--json")[1]))
    assert all(network.latency_ms is not None for network in report.networks)


def test_names_that_are_no_group_are_told_what_is_near(thin: Run, tmp_path: Path) -> None:
    prune = (*commands(tmp_path)["prune"], "2")
    costs = tuple("--macs" if word == "--keep" else word for word in prune)
    code, _, err = thin(*prune, "--only", "9")
    assert code == 2  # a group of its own, locked
    code, _, err = thin(*costs, "--width", "44=3")
    assert code == 2
    assert "--width names the group '44', which is none of the 2 groups (0, 4); near it: '4'" in err


def test_too_many_corrupt_images_name_the_option_that_allows_them(
    thin: Run, work: Path, tmp_path: Path
) -> None:
    for number in range(2):
        (tmp_path / "bad" / str(number)).mkdir(parents=True)
        for source in sorted((work / "images" / str(number)).iterdir()):
            broken = source.stem in "01"
            copy = b"no picture" if broken else source.read_bytes()
            (tmp_path / "bad" / str(number) / source.name).write_bytes(copy)
    command = ("evaluate", "net.py:build", str(tmp_path / "bad"), "--size", "8")
    code, _, err = thin(*command)
    assert code == 2 and "or raise --max-corrupt" in err.replace("\n", " ")
    code, out, _ = thin(*command, "--max-corrupt", "0.5", "--json")
    assert code == 0 and json.loads(out)["images"] == 8


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (("epoch 1 of 9", 1, 5), ""),
        (("epoch 3 of 9", 1, 5), "going on after epoch 2\n"),
        (("epoch 3 of 9", 2, 5), "going on after epoch 2 and 1 step\n"),
        (("epoch 1 of 9", 4, 5), "going on after 3 steps\n"),
    ],
)
def test_a_resumed_training_says_once_where_it_goes_on(
    first: tuple[str, int, int], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    progress = Resumed(lambda *call: told.append(call))
    progress(*first)
    progress("epoch 5 of 9", 2, 5)
    assert capsys.readouterr().err == says
    assert told == [first, ("epoch 5 of 9", 2, 5)]


def test_one_is_not_counted_in_the_plural(
    thin: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = thin(*commands(tmp_path)["compare"], "2")
    assert "1 cell. Dense: " in out
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    _, _, err = thin("bench", "net.py:build", "--size", "8", "--seconds", "0.01")
    assert "timing: batch 1, 1 thread, on cpu" in err


def test_a_run_stopped_at_the_end_of_an_epoch_says_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Resumed(lambda *_: None)
    progress.finished(3)
    progress.finished(4)
    progress("epoch 5 of 9", 1, 10)
    assert capsys.readouterr().err == "going on at the end of epoch 3\n"
