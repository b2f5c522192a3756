"""Fine-tuning by SGD that goes on, bit for bit, where it was killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thinet.errors import ModelError, OptionError
from thinet.seeds import seeded
from thinet.trace.record import check_model
from thinet.train.config import FinetuneConfig
from thinet.train.feed import Feed
from thinet.train.identity import identity_of
from thinet.train.processes import current
from thinet.train.run import EpochRecord, Run
from thinet.types import Progress

__all__ = ["EpochRecord", "FinetuneConfig", "FinetuneResult", "finetune"]


@dataclass(frozen=True)
class FinetuneResult:
    """The trained model, in evaluation mode on the device of the given one, and its history."""

    model: nn.Module
    history: tuple[EpochRecord, ...]


def finetune(
    model: nn.Module,
    data: Any,
    *,
    epochs: int,
    config: FinetuneConfig | None = None,
    validation: Any = None,
    teacher: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    save_every: int = 500,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Progress | None = None,
    device: str | torch.device | None = None,
) -> FinetuneResult:
    """Train a copy of a model; the given one, its mode and the global random state stay.

    Runs on accelerate: in one process, or in several under `accelerate launch`, each of which takes
    every n-th batch; a step then uses n batches (times `config.accumulate`).

    With `checkpoint`, the state of the run is kept in that folder (which all processes must be able
    to read): at the start, after each epoch, every `save_every` steps, and on Ctrl-C. Called again
    with the same arguments, a run that ended early goes on where it was. On a CPU, with as many
    processes, its weights are bit for bit those of a run that was never stopped, and a finished run
    is returned at once. A run is resumed only with what it was started with; compared are the
    batches of a list, the names, sizes and labels of a folder's files, and the first and last batch
    of a `DataLoader` (of data without numbered batches the first).

    Args:
        model: gives logits; auxiliary classifiers of GoogLeNet and Inception are trained too.
        data: a training loader of `thinet.data`, a `DataLoader` or an iterable of (images, labels)
            that can be gone through once an epoch.
        epochs: passes over the data.
        config: see `FinetuneConfig`.
        validation: data to evaluate on after each epoch.
        teacher: the dense network, to learn from its outputs too (`config.distill_weight`).
        optimizer: goes on in place of a fresh SGD, with its state; made over `model`'s parameters.
            It is copied. Its learning rates are set by the schedule.
        on_epoch: called in the main process after each epoch.
        device: where to train; None takes a GPU if there is one, otherwise the CPU.

    Raises:
        OptionError: an option is out of range, or two contradict each other.
        ModelError: nothing in the model can be trained, it does not run on the images, or its
            outputs are not logits.
        DataError: the data is empty, or its labels do not fit the model.
        TrainingError: the loss is no longer finite. The last checkpoint stays.
        CheckpointError: the folder cannot be written, or holds a run with other arguments.
    """
    check_model(model)
    if teacher is not None:
        check_model(teacher)
    config = config or FinetuneConfig()
    if not isinstance(config, FinetuneConfig):
        raise OptionError(f"config is a FinetuneConfig; got {type(config).__name__}")
    _check(model, epochs, save_every, teacher, config)
    processes = current(device)
    feed = Feed(data, seed=config.seed, rank=processes.rank, world=processes.world)
    scored = None
    if validation is not None:
        scored = Feed(validation, seed=0, rank=processes.rank, world=processes.world)
    started_on = next(model.parameters()).device
    with seeded("finetune", config.seed):
        run = Run(model, optimizer, teacher, feed, epochs, config, processes)
        if checkpoint is not None:
            run.open(
                Path(checkpoint),
                lambda: identity_of(
                    model,
                    optimizer,
                    teacher,
                    feed.describe(),
                    None if scored is None else scored.describe(),
                    config,
                    epochs,
                    processes.world,
                ),
                resume,
            )
        run.train(scored, save_every, on_epoch, progress)
    trained = run.ema.model if run.ema else run.model
    for given, made in zip(model.parameters(), trained.parameters(), strict=True):
        made.requires_grad_(given.requires_grad).grad = None
    return FinetuneResult(trained.to(started_on).eval(), tuple(run.history))


def _check(
    model: nn.Module,
    epochs: int,
    save_every: int,
    teacher: nn.Module | None,
    config: FinetuneConfig,
) -> None:
    for name, value in (("epochs", epochs), ("save_every", save_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("no parameter of the model requires a gradient; there is nothing to train")
    if teacher is not None and config.distill_weight == 0:
        raise OptionError("a teacher was given but distill_weight is 0; raise it or leave it out")
