"""The paper's loop: cut a layer or a block, fine-tune, go on with the next (ThiNet, 3.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from thinet.budget import Budget
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.count import count
from thinet.errors import CalibrationError, OptionError
from thinet.plan import Plan
from thinet.prune import Repair, Sampling, prune
from thinet.recipes import group_by_group, resolve
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
from thinet.train.processes import Processes, current
from thinet.types import ExampleInputs, Progress


@dataclass(frozen=True)
class IterateResult:
    """The smaller model, the plan that makes it of the dense one, and what each step gave."""

    model: nn.Module
    plan: Plan
    recipe: Recipe
    steps: tuple[StepRecord, ...]


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
        OptionError: options that contradict each other or are out of range.
        RecipeError: no such recipe, or not for this model.
        CheckpointError: the folder cannot be written, or holds a run with other arguments (which).
        As `thinet.prune` and `thinet.finetune`.
    """
    config = config or FinetuneConfig()
    _check(recipe, keep, budget, only, skip, train, config, distill)
    batches = list(calibration)
    if budget is not None:
        steps = group_by_group(model, example_inputs, budget, only=only, skip=skip)
    else:
        steps = resolve(recipe or "", model, example_inputs, keep=keep)
    steps = _scaled(steps, scale, lr_scale)
    processes = current(device)
    options = {
        "criterion": criterion, "repair": repair, "recalibrate": recalibrate,
        "sampling": sampling, "seed": seed, "distill": distill, "training": _options(config),
    }  # fmt: skip
    identity = {
        **_recipe_facts(steps, trained=train is not None),
        "option": options,
        "processes": processes.world,
        "model": fingerprint(model),
        "calibration": _digest(batches),
        "training data": Feed(train, seed=seed, rank=0, world=1).describe() if train else None,
    }
    run = _Run(
        dense=model, inputs=example_inputs, batches=batches, recipe=steps, train=train,
        validation=validation, config=config, device=device, processes=processes,
        store=Store(Path(state_dir), identity), on_step=on_step, progress=progress,
        teacher=model if distill else None,
        cutting={"criterion": criterion, "repair": repair, "sampling": sampling,
                 "verify": verify, "seed": seed},
        recalibrate=recalibrate,
    )  # fmt: skip
    return run.run(resume)


@dataclass
class _Run:
    dense: nn.Module
    inputs: ExampleInputs
    batches: list[Any]
    recipe: Recipe
    train: Any
    validation: Any
    config: FinetuneConfig
    device: str | None
    processes: Processes
    store: Store
    on_step: Callable[[StepRecord], None] | None
    progress: Progress | None
    teacher: nn.Module | None
    cutting: Mapping[str, Any]
    recalibrate: bool

    def run(self, resume: bool) -> IterateResult:
        position = self.store.open(resume=resume)
        model, plan = self.store.model(position, self.dense), self.store.plan(position)
        work = _Work(self)
        for number in range(1, len(self.recipe.steps) + 1):
            if number > position.step:
                work.tell(number, None)
                position, model, plan = self._cut(position, model, plan, number)
            if number == position.step and position.phase == "cut":
                position, model = self._train(position, model, plan, work)
        return IterateResult(model, plan, self.recipe, position.records)

    def _cut(
        self, position: Position, model: nn.Module, plan: Plan, number: int
    ) -> tuple[Position, nn.Module, Plan]:
        """The network as it is now, cut by one step, on the disk."""
        began = time.perf_counter()
        step = self.recipe.steps[number - 1]
        small = with_replaced(model, step.replaced, self.batches)
        plan = plan.then(Plan(replaced=step.replaced))
        if step.keep:
            result = prune(
                small, self.inputs, self.batches, budget=Budget(keep=dict(step.keep)),
                progress=self.progress, **self.cutting,
            )  # fmt: skip
            small, plan = result.model, plan.then(result.plan)
        if self.recalibrate:
            small = recalibrate_bn(small, self.batches)
        kept = {name: len(units) for name, units in plan.keep.items()}
        asked = {"recipe": self.recipe.name, "budget": {"keep": kept}}
        plan = replace(plan, settings={**plan.settings, **asked})
        top1 = self._top1(small)
        pending = {"top1_cut": top1, "seconds": time.perf_counter() - began}
        position = Position(number, "cut", position.records, pending)
        return position, self._keep(position, small, plan), plan

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
        model = self._keep(position, model, plan)
        work.tell(number, 1.0)
        if self.on_step is not None and self.processes.main:
            self.on_step(record)
        return position, model

    def _tuned(self, model: nn.Module, step: Step, number: int, work: _Work) -> FinetuneResult:
        tuning = step.tuning
        config = replace(
            self.config, lr=tuning.lr, schedule="step" if tuning.milestones else "constant",
            milestones=tuning.milestones, seed=derive("step", self.config.seed, number),
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
            teacher=self.teacher, checkpoint=self.store.training_path(number), on_epoch=ended,
            progress=told, device=self.device,
        )  # fmt: skip

    def _keep(self, position: Position, model: nn.Module, plan: Plan) -> nn.Module:
        """Write the state and go on from what was written, as a resumed run does."""
        self.processes.main_first(lambda: self.store.put(position, model, plan))
        return self.store.model(position, self.dense)

    def _top1(self, model: nn.Module) -> float | None:
        if self.validation is None:
            return None
        return evaluate(model, self.validation, device=self.device, progress=self.progress).top1


class _Work:
    """The work of the whole plan: passes over data, each as long as its multiply-adds."""

    def __init__(self, run: _Run) -> None:
        self._told = run.progress
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


def _check(
    recipe: str | Recipe | None,
    keep: float | None,
    budget: Budget | None,
    only: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
    train: Any,
    config: FinetuneConfig,
    distill: bool,
) -> None:
    if (recipe is None) == (budget is None):
        raise OptionError("give a recipe or a budget, one of the two")
    if recipe is not None and (only is not None or skip is not None):
        raise OptionError("a recipe names its groups; only and skip belong to a budget")
    if budget is not None and keep is not None:
        raise OptionError("keep changes a recipe; give a budget's own fraction in the budget")
    usual = FinetuneConfig()
    if (config.lr, config.schedule, config.gamma) != (usual.lr, usual.schedule, usual.gamma):
        raise OptionError(
            "the learning rates and their schedule are the recipe's; change them with scale, "
            "lr_scale or a recipe of your own, and leave lr, schedule and gamma of config out"
        )
    if train is None and distill:
        raise OptionError("distill learns while training; give train as well")


def _scaled(recipe: Recipe, epochs: float, lr: float) -> Recipe:
    steps = (replace(step, tuning=step.tuning.scaled(epochs, lr)) for step in recipe.steps)
    return replace(recipe, steps=tuple(steps))


def _recipe_facts(recipe: Recipe, *, trained: bool) -> dict[str, Any]:
    """The recipe as facts that can be told apart one by one."""
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "order": [step.name for step in recipe.steps],
        "channels kept": recipe.keep,
        "replaced": {r.module: [r.builder, dict(r.options)] for r in recipe.replaced},
    }
    if trained:
        facts["epochs"] = {step.name: step.tuning.epochs for step in recipe.steps}
        facts["learning rate"] = {
            step.name: [step.tuning.lr, *step.tuning.milestones] for step in recipe.steps
        }
    return facts


def _options(config: FinetuneConfig) -> dict[str, Any]:
    options = asdict(config)
    del options["log_dir"]
    return options


def _digest(batches: Sequence[Any]) -> str:
    tensors = [leaf for leaf in tree_flatten(batches)[0] if isinstance(leaf, Tensor)]
    if not tensors:
        raise CalibrationError("the calibration data is empty; give at least one batch of images")
    return fingerprint_of({str(number): tensor for number, tensor in enumerate(tensors)})
