"""A comparison's cells are what single calls give, each is kept, and a killed run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import thinet
from tests.compared_runs import CONFIG, EXAMPLE, batches, compared, drawn, facts, plain_net
from thinet import grid
from thinet.cells import Cell, Comparison, Dense, Spread
from thinet.criteria import base
from thinet.errors import (
    CheckpointError,
    DataError,
    LockedGroupError,
    OptionError,
    TrainingError,
    UnknownGroupError,
)
from thinet.journal import CELLS, SETTINGS
from thinet.seeds import derive
from thinet.trace.analyse import analyse
from thinet.train.evaluate import evaluate
from thinet.train.finetune import finetune

QUICK: dict[str, Any] = {"train": None, "config": None}
BUDGET = (thinet.Budget(keep=0.5),)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """The folder and result of the whole run."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    return folder, compared(folder)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("this was done already")


def test_a_cell_holds_what_single_calls_give(done: tuple[Path, Comparison]) -> None:
    _, result = done
    model, held = plain_net(), batches(6)
    assert [cell.key for cell in result.cells] == [
        ("thinet", "scale", "keep=0.5", 2), ("thinet", "scale", "keep=0.34", 2),
        ("random", "scale", "keep=0.5", 2), ("random", "scale", "keep=0.34", 2),
    ]  # fmt: skip
    for cell, keep in zip(result.cells, (0.5, 0.34, 0.5, 0.34), strict=True):
        small = thinet.prune(
            model, EXAMPLE, drawn(2), budget=thinet.Budget(keep=keep), criterion=cell.criterion,
            repair="scale", recalibrate=True, seed=2,
        ).model  # fmt: skip
        counts, before = thinet.count(small, EXAMPLE), evaluate(small, held)
        assert (cell.macs, cell.params) == (counts.macs, counts.params)
        assert (cell.top1, cell.top5, cell.loss) == (before.top1, before.top5, before.loss)
        config = replace(CONFIG, seed=derive("compare", CONFIG.seed, 2))
        tuned = evaluate(finetune(small, batches(), epochs=2, config=config).model, held)
        assert (cell.top1_tuned, cell.top5_tuned) == (tuned.top1, tuned.top5)
        assert cell.loss_tuned == tuned.loss != before.loss
        assert cell.error is None and cell.seconds > 0
    dense, counts = evaluate(model, held), thinet.count(model, EXAMPLE)
    assert asdict(result.dense) == {"macs": counts.macs, "params": counts.params, **asdict(dense)}


def test_every_finished_cell_is_a_line_and_a_finished_run_is_returned_at_once(
    done: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = done
    lines = [json.loads(line) for line in (folder / CELLS).read_text().splitlines()]
    assert [Cell.from_dict(line) for line in lines] == list(result.cells)
    assert sorted(path.name for path in folder.iterdir()) == [CELLS, SETTINGS]
    for name in ("prune", "finetune", "evaluate"):
        monkeypatch.setattr(grid, name, refuse)
    assert compared(folder) == result


def test_killed_at_random_moments_it_goes_on() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.compared_runs", "0", "2"]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    told = json.loads(out)
    assert [cells for cells, _ in told["rounds"]] == [told["whole"]] * 2
    assert sum(kills for _, kills in told["rounds"]) >= 2


class Stopped(Exception):
    pass


def stop_when(what: str, times: int) -> Callable[[str, int, int], None]:
    """A progress callback that raises when it is told of `what` so many times."""
    seen = 0

    def progress(said: str, *_: int) -> None:
        nonlocal seen
        seen += said == what
        if said == what and seen == times:
            raise Stopped

    return progress


def test_stopped_in_a_training_it_does_not_cut_again(
    done: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stopped):
        compared(tmp_path, progress=stop_when("epoch 2 of 2", 1))
    assert (tmp_path / "unfinished" / "cut.safetensors").exists()
    calls: list[str] = []
    real = grid.prune

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(options["criterion"])
        return real(*given, **options)

    monkeypatch.setattr(grid, "prune", counted)
    assert facts(compared(tmp_path)) == facts(done[1])
    assert calls == ["thinet", "random", "random"]  # of four cells
    assert not (tmp_path / "unfinished").exists()


def test_half_a_line_at_the_end_is_dropped(
    done: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(done[0], tmp_path / "run")
    whole = (folder / CELLS).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    calls: list[object] = []
    real = grid.prune
    monkeypatch.setattr(grid, "prune", lambda *a, **k: calls.append(k) or real(*a, **k))
    for length in (len(whole) - 1, len(whole) - len(last) + 1, len(whole) - len(last)):
        (folder / CELLS).write_bytes(whole[:length])
        assert facts(compared(folder)) == facts(done[1])
        assert (folder / CELLS).read_text().count("\n") == 4
    assert len(calls) == 3  # the last cell each time, and nothing else


def test_damaged_files_are_named(done: tuple[Path, Comparison], tmp_path: Path) -> None:
    folder = copy_of(done[0], tmp_path / "run")
    lines = (folder / CELLS).read_text().splitlines(keepends=True)
    (folder / CELLS).write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    with pytest.raises(CheckpointError, match=r"line 2 of .*cells.jsonl is damaged"):
        compared(folder)
    (folder / CELLS).write_text('{"criterion": "thinet"}\n')
    with pytest.raises(CheckpointError, match="are not those of thinet.compare"):
        compared(folder)
    (folder / SETTINGS).write_text("{")
    with pytest.raises(CheckpointError, match=r"settings.json cannot be read .*resume=False"):
        compared(folder)
    assert facts(compared(folder, resume=False)) == facts(done[1])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        compared(tmp_path / "file")


def other_images(seed: int) -> list[torch.Tensor]:
    return [image + 1e-3 for image in drawn(seed)]


def fewer_images(seed: int) -> list[torch.Tensor]:
    return list(drawn(seed))[:1]


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "training": ({"config": replace(CONFIG, lr=0.1)}, r"training lr was 0.05 and is now 0.1"),
    "epochs": ({"epochs": 3}, r"training epochs was 2 and is now 3"),
    "no training": ({"train": None, "config": None}, r"training .* and is now None"),
    "distilling": ({"distill": True}, r"training distill was False and is now True"),
    "BatchNorm": ({"recalibrate": False}, r"option recalibrate was True and is now False"),
    "groups": ({"only": "0"}, r"option only was None and is now \['0'\]"),
    "divisor": ({"divisor": 4}, r"option divisor was 8 and is now 4"),
    "validation": ({"validation": batches(3)}, r"evaluation data batches was 6 and is now 3"),
    "calibration": (
        {"calibration": other_images},
        r"differently: calibration was '\w+' and is now",
    ),
    "fewer images": (
        {"calibration": fewer_images},
        r"calibration images was 24 and is now 12; calibration was '",
    ),
    "training data": ({"train": batches(3)}, r"training data batches was 4 and is now 3"),
}


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_going_on_with_other_settings_names_them(
    name: str, done: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, words = DIFFERENT[name]
    folder = done[0]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(grid, "prune", refuse)
    with pytest.raises(CheckpointError, match=f"was started .*{words}"):
        compared(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def labelled(turn: int | None) -> Callable[[int], list[Any]]:
    """The calibration images with labels that are turned by so many, or without."""

    def pairs(seed: int) -> list[Any]:
        labels = (torch.arange(12) + (turn or 0)) % 3
        return [image if turn is None else (image, labels) for image in drawn(seed)]

    return pairs


def test_labels_are_the_same_where_a_criterion_reads_them(tmp_path: Path) -> None:
    budgets = [thinet.Budget(keep=0.5)]

    def run(turn: int | None, *criteria: str) -> Comparison:
        return compared(
            tmp_path, calibration=labelled(turn), criteria=criteria, budgets=budgets, **QUICK
        )

    plain = run(None, "l2")
    both = run(0, "l2", "taylor")  # what reads no labels stays as it was
    assert both.cells[0] == plain.cells[0]
    for turn, words in ((1, r"'\w+' and is now '\w+'"), (None, r"'\w+' and is now None")):
        with pytest.raises(CheckpointError, match=f"differently: calibration labels was {words}"):
            run(turn, "taylor", "l2")
    assert run(None, "l2").cells == plain.cells
    assert run(0, "taylor").cells == both.cells[1:]


def test_cells_hear_the_loss_where_they_look_at_outputs(tmp_path: Path) -> None:
    half: dict[str, Any] = {"budget": thinet.Budget(keep=0.34), "repair": "none", "seed": 2}

    def run(turn: int, **options: Any) -> Comparison:
        return compared(
            tmp_path, calibration=labelled(turn), budgets=[half["budget"]], repairs=["none"],
            recalibrate=False, **QUICK, **options,
        )  # fmt: skip

    result = run(0, loss_aware=True)
    for cell, heard in zip(result.cells, (True, False), strict=True):
        small = thinet.prune(
            plain_net(), EXAMPLE, labelled(0)(2), criterion=cell.criterion, loss_aware=heard, **half
        ).model
        assert cell.loss == evaluate(small, batches(6)).loss
    deaf = thinet.prune(plain_net(), EXAMPLE, labelled(0)(2), **half).model
    assert result.cells[0].loss != evaluate(deaf, batches(6)).loss
    with pytest.raises(CheckpointError, match="differently: option.*loss_aware"):
        run(0)
    with pytest.raises(CheckpointError, match="differently: calibration labels was"):
        run(1, loss_aware=True)
    assert run(1, loss_aware=True, criteria=["random"]).cells == result.cells[1:]


def test_cells_of_before_their_images_were_counted_stay(
    done: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(done[0], tmp_path / "run")
    lines = [json.loads(line) for line in (folder / CELLS).read_text().splitlines()]
    for line in lines:
        del line["data"]["calibration images"], line["data"]["calibration labels"]
    (folder / CELLS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(grid, "prune", refuse)
    assert compared(folder) == done[1]
    with pytest.raises(CheckpointError, match="differently: calibration was '"):
        compared(folder, calibration=other_images)


def test_another_model_is_another_comparison(done: tuple[Path, Comparison]) -> None:
    changed = plain_net()
    with torch.no_grad():
        next(changed.parameters()).add_(1e-3)
    with pytest.raises(CheckpointError, match="started differently: model was '"):
        thinet.compare(
            changed, EXAMPLE, drawn, validation=batches(6), budgets=[thinet.Budget(keep=0.5)],
            state_dir=done[0],
        )  # fmt: skip


def test_more_cells_are_added_to_those_there(
    done: tuple[Path, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(done[0], tmp_path / "run")
    before = (folder / CELLS).read_bytes()
    monkeypatch.setattr(grid, "analyse", counting := Counting(analyse))
    told: list[tuple[str, int, int]] = []
    result = compared(
        folder, criteria=["l2", "thinet"], seeds=[2, 5], budgets=[thinet.Budget(keep=0.5)],
        on_cell=lambda cell, number, total: told.append((cell.name, number, total)),
    )  # fmt: skip
    assert counting.calls == 1
    assert [name for name, *_ in told] == [
        "l2, scale, keep=0.5, seed 2", "l2, scale, keep=0.5, seed 5",
        "thinet, scale, keep=0.5, seed 5",
    ]  # fmt: skip
    assert [(number, total) for _, number, total in told] == [(2, 4), (3, 4), (4, 4)]
    assert (folder / CELLS).read_bytes().startswith(before)
    assert result.cells[1] == done[1].cells[0]
    assert [(p.method, p.seeds) for p in result.points] == [("l2, scale", 2), ("thinet, scale", 2)]
    first, second = result.cells[1].loss_tuned, result.cells[3].loss_tuned
    assert first != second  # the seed draws other images and another order
    assert (done[1].others, result.others, result.to_dict()["others"]) == (0, 3, 3)


class Counting:
    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.calls = real, 0

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.calls += 1
        return self.real(*given, **options)


def test_the_dense_network_is_analysed_and_evaluated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "analyse", analysed := Counting(analyse))
    monkeypatch.setattr(sys.modules["thinet.prune"], "analyse", refuse)
    monkeypatch.setattr(grid, "evaluate", evaluated := Counting(evaluate))
    model = plain_net()
    result = compared(tmp_path, **QUICK, seeds=2)
    assert (analysed.calls, evaluated.calls) == (1, 1 + 8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain_net().parameters()))
    assert all(cell.top1_tuned is None and cell.top1 is not None for cell in result.cells)


def test_what_fails_is_a_cell_with_its_reason_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        **QUICK, "criteria": ("bn-scale", "l2"),
        "budgets": (thinet.Budget(keep=0.5), thinet.Budget(macs=0.001)),
    }  # fmt: skip
    result = compared(tmp_path, **options)
    errors = [cell.error for cell in result.cells]
    assert [error is None for error in errors] == [False, False, True, False]
    assert str(errors[0]).startswith("CalibrationError: criterion 'bn-scale' can judge none of")
    assert str(errors[3]).startswith("BudgetError: macs=0.001 cannot be met")
    assert len(result.failed) == 3
    point = result.points[0]
    assert (point.seeds, point.failed, point.top1, point.macs) == (0, 1, None, None)
    monkeypatch.setattr(grid, "prune", counting := Counting(grid.prune))
    assert compared(tmp_path, **options) == result
    assert counting.calls == 0
    again = compared(tmp_path, **options, retry=True)
    assert counting.calls == 3
    assert facts(again) == facts(result)
    assert len((tmp_path / CELLS).read_text().splitlines()) == 4 + 3


def test_a_training_that_fails_keeps_what_was_measured_before(tmp_path: Path) -> None:
    result = compared(tmp_path, config=replace(CONFIG, lr=1e30), criteria=["l2"])
    for cell in result.cells:
        assert str(cell.error).startswith("TrainingError: ")
        assert cell.top1 is not None and cell.macs is not None and cell.top1_tuned is None


def test_notes_of_the_cut_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = grid.prune

    def noting(*given: Any, **options: Any) -> Any:
        result = real(*given, **options)
        return replace(result, report=replace(result.report, notes=("by weight sum",)))

    monkeypatch.setattr(grid, "prune", noting)
    assert compared(tmp_path, **QUICK).cells[0].notes == ("by weight sum",)
    assert compared(tmp_path, **QUICK).cells[0].notes == ("by weight sum",)


def test_faults_of_the_data_or_the_disk_are_no_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError):
        compared(tmp_path / "a", validation=[(torch.zeros(4, 3, 6, 6), torch.full((4,), 7))])
    assert not (tmp_path / "a" / SETTINGS).exists()

    def full_disk(*_: object) -> Any:
        raise CheckpointError("no space left")

    monkeypatch.setattr(grid, "save", full_disk)
    with pytest.raises(CheckpointError, match="no space left"):
        compared(tmp_path / "b")
    assert not (tmp_path / "b" / CELLS).exists()
    assert not issubclass(CheckpointError, grid.FAILURES)
    assert issubclass(TrainingError, grid.FAILURES)


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "criterion": ({"criteria": ["thinnet"]}, OptionError, "did you mean 'thinet'"),
    "one criterion": ({"criteria": "thinet"}, OptionError, "criteria is a list of at least one"),
    "no repair": ({"repairs": []}, OptionError, "repairs is a list of at least one; got"),
    "repair": ({"repairs": ["some"]}, OptionError, "unknown repair 'some'; choose among none"),
    "twice": ({"criteria": ["l2", "l2"]}, OptionError, "criteria: 'l2' is given more than once"),
    "no budget": ({"budgets": [0.5]}, OptionError, r"budgets are thinet.Budget\(keep=0.5\)"),
    "named": ({"budgets": [thinet.Budget(keep={"0": 3})]}, OptionError, "of one fraction"),
    "no seed": ({"seeds": 0}, OptionError, "seeds is a list of at least one"),
    "seed": ({"seeds": [-1]}, OptionError, "seeds are whole numbers from 0"),
    "epochs": ({"epochs": 0}, OptionError, "epochs must be a whole number"),
    "nothing to train": ({"train": None}, OptionError, "give train as well"),
    "divisor": ({"divisor": 0}, OptionError, "divisor is a whole number from 1"),
    "pattern": ({"only": "conv*"}, UnknownGroupError, "'conv.' matches none"),
    "locked": ({"only": "7"}, LockedGroupError, "nothing can be cut"),
}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_mistakes_are_refused(name: str, tmp_path: Path) -> None:
    options, error, words = MISTAKES[name]
    with pytest.raises(error, match=words):
        compared(tmp_path / "run", **options)
    assert not (tmp_path / "run" / CELLS).exists()


def test_means_and_spreads_are_over_the_seeds_that_were_finished() -> None:
    def cell(seed: int, top1: float | None, **more: Any) -> Cell:
        return Cell("l2", "none", "keep=0.5", seed, macs=10 + seed, params=5, top1=top1,
                    seconds=1.0 + seed, **more)  # fmt: skip

    dense = Dense(100, 50, 0.9, 1.0, 0.1, 10)
    other = Cell("l2", "full", "keep=0.5", 0, macs=7, params=5, top1=0.25)
    failed = Cell("l2", "none", "keep=0.5", 3, seconds=6.0, error="RepairError: no")
    cells = (cell(0, 0.5), other, cell(1, 0.6), cell(2, 0.7), failed)
    first, second = Comparison(dense, cells).points
    assert first.top1 is not None
    assert first.top1.mean == pytest.approx(0.6)
    assert first.top1.deviation == pytest.approx(0.1)  # ((0.1^2 + 0 + 0.1^2) / 2) ** 0.5
    assert (first.macs, first.params, first.seeds, first.failed) == (11, 5, 3, 1)
    assert first.seconds == 3.0
    assert (first.top5, first.top1_tuned) == (None, None)
    assert (second.method, second.top1) == ("l2, full", Spread(0.25))
    assert Comparison(dense, cells).failed == (failed,)


def test_a_criterion_that_fails_is_a_cell_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))

    @base.criterion("half", needs=())
    def half(stats: base.GroupStatistics) -> base.Order:
        return base.Order((0,))

    @base.criterion("boom", needs=())
    def boom(stats: base.GroupStatistics) -> base.Order:
        raise KeyError("mistaken")

    found = compared(tmp_path, criteria=("half", "boom", "random"), budgets=BUDGET, **QUICK)
    failed, crashed, fine = found.cells
    assert failed.error is not None and "must order units 0..5, each once" in failed.error
    assert crashed.error is not None and "'boom' failed with KeyError: 'mistaken'" in crashed.error
    assert fine.error is None and fine.top1 is not None


def test_images_that_can_be_gone_through_once_serve_all_seeds(tmp_path: Path) -> None:
    options = {"criteria": ("thinet",), "budgets": BUDGET, "seeds": 2, **QUICK}
    once = compared(tmp_path / "a", calibration=drawn(3), **options)
    listed = compared(tmp_path / "b", calibration=list(drawn(3)), **options)
    assert len(once.cells) == 2 and facts(once) == facts(listed)


def test_validation_data_that_differ_late_are_refused(tmp_path: Path) -> None:
    options = {"criteria": ("random",), "budgets": BUDGET, **QUICK}
    compared(tmp_path, **options)
    images = batches(6)
    images[-1] = (images[-1][0] + 1, images[-1][1])
    with pytest.raises(CheckpointError, match="evaluation data all batches was"):
        compared(tmp_path, validation=images, **options)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "draft.txt").write_text("thesis")
    options = {"criteria": ("random",), "budgets": BUDGET, **QUICK}
    with pytest.raises(CheckpointError, match="holds cells.jsonl or unfinished without a settings"):
        compared(tmp_path, **options)
    assert (tmp_path / "unfinished" / "draft.txt").read_text() == "thesis"
    folder = tmp_path / "run"
    compared(folder, **options)
    (folder / SETTINGS).unlink()
    lines = (folder / CELLS).read_bytes()
    with pytest.raises(CheckpointError, match="without a settings.json"):
        compared(folder, **options)
    assert (folder / CELLS).read_bytes() == lines
    assert len(compared(folder, resume=False, **options).cells) == 1
