"""The run behind `thinet.compare`: cell after cell, each written down before the next begins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from thinet.budget import Budget
from thinet.calibrate.batches import calibration_pairs, images_in
from thinet.cells import Cell, Comparison, Dense
from thinet.checkpoint import load, load_plan, save
from thinet.criteria import get
from thinet.errors import (
    BudgetError,
    CalibrationError,
    CheckpointError,
    ModelError,
    OptionError,
    RepairError,
    TrainingError,
    VerificationError,
)
from thinet.journal import Journal
from thinet.outcome import PruneResult
from thinet.prune import prune
from thinet.prune_options import PruneOptions, Repair
from thinet.seeds import derive
from thinet.selection import select_groups
from thinet.trace.analyse import analyse
from thinet.train.config import FinetuneConfig
from thinet.train.evaluate import evaluate
from thinet.train.feed import Feed
from thinet.train.finetune import EpochRecord, finetune
from thinet.train.identity import fingerprint, fingerprint_of
from thinet.train.lock import locked
from thinet.train.processes import current
from thinet.types import ExampleInputs, Progress

FAILURES = (
    BudgetError,
    CalibrationError,
    ModelError,
    RepairError,
    TrainingError,
    VerificationError,
    torch.OutOfMemoryError,
)
"""What one method can fail at while the others go on."""

OnCell = Callable[[Cell, int, int], None]
"""Called with a cell that was finished now, how many are finished, and how many there are."""


@dataclass(frozen=True)
class Training:
    """How each cell is fine-tuned; `data` gives the images for a seed."""

    data: Callable[[int], Any]
    epochs: int
    config: FinetuneConfig
    distill: bool


@dataclass(frozen=True)
class Drawn:
    """The data of one seed.

    Attributes:
        pairs: calibration batches with their targets.
        facts: what identifies the data, as JSON gives it back.
        labels: what identifies the targets, None if there are none.
        train: what to fine-tune on, None for no fine-tuning.
        share: of a cell's work that is cutting; a batch takes as long there as in training.
    """

    pairs: list[Any]
    facts: Mapping[str, Any]
    labels: str | None
    train: Any = None
    share: float = 1.0


@dataclass
class Grid:
    """Everything that a comparison was given.

    Attributes:
        calibration: batches of images for a seed.
        validation: labelled images to measure the accuracy on.
        budgets: by the names that their cells carry.
        cutting: options of `thinet.prune`, the same for all cells.
    """

    dense: nn.Module
    inputs: ExampleInputs
    calibration: Callable[[int], Iterable[Any]]
    validation: Any
    criteria: Sequence[str]
    repairs: Sequence[Repair]
    budgets: Mapping[str, Budget]
    seeds: Sequence[int]
    cutting: Mapping[str, Any]
    training: Training | None
    verify: bool
    device: str | None
    on_cell: OnCell | None
    progress: Progress | None
    loss_aware: bool = False

    def run(self, folder: Path, *, resume: bool, retry: bool) -> Comparison:
        """All cells, those in the folder as they were written."""
        if current(self.device).world > 1:
            raise OptionError("a comparison runs in one process; start it without accelerate")
        groups = {name: self.cutting[name] for name in ("normalised", "choices")}
        self._analysis = analyse(self.dense, self.inputs, **groups)
        select_groups(self._analysis.groups, self.cutting["only"], self.cutting["skip"])
        self._journal = Journal(folder, self._identity())
        with locked(folder):
            return self._all(resume=resume, retry=retry)

    def _all(self, *, resume: bool, retry: bool) -> Comparison:
        facts, lines = self._journal.open(resume=resume)
        if facts is None:
            facts = asdict(self._measured())
            self._journal.begin(facts)
        done = self._written(lines)
        finished = {key: cell for key, (cell, _) in done.items() if not (retry and cell.error)}
        plan = list(self._plan())
        keys = {cell.key for cell in plan}
        for seed in self.seeds:
            drawn = self._drawn(seed)
            for cell, saved in done.values():
                if cell.seed == seed:
                    self._check(cell, saved, drawn, asked=cell.key in keys)
            for blank in (cell for cell in plan if cell.seed == seed):
                if blank.key in finished:
                    continue
                self._tell(finished, plan, 0.0)

                def tell(share: float) -> None:
                    self._tell(finished, plan, share)

                cell = self._cell(blank, drawn, tell)
                self._journal.add({**asdict(cell), "data": self._read_by(cell, drawn)})
                finished[cell.key] = cell
                if self.on_cell is not None:
                    left = sum(one.key not in finished for one in plan)
                    self.on_cell(cell, len(plan) - left, len(plan))
        self._tell(finished, plan, 0.0)
        cells = tuple(finished[cell.key] for cell in plan)
        return Comparison(Dense(**facts), cells, others=len(done.keys() - keys))

    def _plan(self) -> Iterator[Cell]:
        """The cells to come, seed by seed: each seed's calibration images are read once."""
        for seed in self.seeds:
            for criterion in self.criteria:
                for repair in self.repairs:
                    for budget in self.budgets:
                        yield Cell(criterion, repair, budget, seed)

    def _identity(self) -> dict[str, Any]:
        """What decides the numbers of a cell, beside the cell's key and what its seed draws.

        Criteria, repairs, budgets and seeds are not in it: more of them may be asked for later.
        """
        facts: dict[str, Any] = {
            "model": fingerprint(self.dense),
            "evaluation data": Feed(self.validation, seed=0, rank=0, world=1).describe(),
            "option": dict(self.cutting),
            "training": None,
        }
        if self.loss_aware:  # comparisons of before there was a choice are without
            facts["option"]["loss_aware"] = True
        if self.training is not None:
            options = asdict(self.training.config)
            del options["log_dir"]
            facts["training"] = {
                **options, "epochs": self.training.epochs, "distill": self.training.distill
            }  # fmt: skip
        return facts

    def _measured(self) -> Dense:
        score = evaluate(self.dense, self.validation, device=self.device, progress=self.progress)
        costs = self._analysis.costs
        return Dense(costs.macs({}), costs.params({}), **asdict(score))

    def _drawn(self, seed: int) -> Drawn:
        device = next(self.dense.parameters(), torch.empty(0)).device
        pairs = calibration_pairs(self.calibration(seed), device=device, like=self.inputs)
        leaves = tree_flatten([inputs for inputs, _ in pairs])[0]
        images = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        targets = {str(i): t for i, (_, t) in enumerate(pairs) if t is not None}
        labels = fingerprint_of(targets) if targets else None
        facts: dict[str, Any] = {
            "calibration images": sum(images_in(inputs) for inputs, _ in pairs),
            "calibration": fingerprint_of(images),
            "training data": None,
        }
        if self.training is None:
            return Drawn(pairs, facts, labels)
        train = self.training.data(seed)
        feed = Feed(train, seed=seed, rank=0, world=1)
        facts["training data"] = json.loads(json.dumps(feed.describe()))
        share = len(pairs) / (len(pairs) + self.training.epochs * feed.batches)
        return Drawn(pairs, facts, labels, train, share)

    def _check(self, cell: Cell, saved: Mapping[str, Any], drawn: Drawn, *, asked: bool) -> None:
        """Refuse to go on beside a cell that was made of other data."""
        given = self._read_by(cell, drawn) if asked else dict(drawn.facts)
        known = {name: saved.get(name) for name in given}
        if "calibration images" not in saved:  # a line of before they were counted
            known["calibration images"] = given["calibration images"]
        self._journal.check(known, given)

    def _hears_the_loss(self, cell: Cell) -> bool:
        options = PruneOptions(criterion=cell.criterion, **self.cutting)
        return self.loss_aware and options.can_hear_the_loss(self.budgets[cell.budget])

    def _read_by(self, cell: Cell, drawn: Drawn) -> dict[str, Any]:
        """What identifies all the data that a cell depends on."""
        asks = get(cell.criterion).reads_labels
        labels = drawn.labels if asks or self._hears_the_loss(cell) else None
        return {**drawn.facts, "calibration labels": labels}

    def _written(
        self, lines: Sequence[Mapping[str, Any]]
    ) -> dict[tuple[str, str, str, int], tuple[Cell, dict[str, Any]]]:
        """The cells of the journal with their data, a later line in place of an earlier one."""
        try:
            found = [(Cell.from_dict(line), dict(line["data"])) for line in lines]
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the lines in {self._journal.folder} are not those of thinet.compare ({error!r}); "
                "give another folder, or resume=False to start over"
            ) from error
        return {cell.key: (cell, saved) for cell, saved in found}

    def _cell(self, cell: Cell, drawn: Drawn, tell: Callable[[float], None]) -> Cell:
        """A cell with its numbers, or with the reason why it has none."""
        began = time.perf_counter()
        try:
            if self.training is None:
                return self._cut(cell, drawn)[0]
            cell, small = self._kept_cut(cell, drawn)
            tell(drawn.share)
            began = time.perf_counter()
            return self._tuned(cell, small, self.training, drawn, tell)
        except FAILURES as error:
            seconds = cell.seconds + time.perf_counter() - began
            reason = str(error).strip() or "no reason given"
            return replace(cell, seconds=seconds, error=f"{type(error).__name__}: {reason}")

    def _cut(self, cell: Cell, drawn: Drawn) -> tuple[Cell, PruneResult]:
        began = time.perf_counter()
        result = prune(
            self.dense, self.inputs, drawn.pairs, budget=self.budgets[cell.budget],
            criterion=cell.criterion, repair=cell.repair, seed=cell.seed,
            loss_aware=self._hears_the_loss(cell), analysis=self._analysis, verify=self.verify,
            progress=self.progress, **self.cutting,
        )  # fmt: skip
        score = evaluate(result.model, self.validation, device=self.device, progress=self.progress)
        cell = replace(
            cell, macs=result.report.macs_after, params=result.report.params_after,
            top1=score.top1, top5=score.top5, loss=score.loss, notes=result.report.notes,
            seconds=time.perf_counter() - began,
        )  # fmt: skip
        return cell, result

    def _kept_cut(self, cell: Cell, drawn: Drawn) -> tuple[Cell, nn.Module]:
        """The cut network as it lies on the disk, so that a killed training goes on from it."""
        path = self._journal.unfinished / "cut.safetensors"
        data = self._read_by(cell, drawn)
        if path.exists():
            kept = load_plan(path).settings
            if kept["data"] == data and Cell.from_dict(kept["cell"]).key == cell.key:
                return Cell.from_dict(kept["cell"]), load(path, self.dense)
        self._journal.clear()
        cell, result = self._cut(cell, drawn)
        path.parent.mkdir(exist_ok=True)
        settings = {**result.plan.settings, "cell": asdict(cell), "data": data}
        save(path, result.model, replace(result.plan, settings=settings))
        return cell, load(path, self.dense)

    def _tuned(
        self,
        cell: Cell,
        small: nn.Module,
        training: Training,
        drawn: Drawn,
        tell: Callable[[float], None],
    ) -> Cell:
        done = [0]

        def told(what: str, batch: int, total: int) -> None:
            tell(drawn.share + (1 - drawn.share) * (done[0] + batch / total) / training.epochs)
            if self.progress is not None:
                self.progress(what, batch, total)

        def ended(epoch: EpochRecord) -> None:
            done[0] = epoch.epoch

        seed = derive("compare", training.config.seed, cell.seed)
        tuned = finetune(
            small, drawn.train, epochs=training.epochs, config=replace(training.config, seed=seed),
            teacher=self.dense if training.distill else None, device=self.device, on_epoch=ended,
            checkpoint=self._journal.unfinished / "training", progress=told,
        )  # fmt: skip
        began = time.perf_counter()
        score = evaluate(tuned.model, self.validation, device=self.device, progress=self.progress)
        seconds = sum(epoch.seconds for epoch in tuned.history) + time.perf_counter() - began
        return replace(
            cell, top1_tuned=score.top1, top5_tuned=score.top5, loss_tuned=score.loss,
            seconds=cell.seconds + seconds,
        )  # fmt: skip

    def _tell(self, finished: Mapping[Any, Cell], plan: Sequence[Cell], share: float) -> None:
        if self.progress is not None:
            done = sum(cell.key in finished for cell in plan) + share
            self.progress("the whole plan", round(1000 * done), 1000 * len(plan))
