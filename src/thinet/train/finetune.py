"""Fine-tuning by SGD that goes on, bit for bit, where it was killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thinet.errors import CheckpointError, DataError, ModelError, OptionError, TrainingError
from thinet.seeds import seeded
from thinet.train import state
from thinet.train.config import FinetuneConfig
from thinet.train.ema import Ema
from thinet.train.evaluate import Evaluation, evaluate_feed
from thinet.train.feed import Feed
from thinet.train.interrupt import Interrupts
from thinet.train.logs import Logs
from thinet.train.loss import Loss
from thinet.train.optimizer import copied
from thinet.train.processes import Processes, current
from thinet.train.schedule import learning_rate
from thinet.types import Progress


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave.

    Attributes:
        epoch: number of the epoch, from 1.
        lr: learning rate of its last step.
        loss: mean training loss over its images, as optimised (smoothing, teacher, auxiliary
            classifiers included).
        top1: fraction of its (augmented) images that were right while training.
        seconds: time it took, evaluation included, interruptions not.
        validation: of the model after the epoch (of the average, with `ema_decay`).
    """

    epoch: int
    lr: float
    loss: float
    top1: float
    seconds: float
    validation: Evaluation | None


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
    is returned at once. A run is resumed only with what it was started with.

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
        ModelError: nothing in the model can be trained, or its outputs are not logits.
        DataError: the data is empty, or its labels do not fit the model.
        TrainingError: the loss is no longer finite. The last checkpoint stays.
        CheckpointError: the folder cannot be written, or holds a run with other arguments.
    """
    config = config or FinetuneConfig()
    _check(model, epochs, save_every, teacher, config)
    processes = current(device)
    feed = Feed(data, seed=config.seed, rank=processes.rank, world=processes.world)
    scored = None
    if validation is not None:
        scored = Feed(validation, seed=0, rank=processes.rank, world=processes.world)
    started_on = next(model.parameters()).device
    with seeded("finetune", config.seed):
        run = _Run(model, optimizer, teacher, feed, epochs, config, processes)
        if checkpoint is not None:
            run.open(Path(checkpoint), resume)
        run.train(scored, save_every, on_epoch, progress)
    trained = run.ema.model if run.ema else run.model
    for given, made in zip(model.parameters(), trained.parameters(), strict=True):
        made.requires_grad_(given.requires_grad).grad = None
    return FinetuneResult(trained.to(started_on).eval(), tuple(run.history))


class _Run:
    """A training run: everything that changes while it goes on."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        teacher: nn.Module | None,
        feed: Feed,
        epochs: int,
        config: FinetuneConfig,
        processes: Processes,
    ) -> None:
        self.feed, self.epochs, self.config, self.processes = feed, epochs, config, processes
        group = processes.world * config.accumulate
        self.group, self.steps = group, -(-feed.batches // group)
        self.identity: dict[str, Any] = {}
        self.model, self.optimizer = copied(model, optimizer, config, processes)
        self.given = (model, optimizer, teacher)
        self.loss = Loss(config, teacher, processes.device)
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(
            processes.device.type, init_scale=2.0**10, enabled=config.mixed_precision == "fp16"
        )
        self.folder: Path | None = None
        self.epoch = self.step = 0
        self.lr = 0.0
        self.sums = [0.0, 0.0, 0.0, 0.0]  # loss, right, images, seconds of this epoch
        self.history: list[EpochRecord] = []

    def open(self, folder: Path, resume: bool) -> None:
        """Take up the run in the folder, or begin one there."""
        model, optimizer, teacher = self.given
        config = asdict(self.config)
        del config["log_dir"]
        config["milestones"] = list(self.config.milestones)
        self.identity = {
            "option": config,
            "epochs": self.epochs,
            "processes": self.processes.world,
            "data": _plain(self.feed.describe()),
            "model": state.fingerprint(model),
            "teacher": state.fingerprint(teacher) if teacher is not None else None,
            "optimizer": type(self.optimizer).__name__,
            "optimizer state": (
                state.fingerprint_of(state.pack_optimizer(optimizer)[0]) if optimizer else None
            ),
        }
        self.folder = folder
        if folder.is_file():
            raise CheckpointError(f"checkpoint {folder} is a file; give a folder")
        saved = state.read(folder) if resume else None
        if saved is None:
            self.save()
            return
        different = state.differences(saved[1]["identity"], self.identity)
        if different:
            raise CheckpointError(
                f"{folder} holds a training run that was started differently: "
                f"{'; '.join(different)}. Give what it was started with, another folder, or "
                "resume=False to start over"
            )
        self._restore(*saved)

    def train(
        self,
        validation: Feed | None,
        save_every: int,
        on_epoch: Callable[[EpochRecord], None] | None,
        progress: Progress | None,
    ) -> None:
        done = self.epoch * self.steps + self.step
        with Interrupts(enabled=self.folder is not None) as interrupts, self._logs(done) as logs:
            while self.epoch < self.epochs:
                began = time.perf_counter() - self.sums[3]
                what = f"epoch {self.epoch + 1} of {self.epochs}"
                batches = self.feed.epoch(self.epoch, self.step * self.group)
                self.model.train()
                while self.step < self.steps:
                    stopping = self._step(batches, interrupts.asked)
                    self.step += 1
                    self.sums[3] = time.perf_counter() - began
                    if progress is not None and self.processes.main:
                        progress(what, self.step, self.steps)
                    if stopping:
                        self.save()
                        raise KeyboardInterrupt
                    if self.step % save_every == 0 and self.step < self.steps:
                        self.save()
                record = self._end_epoch(validation, began)
                logs.add(record, self.epoch * self.steps)
                self.save()
                if on_epoch is not None and self.processes.main:
                    on_epoch(record)

    def _step(self, batches: Any, stop: bool) -> bool:
        """One update; whether any process was asked to stop."""
        where = (self.epoch, self.step, self.processes.rank)
        number = self.epoch * self.steps + self.step
        self.optimizer.zero_grad(set_to_none=True)
        sums = [0.0, 0.0, 0.0, float(stop)]
        first = self.step * self.group
        here = range(first, min(first + self.group, self.feed.batches))
        # fetched before seeding: a loader that starts draws from the global generator
        mine = [next(batches) for _ in here[self.processes.rank :: self.processes.world]]
        with seeded("model", self.config.seed, *where):
            for batch, images, labels in mine:
                if len(images) == 0:
                    continue
                loss, right = self.loss(self.model, images, labels, f"batch {batch}")
                total = loss * len(images)
                self.scaler.scale(total).backward()
                for index, value in enumerate((float(total.detach()), right, len(images))):
                    sums[index] += value
        sums = self.processes.sum_gradients(self.model.parameters(), sums)
        self.processes.average_buffers(self.model)
        self._check_loss(sums[0], number)
        self.lr = learning_rate(self.config, number, self.steps, self.epochs)
        if sums[2]:
            self._update(sums[2])
        self.sums = [a + b for a, b in zip(self.sums, sums[:3])] + [self.sums[3]]
        return bool(sums[3])

    def _update(self, images: float) -> None:
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(images)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)

    def _end_epoch(self, validation: Feed | None, began: float) -> EpochRecord:
        loss, right, images, _ = self.sums
        if images == 0:
            raise DataError(f"epoch {self.epoch + 1} had no images")
        scored = None
        if validation is not None:
            scored = evaluate_feed(
                self.ema.model if self.ema else self.model, validation, self.processes
            )
        seconds = time.perf_counter() - began
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0] * 4
        record = EpochRecord(self.epoch, self.lr, loss / images, right / images, seconds, scored)
        self.history.append(record)
        return record

    def _check_loss(self, loss: float, number: int) -> None:
        if not abs(loss) < float("inf"):
            kept = f" The checkpoint in {self.folder} is of an earlier step." if self.folder else ""
            raise TrainingError(
                f"the loss is {loss} in step {number + 1} (epoch {self.epoch + 1}); lower the "
                f"learning rate (peak {self.config.lr:g}), clip the gradient, or check the data's "
                f"mean and std.{kept}"
            )

    def _logs(self, done: int) -> Logs:
        return Logs(self.config.log_dir if self.processes.main else None, done)

    def save(self) -> None:
        """Write the state of the run, in the main process."""
        folder = self.folder
        if folder is None:
            return
        self.processes.main_first(lambda: state.write(folder, *self._packed()))

    def _packed(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        optimizer, plain = state.pack_optimizer(self.optimizer)
        parts = {"model": self.model.state_dict(), "optimizer": optimizer}
        if self.ema is not None:
            parts["average"] = self.ema.model.state_dict()
        tensors = {
            f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()
        }
        facts = {
            "identity": self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.lr,
            "sums": self.sums,
            "history": [asdict(record) for record in self.history],
            "optimizer": plain,
            "scaler": self.scaler.state_dict(),
            "averaged": self.ema.updates if self.ema else 0,
        }
        return tensors, facts

    def _restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
        for name, tensor in tensors.items():
            part, _, inner = name.partition(".")
            parts[part][inner] = tensor
        self.model.load_state_dict(parts["model"])
        state.unpack_optimizer(self.optimizer, parts["optimizer"], facts["optimizer"])
        if self.ema is not None:
            self.ema.model.load_state_dict(parts["average"])
            self.ema.updates = facts["averaged"]
        self.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.step, self.lr = facts["epoch"], facts["step"], facts["lr"]
        self.sums = facts["sums"]
        self.history = [_record(saved) for saved in facts["history"]]


def _record(saved: dict[str, Any]) -> EpochRecord:
    scored = saved.pop("validation")
    return EpochRecord(**saved, validation=Evaluation(**scored) if scored else None)


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


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
