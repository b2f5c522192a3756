"""The training loop, and everything of it that has to survive being killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thinet.errors import CheckpointError, DataError, TrainingError
from thinet.observe import evaluating
from thinet.seeds import seeded
from thinet.train import state
from thinet.train.config import FinetuneConfig
from thinet.train.ema import Ema
from thinet.train.evaluate import Evaluation, evaluate_feed
from thinet.train.feed import Feed
from thinet.train.group_sparsity import TapGroups
from thinet.train.identity import differences
from thinet.train.interrupt import Interrupts
from thinet.train.lock import locked
from thinet.train.logs import Logs
from thinet.train.loss import Loss
from thinet.train.optimizer import copied
from thinet.train.outputs import logits_of, output_of
from thinet.train.processes import Processes
from thinet.train.schedule import learning_rate
from thinet.types import Progress
from thinet.whole_file import tidy


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


class Run:
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
        self.loss = Loss(config, teacher, processes.device)
        self.ema = Ema(self.model, config.ema_decay) if config.ema_decay is not None else None
        sparse, steps = config.group_sparsity, epochs * self.steps
        self.taps = TapGroups(self.model, sparse, steps) if sparse is not None else None
        self.scaler = torch.amp.GradScaler(
            processes.device.type, init_scale=2.0**10, enabled=config.mixed_precision == "fp16"
        )
        self.folder: Path | None = None
        self.held = ExitStack()
        self.epoch = self.step = 0
        self.lr = 0.0
        self.sums = [0.0, 0.0, 0.0, 0.0]  # loss, right, images, seconds of this epoch
        self.history: list[EpochRecord] = []
        self._last: torch.Tensor | None = None  # images of the last step

    def open(self, folder: Path, identity: Callable[[], dict[str, Any]], resume: bool) -> None:
        """Take up the run in the folder, or begin one there. The main process decides which.

        It holds the folder until `train` ends.
        """
        self.folder = folder
        goes_on = False

        def look() -> None:
            nonlocal goes_on
            self.identity = identity()
            held.enter_context(locked(folder))
            tidy(folder, state.NAME)
            goes_on = resume and self._may_go_on(folder)

        with ExitStack() as held:
            self.processes.main_first(look)
            if self.processes.told(int(goes_on)):
                self._take_up(folder)
            else:
                self.save()
            self.held = held.pop_all()

    def _take_up(self, folder: Path) -> None:
        saved = state.read(folder)
        if saved is None:
            raise CheckpointError(f"{folder} must be a folder that all processes can read")
        self._restore(*saved)

    def _may_go_on(self, folder: Path) -> bool:
        saved = state.read(folder)
        if saved is None:
            return False
        different = differences(saved[1]["identity"], self.identity)
        if different:
            raise CheckpointError(
                f"{folder} holds a training run that was started differently: "
                f"{'; '.join(different)}. Give what it was started with, another folder, or "
                "resume=False to start over"
            )
        return True

    def train(
        self,
        validation: Feed | None,
        save_every: int,
        on_epoch: Callable[[EpochRecord], None] | None,
        progress: Progress | None,
    ) -> None:
        done = self.epoch * self.steps + self.step
        with (
            self.held,
            Interrupts(enabled=self.folder is not None) as interrupts,
            self._logs(done) as logs,
        ):
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
                    if stopping or (self.step % save_every == 0 and self.step < self.steps):
                        self._check_weights()
                        self.save()
                    if stopping:
                        raise KeyboardInterrupt
                self._check_weights()
                self._check_answers()
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
                self._last = images
                total = loss * len(images)
                self.scaler.scale(total).backward()
                for index, value in enumerate((float(total.detach()), right, len(images))):
                    sums[index] += value
        sums = self.processes.sum_gradients(self.model.parameters(), sums)
        self.processes.average_buffers(self.model)
        self._check_loss(sums[0], number)
        self.lr = learning_rate(self.config, number, self.steps, self.epochs)
        if sums[2]:
            self._update(sums[2], number)
        self.sums = [a + b for a, b in zip(self.sums, sums[:3])] + [self.sums[3]]
        return bool(sums[3])

    def _update(self, images: float, number: int) -> None:
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(images)
        if self.taps is not None:
            self.taps.pull()
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.taps is not None:
            self.taps.fix(number)
        if self.ema is not None:
            self.ema.update(self.model)
            if self.taps is not None:
                self.taps.hold(self.ema.model)

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
            raise TrainingError(
                f"the loss is {loss} in step {number + 1} (epoch {self.epoch + 1}); lower the "
                f"learning rate (peak {self.config.lr:g}), clip the gradient, or check the data's "
                f"mean and std.{self._what_is_kept()}"
            )

    def _check_weights(self) -> None:
        """A finite loss may have had gradients that are not."""
        trained = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        bad = next((name for name, p in trained if not bool(p.isfinite().all())), None)
        if bad is not None:
            raise TrainingError(
                f"{bad} is no longer finite after step {self.step} of epoch {self.epoch + 1}; "
                f"lower the learning rate (peak {self.config.lr:g}) or clip the gradient."
                + self._what_is_kept()
            )

    def _check_answers(self) -> None:
        """The last update of an epoch may be what destroys a network: no loss is asked after it."""
        if self._last is None or self.epoch + 1 < self.epochs:
            return
        with evaluating(self.model), torch.no_grad():
            images = self._last.to(self.processes.device)
            logits = logits_of(output_of(self.model, images, "the last batch"))
        if not bool(logits.isfinite().all()):
            raise TrainingError(
                f"after its last step, {self.steps} of epoch {self.epoch + 1}, the network no "
                f"longer gives finite logits; lower the learning rate (peak {self.config.lr:g}) or "
                f"clip the gradient.{self._what_is_kept()}"
            )

    def _what_is_kept(self) -> str:
        return f" The checkpoint in {self.folder} is of an earlier step." if self.folder else ""

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
        parts = {"model": state.pack_model(self.model), "optimizer": optimizer}
        if self.ema is not None:
            parts["average"] = state.pack_model(self.ema.model)
        if self.taps is not None:
            parts["taps"] = self.taps.stays
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
        names = ("model", "optimizer", "average", "taps")
        parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
        for name, tensor in tensors.items():
            part, _, inner = name.partition(".")
            parts[part][inner] = tensor
        state.unpack_model(self.model, parts["model"])
        state.unpack_optimizer(self.optimizer, parts["optimizer"], facts["optimizer"])
        if self.ema is not None:
            state.unpack_model(self.ema.model, parts["average"])
            self.ema.updates = facts["averaged"]
        if self.taps is not None:
            self.taps.restore(parts["taps"])
        self.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.step, self.lr = facts["epoch"], facts["step"], facts["lr"]
        self.sums = facts["sums"]
        self.history = [_record(saved) for saved in facts["history"]]


def _record(saved: dict[str, Any]) -> EpochRecord:
    scored = saved.pop("validation")
    return EpochRecord(**saved, validation=Evaluation(**scored) if scored else None)
