"""The loop behind `thinet.iterate`: cut one step, train, keep the state, go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from thinet.budget import Budget
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.count import count
from thinet.errors import CalibrationError, CheckpointError, OptionError
from thinet.plan import Plan
from thinet.prune import prune
from thinet.recipes.apply import with_replaced
from thinet.recipes.recipe import Recipe, Step
from thinet.seeds import derive
from thinet.steps import Position, StepRecord, Store
from thinet.trace.analyse import analyse
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate
from thinet.train.feed import Feed
from thinet.train.finetune import EpochRecord, FinetuneResult, finetune
from thinet.train.identity import fingerprint, fingerprint_of
from thinet.train.lock import locked
from thinet.train.processes import current
from thinet.types import ExampleInputs, Progress, tensors_in


@dataclass(frozen=True)
class IterateResult:
    """The smaller model, the plan that makes it of the dense one, and what each step gave."""

    model: nn.Module
    plan: Plan
    recipe: Recipe
    steps: tuple[StepRecord, ...]


@dataclass
class Loop:
    """Everything that a run was given.

    Attributes:
            cutting: options of `thinet.prune` that decide what comes out.
        recalibrate: re-estimate BatchNorm statistics after each cut.
        distill: whether the training also learns from the dense model.
    """

    dense: nn.Module
    inputs: ExampleInputs
    batches: list[Any]
    recipe: Recipe
    train: Any
    validation: Any
    config: FinetuneConfig | None
    device: str | None
    distill: bool
    cutting: Mapping[str, Any]
    verify: bool
    recalibrate: bool
    on_step: Callable[[StepRecord], None] | None
    progress: Progress | None

    def __post_init__(self) -> None:
        self._training = self.config or FinetuneConfig()
        chosen, usual = self._training, FinetuneConfig()
        if (chosen.lr, chosen.schedule, chosen.gamma) != (usual.lr, usual.schedule, usual.gamma):
            raise OptionError(
                "the learning rates and their schedule are the recipe's; change them with scale, "
                "lr_scale or a recipe of your own, and leave lr, schedule and gamma of config out"
            )
        self._processes = current(self.device)

    def run(self, folder: Path, resume: bool) -> IterateResult:
        """All steps, from where the folder's run is."""
        identity = self._identity()
        self._check_alike(identity)
        self._store = Store(folder, identity)
        with ExitStack() as held:
            self._processes.main_first(lambda: held.enter_context(locked(folder)))
            return self._steps(resume)

    def _steps(self, resume: bool) -> IterateResult:
        position = self._opened(resume)
        model, plan = self._store.model(position, self.dense), self._store.plan(position)
        work = _Work(self)
        for number in range(1, len(self.recipe.steps) + 1):
            if number > position.step:
                work.tell(number, None)
                position, model, plan = self._cut(position, model, plan, number)
            if number == position.step and position.phase == "cut":
                position, model = self._train(position, model, plan, work)
        self._processes.wait()  # until all have read what the main process may now remove
        return IterateResult(model, plan, self.recipe, position.records)

    def _check_alike(self, identity: Mapping[str, Any]) -> None:
        """Several processes are one run only if all were given the same."""
        alike = self._processes.agree
        different = ["training data"] if not alike(repr(list(identity))) else []
        different = different or [n for n, fact in identity.items() if not alike(json.dumps(fact))]
        if different:
            raise OptionError(
                f"the {self._processes.world} processes were not given the same: "
                f"{', '.join(different)}. Seed what is random before the model is made and the "
                "calibration images are drawn, alike in all processes"
            )

    def _opened(self, resume: bool) -> Position:
        """Where the folder's run is: the main process looks first, and clears what is old."""
        found: list[Position] = []
        self._processes.main_first(lambda: found.append(self._store.open(resume=resume)))
        return found[0] if self._processes.world == 1 else self._as_written()

    def _committed(self, position: Position) -> Position:
        """A position whose model was written, as the run's state, alike in all processes."""
        self._processes.main_first(lambda: self._store.commit(position))
        return position if self._processes.world == 1 else self._as_written()

    def _as_written(self) -> Position:
        position = self._store.open(resume=True)
        if not self._processes.agree(repr(position)):
            raise CheckpointError(
                f"{self._store.folder} must be a folder that all processes can read"
            )
        return position

    def _identity(self) -> dict[str, Any]:
        """What decides the run's weights, as facts that can be told apart one by one."""
        recipe = self.recipe
        facts: dict[str, Any] = {
            "recipe": recipe.name,
            "order": [step.name for step in recipe.steps],
            "channels kept": recipe.keep,
            "replaced": {r.module: [r.builder, dict(r.options)] for r in recipe.replaced},
            "option": {**self.cutting, "recalibrate": self.recalibrate},
            "model": fingerprint(self.dense),
            "calibration": _digest(self.batches),
            "training data": None,
            "validation data": None,
        }
        if self.validation is not None:
            facts["validation data"] = Feed(self.validation, seed=0, rank=0, world=1).describe()
        if self.train is not None:
            options = asdict(self._training)
            del options["log_dir"]
            data = Feed(self.train, seed=self._training.seed, rank=0, world=1)
            facts |= {
                "epochs": {step.name: step.tuning.epochs for step in recipe.steps},
                "learning rate": {
                    step.name: [step.tuning.lr, *step.tuning.milestones] for step in recipe.steps
                },
                "training": {**options, "distill": self.distill},
                "training data": data.describe(),
                "processes": self._processes.world,
            }
        return facts

    def _cut(
        self, position: Position, model: nn.Module, plan: Plan, number: int
    ) -> tuple[Position, nn.Module, Plan]:
        """The network as it is now, cut by one step, on the disk.

        The main process chooses and cuts, the others read what it wrote: no two of them can choose
        differently, however their arithmetic rounds.
        """
        began = time.perf_counter()
        position = Position(number, "cut", position.records)

        def work() -> None:
            self._store.put_model(position, *self._smaller(model, plan, number))

        self._processes.main_first(work)
        small = self._store.model(position, self.dense)
        pending = {"top1_cut": self._top1(small), "seconds": time.perf_counter() - began}
        plan = self._store.plan(position)
        return self._committed(replace(position, pending=pending)), small, plan

    def _smaller(self, model: nn.Module, plan: Plan, number: int) -> tuple[nn.Module, Plan]:
        step = self.recipe.steps[number - 1]
        small = with_replaced(model, step.replaced, self.batches, self.inputs)
        plan = plan.then(Plan(replaced=step.replaced))
        if step.keep:
            result = prune(
                small, self.inputs, self.batches, budget=Budget(keep=dict(step.keep)),
                verify=self.verify, progress=self.progress, **self.cutting,
            )  # fmt: skip
            small, plan = result.model, plan.then(result.plan)
        if self.recalibrate:
            small = recalibrate_bn(small, self.batches, example_inputs=self.inputs)
        kept = {name: len(units) for name, units in plan.keep.items()}
        asked = {"recipe": self.recipe.name, "budget": {"keep": kept}}
        return small, replace(plan, settings={**plan.settings, **asked})

    def _train(
        self, position: Position, model: nn.Module, plan: Plan, work: _Work
    ) -> tuple[Position, nn.Module]:
        """The cut network, fine-tuned as the step says, on the disk."""
        number = position.step
        step = self.recipe.steps[number - 1]
        assert position.pending is not None
        seconds: float = position.pending["seconds"]
        top1 = top1_cut = position.pending["top1_cut"]
        if self.train is not None:
            tuned = self._tuned(model, step, number, work)
            model = tuned.model
            seconds += sum(epoch.seconds for epoch in tuned.history)
            last = tuned.history[-1].validation
            top1 = last.top1 if last is not None else None
        counts = count(model, self.inputs)
        past = sum(record.seconds for record in position.records) + seconds
        record = StepRecord(
            number=number, steps=len(self.recipe.steps), name=step.name, kept=dict(step.keep),
            macs=counts.macs, params=counts.params, top1_cut=top1_cut, top1=top1,
            epochs=step.tuning.epochs if self.train is not None else 0, seconds=seconds,
            seconds_left=work.left(number, past),
        )  # fmt: skip
        position = Position(number, "trained", (*position.records, record))
        trained = model
        self._processes.main_first(lambda: self._store.put_model(position, trained, plan))
        position = self._committed(position)
        model = self._store.model(position, self.dense)  # as a resumed run goes on
        work.tell(number, 1.0)
        if self.on_step is not None and self._processes.main:
            self.on_step(record)
        return position, model

    def _tuned(self, model: nn.Module, step: Step, number: int, work: _Work) -> FinetuneResult:
        tuning = step.tuning
        config = replace(
            self._training, lr=tuning.lr, schedule="step" if tuning.milestones else "constant",
            milestones=tuning.milestones, seed=derive("step", self._training.seed, number),
        )  # fmt: skip
        done = [0]

        def told(what: str, batch: int, total: int) -> None:
            work.tell(number, (done[0] + batch / total) / tuning.epochs)
            if self.progress is not None:
                self.progress(what, batch, total)

        def ended(epoch: EpochRecord) -> None:
            done[0] = epoch.epoch

        return finetune(
            model, self.train, epochs=tuning.epochs, config=config, validation=self.validation,
            teacher=self.dense if self.distill else None, device=self.device, on_epoch=ended,
            checkpoint=self._store.training_path(number), progress=told,
        )  # fmt: skip

    def _top1(self, model: nn.Module) -> float | None:
        if self.validation is None:
            return None
        return evaluate(model, self.validation, device=self.device, progress=self.progress).top1


class _Work:
    """The work of the whole plan: passes over data, each as long as its multiply-adds."""

    def __init__(self, run: Loop) -> None:
        self._told = run.progress if run._processes.main else None
        costs = analyse(run.dense, run.inputs).costs
        batches = Feed(run.train, seed=0, rank=0, world=1).batches if run.train is not None else 0
        measuring = len(run.batches) / batches if batches else 1.0
        widths: dict[str, int] = {}
        self._cutting: list[float] = []
        self._training: list[float] = []
        for step in run.recipe.steps:
            self._cutting.append(measuring * costs.macs(widths))
            widths |= step.keep
            self._training.append(step.tuning.epochs * costs.macs(widths) if batches else 0.0)
        self._total = sum(self._cutting) + sum(self._training)

    def tell(self, number: int, share: float | None) -> None:
        """Say how far the plan is: `share` of the training of step `number`, None before it."""
        if self._told is not None:
            done = self._until(number - 1)
            if share is not None:
                done += self._cutting[number - 1] + share * self._training[number - 1]
            self._told("the whole plan", round(1000 * done / self._total), 1000)

    def left(self, number: int, seconds: float) -> float:
        """Seconds that the steps after `number` will take, at the pace of those until it."""
        done = self._until(number)
        return seconds * (self._total - done) / done

    def _until(self, number: int) -> float:
        return sum(self._cutting[:number]) + sum(self._training[:number])


def _digest(batches: Sequence[Any]) -> str:
    tensors = tensors_in(batches)
    if not tensors:
        raise CalibrationError("the calibration data is empty; give at least one batch of images")
    return fingerprint_of({str(number): tensor for number, tensor in enumerate(tensors)})
