"""The paper's loop: cut a layer or a block, fine-tune, go on with the next (ThiNet, 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from thinet.budget import Budget
from thinet.errors import CalibrationError, OptionError
from thinet.prune_options import Repair, Sampling
from thinet.recipes import group_by_group, resolve
from thinet.recipes.recipe import Recipe
from thinet.types import ExampleInputs, Progress

if TYPE_CHECKING:
    from thinet.loop import IterateResult
    from thinet.steps import StepRecord
    from thinet.train.config import FinetuneConfig


def iterate(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any],
    *,
    recipe: str | Recipe | None = None,
    keep: float | None = None,
    budget: Budget | None = None,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    train: Any = None,
    validation: Any = None,
    state_dir: str | Path,
    resume: bool = True,
    scale: float = 1.0,
    lr_scale: float = 1.0,
    config: FinetuneConfig | None = None,
    distill: bool = False,
    criterion: str = "thinet",
    repair: Repair = "full",
    recalibrate: bool = False,
    sampling: Sampling = "exact",
    verify: bool = True,
    seed: int = 0,
    device: str | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: Progress | None = None,
) -> IterateResult:
    """Cut a network step by step, each chosen on the network as it is then, and train in between.

    The schedule is the recipe's: how many epochs follow each step, at which rates. The state of the
    run is kept in `state_dir`: called again with the same arguments, a run that was stopped, or
    killed at any moment, goes on where it was, within a training too. On a CPU its weights are bit
    for bit those of a run that was never stopped.

    Under `accelerate launch` the main process chooses, cuts and writes, the others read what it
    wrote, and all train together, as `finetune` does. All must be given the same model, images and
    options, and be able to read `state_dir`.

    Args:
        model: the dense model; it is left as it was.
        calibration: batches of images on which channels are chosen; kept in memory.
        recipe: a name of `thinet.recipes`, or a recipe of one's own; or else
        budget: the fraction that stays, one group after another (`only`, `skip`: glob patterns).
        keep: in place of the recipe's own fraction, where it has one for all.
        train: what to fine-tune on, as for `thinet.finetune`; None cuts without training.
        validation: what to measure the accuracy on after each cut and each epoch.
        state_dir: a folder for the state of this run alone.
        resume: False begins anew, whatever the folder holds.
        scale: factor on all epochs of the schedule (whole ones, at least 1 a step).
        lr_scale: factor on all its learning rates.
        config: of the training; learning rate and schedule are the recipe's.
        distill: learn from the dense network's outputs too.
        repair: "scale" is the paper's, "full" (new weights) starts the training from a better one.
        criterion, recalibrate, sampling, verify, seed: as for `thinet.prune`.
        on_step: called after each step in the main process.
        progress: also told of the whole plan, in thousandths of its estimated work.

    Raises:
        OptionError: options that contradict each other or are out of range, or that differ between
            processes.
        TrainingError: another process failed; its own message says why.
        RecipeError: no such recipe, or not for this model.
        CheckpointError: the folder cannot be written, another process works in it, or it holds a
            run with other arguments (which).
        As `thinet.prune` and `thinet.finetune`.
    """
    _check(recipe, keep, budget, only, skip, train, distill)
    if not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration gives batches of images; got {type(calibration).__name__}"
        )
    batches = list(calibration)
    if budget is not None:
        steps = group_by_group(model, example_inputs, budget, only=only, skip=skip)
    else:
        steps = resolve(recipe or "", model, example_inputs, keep=keep)
    # The training engine is loaded when there is something to train.
    from thinet.loop import Loop

    return Loop(
        dense=model, inputs=example_inputs, batches=batches, recipe=steps.scaled(scale, lr_scale),
        train=train, validation=validation, config=config, device=device, distill=distill,
        cutting={"criterion": criterion, "repair": repair, "sampling": sampling, "seed": seed},
        verify=verify, recalibrate=recalibrate, on_step=on_step, progress=progress,
    ).run(Path(state_dir), resume)  # fmt: skip


def _check(
    recipe: str | Recipe | None,
    keep: float | None,
    budget: Budget | None,
    only: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
    train: Any,
    distill: bool,
) -> None:
    if (recipe is None) == (budget is None):
        raise OptionError("give a recipe or a budget, one of the two")
    if recipe is not None and (only is not None or skip is not None):
        raise OptionError("a recipe names its groups; only and skip belong to a budget")
    if budget is not None and keep is not None:
        raise OptionError("keep changes a recipe; give a budget's own fraction in the budget")
    if train is None and distill:
        raise OptionError("distill learns while training; give train as well")
