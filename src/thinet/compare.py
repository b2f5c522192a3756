"""Criteria, repairs and budgets side by side on one network, over seeds (ThiNet, figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from thinet.budget import Budget
from thinet.cells import Comparison
from thinet.criteria import get
from thinet.errors import OptionError
from thinet.prune_options import Repair, Sampling, Widths
from thinet.types import ExampleInputs, Progress

if TYPE_CHECKING:
    from thinet.grid import OnCell
    from thinet.train.config import FinetuneConfig


def compare(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    validation: Any,
    budgets: Sequence[Budget],
    criteria: Sequence[str] = ("thinet", "weight-sum"),
    repairs: Sequence[Repair] = ("full",),
    seeds: int | Sequence[int] = 1,
    train: Any = None,
    epochs: int = 1,
    config: FinetuneConfig | None = None,
    distill: bool = False,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    recalibrate: bool = True,
    sampling: Sampling = "exact",
    widths: Widths = "error",
    divisor: int = 8,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
    loss_aware: bool = False,
    state_dir: str | Path,
    resume: bool = True,
    retry: bool = False,
    verify: bool = True,
    device: str | None = None,
    on_cell: OnCell | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Every criterion with every repair at every budget and seed, before and after fine-tuning.

    Each cell of this grid is written to `state_dir` as soon as it is finished. Called again, a run
    that was stopped or killed at any moment goes on where it was, within a training too; more
    criteria, repairs, budgets or seeds may be asked for then, what decides a cell's numbers must
    be as it was. A method that fails is a cell with its reason, the others go on.

    Args:
        model: the dense model; it is left as it was.
        calibration: batches of images, or a function that gives them for a seed.
        validation: labelled images to measure the accuracy on.
        budgets: each one fraction that stays.
        criteria, repairs: names, as for `thinet.prune`.
        seeds: how many (0, 1, ...), or which. A seed decides sampled positions, random choices and
            the order of training, and what the functions for calibration and training data give.
        train: what to fine-tune each cell on, as for `thinet.finetune`, or a function that gives
            it for a seed; None measures without training only.
        epochs, config, distill: of the fine-tuning, alike for all cells; `distill` learns from the
            dense network's outputs too.
        recalibrate: re-estimate BatchNorm statistics after each cut, which weak repairs need most.
        only, skip, sampling, widths, divisor, normalised, choices, verify: as for `thinet.prune`.
        loss_aware: as for `thinet.prune`, in the cells where errors of outputs decide anything.
        state_dir: a folder for the state of this comparison alone.
        resume: False begins anew, whatever the folder holds.
        retry: cells that failed are tried again.
        on_cell: called with each cell that was finished now, how many are, and how many there are.
        progress: also told of the whole plan, in thousandths of a cell.

    Raises:
        OptionError: options that are unknown, empty, repeated or out of range.
        UnknownGroupError, LockedGroupError: `only` and `skip` leave nothing to cut.
        CheckpointError: the folder cannot be written, another process works in it, or it holds a
            comparison with other settings (says which).
        DataError, CalibrationError: the data is empty or not usable.
    """
    for name in _several("criteria", criteria):
        get(name)
    for name in _several("repairs", repairs):
        if name not in get_args(Repair):
            raise OptionError(
                f"unknown repair {name!r}; choose among {', '.join(get_args(Repair))}"
            )
    if train is None and (config is not None or distill):
        raise OptionError("config and distill say how to train; give train as well")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise OptionError(f"epochs must be a whole number of at least 1, got {epochs!r}")
    # The training engine is loaded when there is something to measure.
    from thinet.grid import Grid, Training
    from thinet.train.config import FinetuneConfig

    tuning = None
    if train is not None:
        tuning = Training(_by_seed(train), epochs, config or FinetuneConfig(), distill)
    cutting = {
        "only": _patterns(only),
        "skip": _patterns(skip),
        "recalibrate": recalibrate,
        "sampling": sampling,
        "widths": widths,
        "divisor": divisor,
        "normalised": normalised,
        "choices": dict(choices or {}),
    }
    return Grid(
        dense=model, inputs=example_inputs, calibration=_by_seed(calibration),
        validation=validation, criteria=criteria, repairs=repairs, budgets=_named(budgets),
        seeds=_seeds(seeds), cutting=cutting, training=tuning, verify=verify, device=device,
        on_cell=on_cell, progress=progress, loss_aware=loss_aware,
    ).run(Path(state_dir), resume=resume, retry=retry)  # fmt: skip


def _several(name: str, given: Sequence[Any]) -> Sequence[Any]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise OptionError(f"{name} is a list of at least one; got {given!r}")
    twice = [value for i, value in enumerate(given) if value in given[:i]]
    if twice:
        one = twice[0]
        plain = isinstance(one, Budget) and not one.named
        shown = f"{one.kind}={one.fraction:g}" if plain else repr(one)
        raise OptionError(f"{name}: {shown} is given more than once")
    return given


def _named(budgets: Sequence[Budget]) -> dict[str, Budget]:
    for budget in _several("budgets", budgets):
        if not isinstance(budget, Budget) or budget.named is not None:
            raise OptionError(
                f"budgets are thinet.Budget(keep=0.5) and the like, of one fraction; got {budget!r}"
            )
    return {f"{budget.kind}={budget.fraction!r}": budget for budget in budgets}


def _seeds(given: int | Sequence[int]) -> tuple[int, ...]:
    seeds: Any = range(given) if type(given) is int else given
    for seed in _several("seeds", seeds):
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise OptionError(f"seeds are whole numbers from 0 to 2^32 - 1; got {seed!r}")
    return tuple(seeds)


def _patterns(given: str | Sequence[str] | None) -> list[str] | None:
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


def _by_seed(given: Any) -> Callable[[int], Any]:
    if isinstance(given, Iterator):  # gone through once a seed
        given = list(given)
    return given if callable(given) else lambda _: given
