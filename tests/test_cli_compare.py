"""`thinet compare` and `thinet export` on a tiny network and tiny pictures, killed and mistaken."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import thinet
from tests.pictures import Run, draw
from thinet.criteria import base
from thinet.data import loader
from thinet.models import resolve
from thinet.report.data import from_dict
from thinet.train.evaluate import evaluate

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py and three classes of pictures."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(NET)
    draw(folder / "images", classes=3, each=8)
    return folder


COMPARE = (
    "compare", "net.py:build", "images", "--size", "8", "--calibration", "images",
    "--images", "12", "--batch", "12",
)  # fmt: skip


def test_a_comparison_is_shown_and_kept(thin: Run, work: Path) -> None:
    arguments = (
        *COMPARE, "--criteria", "l2", "--repairs", "none, full", "--keep", "0.5,0.25",
        "--seeds", "2", "--train", "images", "--crop", "centre", "--out", "first",
    )  # fmt: skip
    code, out, err = thin(*arguments)
    assert code == 0
    assert re.search(r"l2, full +keep=0.25 +[\d.]+k? +\d+ +[\d.]+±[\d.]+% +[\d.]+±[\d.]+%", out)
    assert "cell 8 of 8, l2, full, keep=0.25, seed 1: top-1 " in err
    assert err.count(" min left") == 8
    assert sorted(path.name for path in (work / "first").iterdir()) == [
        "cells.jsonl", "report.html", "report.json", "settings.json",
    ]  # fmt: skip
    code, out, err = thin(*arguments, "--json")
    told = json.loads(out)
    assert code == 0 and re.fullmatch(r"warning: no --weights: .*\n", err)
    assert len(told["cells"]) == 8 and len(told["points"]) == 4
    assert from_dict(told) == from_dict(json.loads((work / "first" / "report.json").read_text()))
    assert told["facts"]["fine-tuning"] == "1 epoch on images, lr 0.01"
    cells = {(c["criterion"], c["repair"], c["budget"], c["seed"]): c for c in told["cells"]}
    pair = [cells["l2", "full", "keep=0.5", seed] for seed in (0, 1)]
    point = next(p for p in told["points"] if p["criterion"] == "l2" and p["repair"] == "full")
    assert point["top1_tuned"]["mean"] == sum(c["top1_tuned"] for c in pair) / 2
    assert pair[0]["loss"] != pair[1]["loss"]  # each seed draws its own calibration images
    dense = evaluate(resolve("net.py:build"), loader("images", size=8))
    assert told["dense"]["top1"] == told["networks"][0]["top1"] == dense.top1
    page = (work / "first" / "report.html").read_text()
    assert page.count("<svg") == 2 and page.count("<polyline") == 4


def test_a_comparison_by_the_loss_is_one_of_its_own(thin: Run, work: Path) -> None:
    arguments = (*COMPARE, "--criteria", "thinet,random", "--keep", "0.5", "--out", "heard")
    assert thin(*arguments, "--loss-aware")[0] == 0
    assert "weighed by the loss" in (work / "heard" / "report.html").read_text()
    settings = json.loads((work / "heard" / "settings.json").read_text())
    assert settings["identity"]["option"]["loss_aware"] is True
    code, _, err = thin(*arguments)
    assert code == 2 and "started differently" in " ".join(err.split())


def test_failed_cells_make_the_exit_code_one(thin: Run) -> None:
    arguments = (*COMPARE, "--criteria", "thinet,l2", "--keep", "0.5", "--macs", "0.001")
    code, out, err = thin(*arguments, "--out", "failing")
    assert code == 1
    assert "note  thinet, full, macs=0.001 failed: BudgetError: macs=0.001 cannot be met" in out
    assert re.search(r"thinet, full +macs=0.001 +– +– +failed +0 of 1", out)
    assert "failed: BudgetError" in err
    code, out, _ = thin("report", "failing/report.json")
    assert code == 0 and "0 of 1" in out


def test_killed_on_the_command_line_it_goes_on(thin: Run, work: Path) -> None:
    arguments = (
        *COMPARE, "--criteria", "random,l2", "--keep", "0.5,0.25", "--seeds", "2",
        "--train", "images", "--epochs", "2", "--crop", "centre",
    )  # fmt: skip
    command = [sys.executable, "-m", "thinet", *arguments, "--out", "killed"]
    lines = work / "killed" / "cells.jsonl"
    alike = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums round by the number of threads
    for wanted in (1, 4):
        process = subprocess.Popen(command, cwd=work, stderr=subprocess.DEVNULL, env=alike)
        while process.poll() is None and (
            not lines.exists() or lines.read_bytes().count(b"\n") < wanted
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = lines.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    code, out, _ = thin(*arguments, "--out", "killed", "--json")
    assert code == 0
    assert lines.read_bytes().startswith(before) and before.count(b"\n") >= 4
    _, whole, _ = thin(*arguments, "--out", "whole", "--json")

    def numbers(text: str) -> list[dict[str, object]]:
        return [{**cell, "seconds": 0} for cell in json.loads(text)["cells"]]

    assert numbers(out) == numbers(whole)
    code, _, err = thin(*arguments, "--out", "killed", "--lr", "0.5")
    assert code == 2
    assert "started differently: training lr was 0.01 and is now 0.5. Give what it was" in err
    code, _, err = thin(*arguments, "--out", "killed", "--images", "6")
    assert code == 2
    assert "started differently: calibration images was 12 and is now 6; calibration was '" in err


MISTAKES = {
    "no budget": ((), "give budgets, such as --keep 0.7,0.5,0.3"),
    "budget": (("--keep", "half"), "--keep takes fractions such as 0.7,0.5, got 'half'"),
    "budget above 1": (("--macs", "1.5"), "above 0 and at most 1; got 1.5"),
    "criterion": (("--keep", "0.5", "--criteria", "l2,thinnet"), "did you mean 'thinet'"),
    "repair": (("--keep", "0.5", "--repairs", "all"), "--repairs takes names of none, scale, full"),
    "twice": (("--keep", "0.5", "--criteria", "l2,l2"), "'l2' is given more than once"),
    "pattern": (("--keep", "0.5", "--only", "conv*"), "'conv*' matches none"),
    "classes": (("--keep", "0.5", "--classes", "2", "--train", "images/0"), "has no classes"),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_mistakes_end_with_two_and_a_sentence(name: str, thin: Run, work: Path) -> None:
    arguments, words = MISTAKES[name]
    code, out, err = thin(*COMPARE, *arguments, "--out", "wrong")
    assert (code, out) == (2, "")
    assert words in err.replace("\n", " ") and "Traceback" not in err
    assert not (work / "wrong" / "cells.jsonl").exists()


@pytest.fixture(scope="module")
def small(work: Path) -> Path:
    """A file of the network cut to a half."""
    scope: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NET, scope)
    model = scope["build"]().eval()
    save_file(model.state_dict(), work / "net.safetensors")
    images = torch.randn(12, 3, 8, 8)
    result = thinet.prune(model, images[:1], [images], budget=thinet.Budget(keep=0.5))
    return thinet.save(work / "small.safetensors", result.model, result.plan)


def test_a_pruned_file_is_exported_both_ways(thin: Run, work: Path, small: Path) -> None:
    arguments = ("export", "net.py:build", "--weights", str(small), "--size", "8")
    code, out, err = thin(*arguments, "--onnx", "small.onnx", "--exported-program", "small.pt2")
    assert (code, err) == (0, "")
    assert re.search(
        r"wrote small.onnx \(ONNX, opset 20, .*B\): differs from torch by \S+e-\d", out
    )
    assert "wrote small.pt2 (exported program, " in out and "batches of 1, 2, 3" in out
    model = thinet.load(small, resolve("net.py:build"))
    images = torch.randn(5, 3, 8, 8)
    wanted = model(images).detach()
    session = onnxruntime.InferenceSession(str(work / "small.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.abs(got - wanted.numpy()).max() < 1e-5
    loaded = torch.export.load(work / "small.pt2").module()
    assert torch.allclose(loaded(images), wanted, atol=1e-6)
    code, _, err = thin(*arguments, "--onnx", "small.onnx")
    assert code == 2 and "small.onnx exists; give another name, or --force" in err
    fixed = ("--exported-program", "four.pt2", "--fixed-batch", "4", "--json")
    (file,) = json.loads(thin(*arguments, *fixed)[1])["files"]
    assert (file["path"], file["batches"], file["opset"]) == ("four.pt2", [4], None)


def test_mistakes_of_export(
    thin: Run, work: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("export", "net.py:build", "--weights", str(small), "--size", "8")
    for arguments, words in (
        ((), "nothing to write; give --onnx FILE.onnx"),
        (("--onnx", "x.pt2"), "the name must end with .onnx"),
        (("--onnx", "x.onnx", "--opset", "11"), "opset 11 cannot be written; torch"),
        (("--exported-program", "x.pt2", "--tolerance", "2"), "tolerance lies between 0 and 1"),
    ):
        code, _, err = thin(*model, *arguments)
        assert code == 2 and words in err.replace("\n", " ")
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = thin(*model, "--onnx", "x.onnx")
    assert code == 2 and "onnx is needed to write and check ONNX files" in err
    assert not [path for path in work.iterdir() if path.name.startswith(("x.", ".x"))]


def test_a_criterion_of_the_models_file_is_known(
    thin: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))
    (work / "own.py").write_text(
        NET
        + "\n\nfrom thinet.criteria import Order, criterion\n\n\n"
        + '@criterion("of-the-file", needs=())\n'
        + "def of_the_file(stats):\n    return Order(tuple(range(stats.channels)))\n"
    )
    arguments = ("compare", "own.py:build", *COMPARE[2:], "--keep", "0.5", "--out", "own")
    code, out, _ = thin(*arguments, "--criteria", "of-the-file")
    assert code == 0 and "of-the-file, full" in out
    code, _, err = thin(*COMPARE, "--keep", "0.5", "--out", "own2", "--criteria", "of-another")
    assert code == 2 and "unknown criterion 'of-another'" in err


@pytest.mark.parametrize("option", [("--epochs", "2"), ("--lr", "0.1"), ("--distill",)])
def test_options_of_fine_tuning_ask_for_its_images(thin: Run, option: tuple[str, ...]) -> None:
    code, _, err = thin(*COMPARE, "--keep", "0.5", "--out", "untrained", *option)
    assert code == 2 and "say on what: --train DIR" in err


def test_training_folders_number_classes_alike(thin: Run, work: Path) -> None:
    draw(work / "others", classes=3, each=2)
    (work / "others" / "1").rename(work / "others" / "9")
    code, _, err = thin(*COMPARE, "--keep", "0.5", "--out", "alike", "--train", "others")
    assert code == 2 and "label 1 is 1 in images and 2 in others" in " ".join(err.split())


FINETUNE = ("finetune", "net.py:build", "images", "--size", "8", "--batch", "12", "--epochs", "1")


def test_thin_asks_for_taps_before_anything_is_trained(thin: Run, work: Path) -> None:
    out = ("--thin", "--out", "thinned.safetensors")
    for options, told in (((), "--group-keep 0.5"), (("--group-sparsity", "1e-3"), "below 1")):
        code, _, err = thin(*FINETUNE, *options, *out)
        assert code == 2 and told in err and "epoch" not in err
    assert not (work / "thinned.safetensors.run").exists()
    taps = ("--group-sparsity", "0", "--group-keep", "0.5", "--out", "taps.safetensors")
    assert thin(*FINETUNE, *taps)[0] == 0
    held = ("--weights", "taps.safetensors", "--group-sparsity", "0")
    assert thin(*FINETUNE, *held, *out)[0] == 0


def test_the_same_network_from_scratch(thin: Run, work: Path) -> None:
    cut = thin(
        "prune", "net.py:build", "--size", "8", "--calibration", "images", "--images", "12",
        "--keep", "0.5", "--out", "cut.safetensors",
    )  # fmt: skip
    assert cut[0] == 0
    arguments = (
        *FINETUNE,
        "--weights",
        "cut.safetensors",
        "--lr",
        "1e-12",
        "--validation",
        "images",
    )
    arguments = (*arguments, "--weight-decay", "0", "--json")
    told = {}
    for name, options in (("tuned", ()), ("scratch", ("--from-scratch",))):
        code, out, _ = thin(*arguments, *options, "--out", f"{name}.safetensors")
        assert code == 0
        told[name] = json.loads(out)["facts"]["weights"]
    assert told == {"tuned": "cut.safetensors", "scratch": "random"}
    dense = resolve("net.py:build")
    before, tuned, scratch = (
        thinet.load(work / f"{name}.safetensors", dense) for name in ("cut", "tuned", "scratch")
    )
    weights = [model[0].weight.detach() for model in (before, tuned, scratch)]
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert weights[2].shape == weights[0].shape
    assert not torch.allclose(weights[0], weights[2], atol=1e-2)


def test_cells_do_not_depend_on_the_others_that_are_asked_for(thin: Run, work: Path) -> None:
    arguments = (*COMPARE, "--keep", "0.5", "--loss-aware")
    assert thin(*arguments, "--criteria", "thinet", "--out", "alone")[0] == 0
    code, _, err = thin(*arguments, "--criteria", "thinet,taylor", "--out", "alone")
    assert code == 0, err
    assert thin(*arguments, "--criteria", "taylor,thinet", "--out", "both")[0] == 0
    found = [
        {
            cell["criterion"]: (cell["top1"], cell["loss"])
            for cell in map(json.loads, (work / name / "cells.jsonl").read_text().splitlines())
        }
        for name in ("alone", "both")
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    facts = json.loads((work / "both" / "report.json").read_text())["facts"]
    assert facts["labels"] == "those of the calibration folder"
    assert facts["calibration"] == "12 images of images"
    assert "crop" not in facts and facts["widths"] == "by error, divisor 8"


def test_labels_are_asked_for_by_what_a_criterion_reads_and_not_by_its_name(
    thin: Run, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))
    (work / "graded.py").write_text(
        f"{NET}\n"
        "from thinet.criteria.base import by_score, criterion\n"
        "for name in ('graded', 'taylored'):\n"
        "    criterion(name, needs={'taylor'})(lambda stats: by_score(stats, stats.taylor))\n"
    )
    arguments = ("compare", "graded.py:build", *COMPARE[2:], "--keep", "0.5")
    code, _, err = thin(*arguments, "--criteria", "graded,taylored", "--out", "graded")
    assert code == 0, err
    lines = (work / "graded" / "cells.jsonl").read_text().splitlines()
    one, other = ((cell["top1"], cell["loss"]) for cell in map(json.loads, lines))
    assert one == other
    draw(work / "flat", classes=1, each=8)  # no classes to read
    code, _, err = thin(
        "prune", "net.py:build", "--size", "8", "--calibration", "flat", "--images", "8",
        "--keep", "0.5", "--criterion", "taylor", "--out", "flat.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err


def test_reports_of_something_else_are_not_written_over(thin: Run, work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "report.json").write_text("mine")
    code, _, err = thin(*COMPARE, "--keep", "0.5", "--criteria", "l2", "--out", "mine")
    assert code == 2 and "report.json exists" in " ".join(err.split())
    assert (work / "mine" / "report.json").read_text() == "mine"
    assert sorted(path.name for path in (work / "mine").iterdir()) == ["report.json"]
