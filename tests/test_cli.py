"""The command line: every subcommand on a tiny network, and every mistake with its one message."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import thinet
from tests.pictures import Run
from thinet import demo
from thinet.checkpoint import read
from thinet.cli.app import COMMANDS
from thinet.errors import ModelError
from thinet.report.data import from_dict
from thinet.train.evaluate import evaluate
from thinet.train.processes import Processes

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )


def locked():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))


def broken():
    raise ValueError("a fault of the user's own")


number = 3
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py, its weights, and two classes of pictures, bright and dark."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "net.py").write_text(NET)
    random = torch.Generator().manual_seed(0)
    for name, level in (("bright", 160), ("dark", 60)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(level - 40, level + 40, (8, 8, 3), generator=random)
            picture = Image.fromarray(pixels.to(torch.uint8).numpy())
            picture.save(folder / "images" / name / f"{i:02}.png")
    scope: dict[str, Callable[[], torch.nn.Module]] = {}
    exec(NET, scope)
    weights = scope["build"]().state_dict()
    save_file(weights, folder / "net.safetensors")
    save_file(
        weights | {"0.weight": torch.full((8, 3, 3, 3), torch.inf)}, folder / "inf.safetensors"
    )
    save_file({"other": torch.zeros(1)}, folder / "other.safetensors")
    torch.save(scope["build"](), folder / "pickled.pt")
    (folder / "cut-off.safetensors").write_bytes((folder / "net.safetensors").read_bytes()[:-400])
    return folder


MODEL = ("net.py:build", "--weights", "net.safetensors", "--size", "8")
PRUNE = ("prune", *MODEL, "--calibration", "images", "--images", "24")


@pytest.fixture(scope="module")
def small(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that `thinet prune` wrote."""
    path = tmp_path_factory.mktemp("made") / "small.safetensors"
    arguments = ["--macs", "0.5", "--out", str(path)]
    command = [sys.executable, "-W", "error", "-m", "thinet", *PRUNE, *arguments]
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    return path


# The real entry points


def entry_point(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("thinet")), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_installed_command_says_its_version(work: Path) -> None:
    done = entry_point("--version", cwd=work)
    assert (done.returncode, done.stdout) == (0, f"thinet {thinet.__version__}\n")


def test_the_installed_command_ends_with_two_and_no_traceback(work: Path) -> None:
    done = entry_point("inspect", "net.py:bild", "--size", "8", cwd=work)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: net.py has no function 'bild'; did you mean build?\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_subcommand_explains_itself_with_a_real_call(command: str, thin: Run) -> None:
    code, out, err = thin(command, "--help")
    assert (code, err) == (0, "")
    assert f"thinet {command} " in out.split("Options")[0].split("Usage")[1].split("\n", 1)[1]


def test_no_arguments_show_the_help(thin: Run) -> None:
    code, out, err = thin()
    assert code == 2
    assert "Commands" in out + err
    assert "error" not in out + err


# The subcommands


def test_inspect_shows_groups_and_reasons(thin: Run) -> None:
    code, out, _ = thin("inspect", "net.py:build", "--size", "8")
    assert code == 0
    assert "2 of 3 groups can be cut" in out
    assert re.search(r"9: it is an output of the model", out)


def test_inspect_as_json_agrees_with_the_library(thin: Run, work: Path) -> None:
    _, out, _ = thin("inspect", "net.py:build", "--size", "8", "--json")
    report = from_dict(json.loads(out))
    assert [(g.name, g.channels, g.locked is None) for g in report.groups] == [
        ("0", 8, True),
        ("4", 8, True),
        ("9", 2, False),
    ]
    # 8 x 8 and 4 x 4 pixels, 3 x 3 kernels
    assert report.networks[0].macs == 64 * 8 * 27 + 16 * 8 * 72 + 16
    assert report.networks[0].params == 8 * 27 + 8 + 16 + 8 * 72 + 8 + 16 + 16 + 2


def test_prune_writes_a_model_that_loads(thin: Run, work: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "a" / "small.safetensors", tmp_path / "result.html"
    code, text, _ = thin(
        *PRUNE, "--keep", "0.5", "--out", str(out), "--data", "images", "--report", str(page),
        "--json",
    )  # fmt: skip
    assert code == 0
    shown = from_dict(json.loads(text))
    assert [(g.channels, g.kept) for g in shown.groups] == [(8, 4), (8, 4), (2, 2)]
    before, after = shown.networks
    assert after.macs == 64 * 4 * 27 + 16 * 4 * 36 + 8 < before.macs
    assert before.top1 is not None
    assert after.top1 is not None
    assert "small.safetensors" in page.read_text()
    with safe_open(out, framework="pt") as file:
        assert file.get_tensor("4.weight").shape == (4, 4, 3, 3)


def test_the_width_of_a_group_can_be_said(thin: Run, tmp_path: Path) -> None:
    budget = (*PRUNE, "--macs", "0.6", "--divisor", "1", "--memory", "1", "--out")
    code, text, _ = thin(*budget, str(tmp_path / "a.safetensors"), "--width", "0=5", "--json")
    assert code == 0
    kept = {g.name: g.kept for g in from_dict(json.loads(text)).groups}
    assert kept["0"] == 5
    assert kept["4"] < 8
    for wrong, says in (("0", "--width takes GROUP=N"), ("0=x", "--width takes"), ("7=1", "'7'")):
        code, _, said = thin(*budget, str(tmp_path / "b.safetensors"), "--width", wrong)
        assert code == 2
        assert says in said


def test_choosing_can_go_by_the_loss(thin: Run, tmp_path: Path) -> None:
    out = tmp_path / "heard.safetensors"
    assert thin(*PRUNE, "--keep", "0.5", "--loss-aware", "--out", str(out))[0] == 0
    assert read(out)[0].settings["loss_aware"] is True


def test_the_model_is_written_before_it_is_scored(
    thin: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def fails_in_the_end(model: torch.nn.Module, *rest: Any, **options: Any) -> Any:
        scored.append(sum(p.numel() for p in model.parameters()))
        if len(scored) > 1:
            raise ModelError("no score")
        return evaluate(model, *rest, **options)

    monkeypatch.setattr("thinet.cli.prune.evaluate", fails_in_the_end)
    out = tmp_path / "kept.safetensors"
    code, _, said = thin(*PRUNE, "--keep", "0.5", "--data", "images", "--out", str(out))
    assert code == 2 and "no score" in said
    assert scored[1] < scored[0]
    assert read(out)[1]["4.weight"].shape == (4, 4, 3, 3)


def test_the_same_seed_gives_the_same_file(thin: Run, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in files:
        assert thin(*PRUNE, "--keep", "0.6", "--seed", "3", "--out", str(path))[0] == 0
    first, second = (read(path) for path in files)  # the file's own header has no fixed order
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_evaluate_loads_dense_and_cut_files(thin: Run, small: Path) -> None:
    _, dense, _ = thin("evaluate", MODEL[0], "images", *MODEL[1:], "--json")
    code, cut, _ = thin(
        "evaluate", "net.py:build", "images", "--weights", str(small), "--size", "8", "--json"
    )
    assert code == 0
    first, second = json.loads(dense), json.loads(cut)
    assert first["images"] == second["images"] == 24
    assert 0.45 < second["macs"] / first["macs"] <= 0.505
    assert "top-1" in thin("evaluate", MODEL[0], "images", *MODEL[1:])[1]


def test_a_cut_model_is_cut_again(thin: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "smaller.safetensors"
    arguments = ["--size", "8", "--calibration", "images", "--images", "24", "--keep", "0.5"]
    code, _, err = thin(
        "prune", "net.py:build", "--weights", str(small), *arguments, "--out", str(out)
    )
    assert (code, err) == (0, f"wrote {out}\n")
    _, text, _ = thin("bench", "net.py:build", "--weights", str(out), "--size", "8", "--json",
                      "--seconds", "0.01")  # fmt: skip
    timed = json.loads(text)
    dense, cut = timed["networks"]
    assert cut["macs"] < 0.3 * dense["macs"]
    assert all(t["runs"] >= 10 and t["median_ms"] > 0 for t in timed["latencies"].values())


def test_finetune_keeps_the_cut_and_learns(thin: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    code, text, err = thin(
        "finetune", "net.py:build", "images", "--weights", str(small), "--size", "8",
        "--validation", "images", "--epochs", "6", "--lr", "0.1", "--batch", "8",
        "--crop", "centre", "--out", str(out), "--teacher", "net.safetensors", "--json",
    )  # fmt: skip
    assert code == 0
    assert "epoch 6 of 6: loss" in err
    network = from_dict(json.loads(text)).networks[0]
    assert len(network.curve) == 6
    assert network.top1_tuned == network.curve[-1] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.safetensors"]
    _, scored, _ = thin(
        "evaluate", "net.py:build", "images", "--weights", str(out), "--size", "8", "--json"
    )
    assert json.loads(scored)["top1"] == 1.0


def test_finetune_drives_out_taps_and_writes_the_thinner_product(
    thin: Run, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "thin.safetensors"
    code, text, _ = thin(
        "finetune", "net.py:build", "images", "--weights", str(small), "--size", "8",
        "--epochs", "2", "--batch", "8", "--group-sparsity", "1e-3", "--group-keep", "0.25",
        "--group-layers", "4", "--thin", "--out", str(out), "--json",
    )  # fmt: skip
    assert code == 0
    plan, tensors = read(out)
    width = len(next(s.indices for s in read(small)[0].kept if s.parameter == "0.weight"))
    assert [r.module for r in plan.replaced] == ["4"]
    assert tensors["4.mix.weight"].shape[1] == width * 9 // 4
    _, listed, _ = thin("inspect", "net.py:build", "--weights", str(out), "--size", "8", "--json")
    assert (
        from_dict(json.loads(listed)).networks[0].macs
        == from_dict(json.loads(text)).networks[0].macs
    )


def test_of_several_processes_only_the_main_one_writes(
    thin: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Processes(1, 1, torch.device("cpu"))
    monkeypatch.setattr("thinet.cli.finetune.current", lambda _: second)
    code, text, _ = thin(
        "finetune", "net.py:build", "images", "--weights", str(small), "--size", "8",
        "--epochs", "1", "--out", str(tmp_path / "tuned.safetensors"), "--json",
    )  # fmt: skip
    assert (code, text) == (0, "")
    assert not (tmp_path / "tuned.safetensors").exists()


def test_report_turns_json_into_a_page(thin: Run, tmp_path: Path) -> None:
    _, text, _ = thin("inspect", "net.py:build", "--size", "8", "--json")
    kept = tmp_path / "kept.json"
    kept.write_text(text)
    assert thin("report", str(kept))[0] == 0
    assert thin("report", str(kept), "--json")[1] == text
    code, _, err = thin("report", str(kept), "--out", str(tmp_path / "kept.html"))
    assert (code, err) == (0, f"wrote {tmp_path / 'kept.html'}\n")
    assert thin("report", str(kept), "--out", str(tmp_path / "kept.md"), "--json")[1] == text
    assert (tmp_path / "kept.html").read_text().startswith("<!doctype html>")


def test_the_demo_measures_writes_and_loads_again(
    thin: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DENSE_EPOCHS", 3)
    monkeypatch.setattr(demo, "TUNE_EPOCHS", 1)
    monkeypatch.setattr(demo, "METHODS", (demo.METHODS[0], demo.METHODS[-1]))
    monkeypatch.setattr(demo, "SECONDS", 0.01)
    code, out, err = thin("demo", "--out", str(tmp_path / "d"), "--json")
    assert code == 0
    written = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert written == ["report.html", "small.safetensors"]
    report = from_dict(json.loads(out))
    dense, random, full = report.networks
    assert 0.24 <= full.macs / dense.macs <= 0.26
    assert full.macs == random.macs
    assert dense.top1 is not None
    assert full.top1 is not None
    assert random.top1 is not None
    assert dense.top1 > 0.9
    assert full.top1 > random.top1
    assert any("loaded in a new process, gives outputs that differ by 0" in n for n in report.notes)
    page = (tmp_path / "d" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "wrote" in err
    assert thin("demo", "--out", str(tmp_path / "d"))[0] == 2


# Mistakes

OUT = ("--out", "out.safetensors")
HALF = ("--macs", "0.5")
WITH = ("inspect", "net.py:build", "--size", "8", "--weights")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "model form": (("inspect", "resnet50"), "models are named torchvision:NAME, timm:NAME or"),
    "model file": (("inspect", "no.py:f"), "there is no file no.py"),
    "model function": (("inspect", "net.py:bild"), "did you mean build?"),
    "model that fails": (("inspect", "net.py:broken"), "ValueError: a fault of the user's own"),
    "no function": (("inspect", "net.py:number"), "no function 'number'"),
    "torchvision name": (("inspect", "torchvision:resnet51"), "did you mean resnet50"),
    "size of the input": (("inspect", "net.py:locked", "--size", "9"), "243"),
    "weights missing": ((*WITH, "no.safetensors"), "no weights file no.safetensors"),
    "weights of another": ((*WITH, "other.safetensors"), "not those of model net.py:build"),
    "weights cut off": ((*WITH, "cut-off.safetensors"), "not a whole safetensors file"),
    "weights pickled": ((*WITH, "pickled.pt"), "refused: it is a pickle"),
    "device": (("evaluate", "net.py:build", "images", "--device", "abacus"), "--device 'abacus'"),
    "mean": (("evaluate", "net.py:build", "images", "--mean", "1,2"), "--mean takes three numbers"),
    "no folder": (("evaluate", "net.py:build", "nowhere", "--size", "8"), "no folder nowhere"),
    "no classes": (("evaluate", "net.py:build", "images/dark", "--size", "8"), "has no classes"),
    "no budget": ((*PRUNE, *OUT), "--recipe, --macs, --params, --latency, --keep; none given"),
    "two budgets": ((*PRUNE, *OUT, *HALF, "--keep", "1"), "--macs and --keep given"),
    "loss of a recipe": (
        (*PRUNE, *OUT, "--recipe", "resnet", "--loss-aware"), "leave --loss-aware out"
    ),
    "widths without costs": (
        (*PRUNE, *OUT, "--keep", "0.5", "--widths", "uniform"),
        "--widths says how --macs or --params is shared out",
    ),
    "keep above 1": ((*PRUNE, *OUT, "--keep", "1.5"), "above 0 and at most 1; got 1.5"),
    "keep 0": ((*PRUNE, *OUT, "--keep", "0"), "above 0 and at most 1; got 0.0"),
    "budget out of reach": ((*PRUNE, *OUT, "--macs", "0.01"), "cannot be met"),
    "criterion": ((*PRUNE, *OUT, *HALF, "--criterion", "thinnet"), "thinet"),
    "repair": ((*PRUNE, *OUT, *HALF, "--repair", "some"), "`thinet prune --help` shows how"),
    "pattern": ((*PRUNE, *OUT, *HALF, "--only", "conv*"), "'conv*' matches none"),
    "nothing to cut": (
        ("prune", "net.py:locked", "--size", "8", "--calibration", "images",
         "--images", "24", *OUT, *HALF),
        "nothing can be cut",
    ),
    "infinite": (
        ("prune", "net.py:build", "--weights", "inf.safetensors", "--size", "8", "--calibration",
         "images", "--images", "24", *OUT, *HALF),
        "finite",
    ),
    "empty calibration": (
        ("prune", *MODEL, "--calibration", "nothing", *OUT, *HALF), "nothing is empty"
    ),
    "suffix": ((*PRUNE, *HALF, "--out", "small.pt"), "must end with .safetensors"),
    "report suffix": ((*PRUNE, *HALF, *OUT, "--report", "r.pdf"), "must end with .html or .md"),
    "unknown option": ((*PRUNE, *OUT, "--kep", "0.5"), "No such option: --kep"),
    "unknown command": (("prun",), "No such command 'prun'"),
    "learning rate": (
        ("finetune", MODEL[0], "images", *MODEL[1:], *OUT, "--lr", "-1"), "lr must be above 0"
    ),
    "milestones": (
        ("finetune", MODEL[0], "images", *MODEL[1:], *OUT, "--milestones", "a"), "such as 4,8"
    ),
    "taps of nothing": (
        ("finetune", MODEL[0], "images", *MODEL[1:], *OUT, "--group-keep", "0.5"),
        "--group-keep belongs to --group-sparsity LAMBDA",
    ),
    "no report": (("report", "net.py"), "net.py is not JSON"),
    "report missing": (("report", "no.json"), "cannot read no.json"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_written(
    mistake: str, thin: Run, work: Path
) -> None:
    (work / "nothing").mkdir(exist_ok=True)
    before = sorted(work.rglob("*"))
    arguments, words = MISTAKES[mistake]
    code, out, err = thin(*arguments)
    assert (code, out) == (2, "")
    assert re.sub(r"^warning: no --weights: .*\n", "", err).startswith("error: ")
    assert words in err
    assert "Traceback" not in err
    assert [path for path in sorted(work.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]
    code, out, _ = thin(*arguments, "--json")
    assert code == 2
    assert words in json.loads(out)["error"]["message"]


def test_outputs_are_checked_before_any_work(thin: Run, work: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_text("mine")
    (tmp_path / "file").write_text("not a folder")
    cases = {
        taken: "exists; give another name, or --force",
        tmp_path / "file" / "out.safetensors": "cannot write in",
    }
    for path, words in cases.items():
        for command in (
            ("prune", "net.py:broken", "--calibration", "images", "--keep", "0.5"),
            ("finetune", "net.py:broken", "images"),
        ):
            code, _, err = thin(*command, "--out", str(path))
            assert code == 2
            assert words in err
    assert taken.read_text() == "mine"
    assert thin(*PRUNE, "--keep", "0.5", "--out", str(taken), "--force")[0] == 0
    assert taken.read_bytes()[8:9] == b"{"


def test_a_corrupt_image_is_named_and_left_out(thin: Run, work: Path, tmp_path: Path) -> None:
    bad = tmp_path / "images"
    for source in sorted((work / "images").rglob("*.png")):
        target = bad / source.relative_to(work / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (bad / "dark" / "03.png").write_bytes(b"no picture")
    command = ("evaluate", MODEL[0], str(bad), *MODEL[1:], "--json")
    code, out, err = thin(*command)
    assert code == 0
    assert json.loads(out)["images"] == 23
    assert "dark/03.png" in err.replace("\n", "")
    (bad / "dark" / "04.png").write_bytes(b"no picture either")
    code, _, err = thin(*command)
    assert code == 2
    assert "2 corrupt images" in err


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(
    thin: Run, work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned.safetensors"
    command = [
        sys.executable, "-m", "thinet", "finetune", MODEL[0], "images", *MODEL[1:],
        "--batch", "8", "--out", str(out), "--epochs",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*command, "100000"], cwd=work, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2 "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: the run's state is kept in" in err
    assert not out.exists()
    again = subprocess.Popen([*command, "100000"], cwd=work, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    first, second = again.stderr.readline(), again.stderr.readline()
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=60)
    done = re.match(r"going on (after|at the end of) epoch (\d+)( and \d+ steps?)?$", first)
    assert done is not None and int(done[2]) >= 2
    assert second.startswith(f"epoch {int(done[2]) + (done[1] == 'after')} of 100000: ")
    code, _, err = thin(*command[3:], "3", "--lr", "0.5")
    assert code == 2
    assert f"{out}.run holds a training run that was started differently: " in err
    assert "or --start-over to start over" in err and "resume" not in err
    code, _, err = thin(*command[3:], "3", "--lr", "0.5", "--start-over")
    assert code == 0 and "going on" not in err and "epoch 1 of 3: " in err


def test_a_folder_of_the_users_own_beside_the_output_stays(thin: Run, work: Path) -> None:
    own = work / "kept.safetensors.run"
    own.mkdir()
    (own / "notes.txt").write_text("precious")
    code, _, err = thin("finetune", *MODEL, "images", "--epochs", "1", "--out", "kept.safetensors")
    assert code == 0, err
    assert [path.name for path in own.iterdir()] == ["notes.txt"]
    (work / "step.safetensors.run").mkdir()
    (work / "step.safetensors.run" / "step-by-step.txt").write_text("mine")
    code, _, err = thin(
        "iterate", *MODEL, "images", "--keep", "0.5", "--images", "12",
        "--scale", "0.1", "--out", "step.safetensors",
    )  # fmt: skip
    assert code == 0, err
    left = [path.name for path in (work / "step.safetensors.run").iterdir()]
    assert left == ["step-by-step.txt"]


def test_one_name_for_two_pages_is_refused(thin: Run) -> None:
    code, _, err = thin("inspect", *MODEL, "--html", "x.html", "--report", "x.html")
    assert code == 2 and "--html and --report are both x.html" in err


def test_code_that_ends_the_program_is_an_error(thin: Run, work: Path) -> None:
    (work / "ends.py").write_text(
        "import sys, torch\n"
        "class Ends(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        sys.exit(5)\n"
        "def build():\n"
        "    return Ends()\n"
    )
    code, out, err = thin("inspect", "ends.py:build", "--json")
    assert code == 2 and "sys.exit(5)" in err
    assert json.loads(out)["error"]["type"] == "SystemExit"


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"input_size": 32}, "`input_size` is (3, height, width)"),
        ({"mean": 0.5}, "`mean` and `std` are three numbers each"),
        ({"input_size": (3, 8, 16)}, "asks for images of 8 x 16; images are made square"),
    ],
)
def test_what_a_model_says_of_its_images_is_checked(
    cfg: dict[str, Any], words: str, thin: Run, work: Path
) -> None:
    (work / "said.py").write_text(
        f"{NET}\nplain = build\ndef build():\n    model = plain()\n"
        f"    model.default_cfg = {cfg!r}\n    return model\n"
    )
    code, _, err = thin("inspect", "said.py:build")
    assert code == 2 and words in err
