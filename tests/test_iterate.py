"""The loop against its steps written out, killed at random moments, and asked for the wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import thinet
from tests.chains import images, labelled_batches
from tests.iterated_runs import CONFIG, HEAD, RECIPE, Small, digest, iterated, small_net
from thinet.budget import Budget
from thinet.errors import CheckpointError, OptionError
from thinet.recipes.apply import with_replaced
from thinet.seeds import derive
from thinet.steps import StepRecord
from thinet.train.config import FinetuneConfig
from thinet.train.finetune import finetune


def tuned(model: torch.nn.Module, number: int, epochs: int, **options: Any) -> torch.nn.Module:
    """The training of one step, written out."""
    config = FinetuneConfig(
        ema_decay=0.9, label_smoothing=0.1, seed=derive("step", 0, number), **options
    )
    return finetune(model, labelled_batches(side=8), epochs=epochs, config=config).model


def test_the_loop_is_its_steps_one_after_another(tmp_path: Path) -> None:
    calibration = list(images(16, 8).split(8))
    model: torch.nn.Module = small_net()
    model = thinet.prune(model, images(1, 8), calibration, budget=Budget(keep={"one": 3})).model
    model = tuned(model, 1, 2, lr=0.02, schedule="step", milestones=(1,))
    model = with_replaced(model, HEAD, calibration)
    model = tuned(model, 2, 1, lr=0.02, schedule="constant")
    model = thinet.prune(model, images(1, 8), calibration, budget=Budget(keep={"two": 5})).model
    model = tuned(model, 3, 2, lr=0.01, schedule="constant")
    dense = small_net()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    result = iterated(tmp_path / "run")
    ours, theirs = result.model.state_dict(), model.state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(before[name], t) for name, t in dense.state_dict().items())


def test_the_result_is_read_back_from_the_dense_model(tmp_path: Path) -> None:
    result = iterated(tmp_path / "run")
    path = thinet.save(tmp_path / "small.safetensors", result.model, result.plan)
    read = thinet.load(path, Small())
    assert torch.equal(read.eval()(images(4, 8)), result.model.eval()(images(4, 8)))
    assert {name: len(units) for name, units in result.plan.keep.items()} == {"one": 3, "two": 5}
    assert result.plan.settings["recipe"] == "three-steps"
    assert result.plan.settings["budget"] == {"keep": {"one": 3, "two": 5}}


def test_killed_at_random_moments() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.iterated_runs", "0", "3"]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    told = json.loads(out)
    assert [weights == told["whole"] for weights, _ in told["rounds"]] == [True] * 3
    assert sum(kills for _, kills in told["rounds"]) >= 6


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stops", [[1], [2, 2, 2], [5, 3, 9], [13, 1, 4]])
def test_stopped_between_and_within_steps(tmp_path: Path, stops: list[int]) -> None:
    """Stopped after so many calls of progress, again and again, then left to end."""
    whole = digest(iterated(tmp_path / "whole"))
    for stop in stops:
        left = stop

        def progress(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Stopped

        with pytest.raises(Stopped):
            iterated(tmp_path / "run", progress=progress)
    assert digest(iterated(tmp_path / "run")) == whole


def test_a_finished_run_is_read_and_not_done_again(tmp_path: Path) -> None:
    first = iterated(tmp_path)
    told: list[str] = []
    steps: list[StepRecord] = []
    again = iterated(tmp_path, progress=lambda what, *_: told.append(what), on_step=steps.append)
    assert digest(again) == digest(first)
    assert again.steps == first.steps
    assert (told, steps) == ([], [])


def test_the_folder_holds_one_model_and_what_was_done(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    iterated(tmp_path, on_step=lambda _: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    files = [[".lock", f"step-00{n}-trained.safetensors", "steps.json"] for n in (1, 2, 3)]
    assert seen == files
    assert sorted(path.name for path in tmp_path.iterdir()) == files[-1][1:]


def test_every_step_is_recorded_and_the_end_is_foreseen(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    steps: list[StepRecord] = []
    result = iterated(
        tmp_path,
        validation=labelled_batches(side=8),
        progress=lambda *call: told.append(call),
        on_step=steps.append,
    )
    assert tuple(steps) == result.steps
    assert [(s.number, s.steps, s.name, s.epochs) for s in steps] == [
        (1, 3, "one", 2),
        (2, 3, "out", 1),
        (3, 3, "two", 2),
    ]
    assert [dict(s.kept) for s in steps] == [{"one": 3}, {}, {"two": 5}]
    counts = thinet.count(result.model, images(1, 8))
    assert (steps[-1].macs, steps[-1].params) == (counts.macs, counts.params)
    assert all(s.top1 is not None and s.top1_cut is not None for s in steps)
    assert steps[0].seconds_left > 0 == steps[-1].seconds_left
    whole = [done for what, done, total in told if what == "the whole plan" and total == 1000]
    assert whole == sorted(whole)
    assert (whole[0], whole[-1]) == (0, 1000)
    assert len(set(whole)) > 15


def test_without_training_it_only_cuts(tmp_path: Path) -> None:
    result = iterated(tmp_path, train=None, config=None)
    assert [step.epochs for step in result.steps] == [0, 0, 0]
    assert result.model.one.out_channels == 3  # type: ignore[union-attr]


def test_a_budget_goes_group_by_group(tmp_path: Path) -> None:
    result = iterated(tmp_path, recipe=None, budget=Budget(keep=0.5), train=None, only="one")
    assert [dict(step.kept) for step in result.steps] == [{"one": 3}]


def test_the_schedule_scales(tmp_path: Path) -> None:
    result = iterated(tmp_path, scale=0.5, lr_scale=3.0)
    assert [step.epochs for step in result.steps] == [1, 1, 1]
    assert [step.tuning.lr for step in result.recipe.steps] == [0.06, 0.06, 0.03]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"repair": "scale"}, "option repair was 'full' and is now 'scale'"),
        ({"seed": 1}, "option seed was 0 and is now 1"),
        ({"scale": 2.0}, "epochs one was 2 and is now 4; epochs out was 1 and is now 2; "),
        ({"distill": True}, "training distill was False and is now True"),
        ({"config": FinetuneConfig(ema_decay=0.5)}, "training ema_decay was 0.9 and is now 0.5"),
        ({"train": labelled_batches(16, 8)}, "training data batches was 4 and is now 2"),
        ({"recipe": None, "budget": Budget(keep=0.5)}, "recipe was 'three-steps' and is now"),
        ({"train": None, "config": None}, "and is now None"),
        ({"validation": labelled_batches(16, 8)}, "validation data was None and is now {"),
    ],
)
def test_other_settings_are_refused_and_named(
    tmp_path: Path, changed: dict[str, Any], text: str
) -> None:
    iterated(tmp_path, train=labelled_batches(side=8))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="was started differently: .*resume=False") as caught:
        iterated(tmp_path, **changed)
    assert text in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_images_are_refused_and_resume_false_begins_anew(tmp_path: Path) -> None:
    whole = digest(iterated(tmp_path / "whole"))
    arguments = {"recipe": RECIPE, "train": labelled_batches(side=8), "config": CONFIG}
    other = [images(24, 8)]
    thinet.iterate(small_net(), images(1, 8), other, state_dir=tmp_path / "run", **arguments)
    with pytest.raises(CheckpointError, match="calibration was '"):
        iterated(tmp_path / "run")
    assert digest(iterated(tmp_path / "run", resume=False)) == whole


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file; give a folder for the state"):
        iterated(file)
    (tmp_path / "steps.json").write_text('{"thinet_steps": 1')
    with pytest.raises(CheckpointError, match=r"steps.json cannot be read .* resume=False"):
        iterated(tmp_path)
    (tmp_path / "steps.json").write_text('{"thinet_steps": 9}')
    with pytest.raises(CheckpointError, match="is of another version of thinet"):
        iterated(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recipe": None}, "give a recipe or a budget, one of the two"),
        ({"budget": Budget(keep=0.5)}, "give a recipe or a budget, one of the two"),
        ({"only": "one"}, "only and skip belong to a budget"),
        ({"recipe": None, "budget": Budget(keep=0.5), "keep": 0.3}, "keep changes a recipe"),
        ({"keep": 0.3}, "the recipe three-steps fixes how much stays"),
        ({"train": None, "distill": True}, "distill learns while training; give train"),
        ({"config": FinetuneConfig(lr=0.1)}, "rates and their schedule are the recipe's"),
        ({"scale": 0.0}, "scaled by factors above zero, got 0.0"),
    ],
)
def test_options_that_contradict_each_other(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(OptionError, match=text):
        iterated(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_starting_over_survives_being_killed_before_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old training states stay when the settings are gone already."""

    def progress(what: str, *_: object) -> None:
        if "epoch" in what:
            raise Stopped

    with pytest.raises(Stopped):
        iterated(tmp_path / "run", progress=progress)
    assert list((tmp_path / "run").glob("training-*"))
    (tmp_path / "run" / "steps.json").unlink()
    other = {"lr_scale": 0.5}
    assert digest(iterated(tmp_path / "run", **other)) == digest(iterated(tmp_path / "w", **other))
