"""What a comparison of methods gave: a cell for each method, budget and seed, and their means."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from thinet.prune_options import Repair


@dataclass(frozen=True)
class Dense:
    """The network that is cut. Accuracies are fractions of 1, costs as `thinet.count` gives."""

    macs: int
    params: int
    top1: float
    top5: float
    loss: float
    images: int


@dataclass(frozen=True)
class Cell:
    """One criterion with one repair, cut to one budget with one seed.

    Attributes:
        budget: such as `keep=0.5`.
        macs, params: of the smaller network, None if there is none.
        top1, top5, loss: with no training after the cut.
        top1_tuned, top5_tuned, loss_tuned: after fine-tuning, None if there was none.
        seconds: of cutting, fine-tuning and evaluating, interruptions not counted.
        notes: what the cut reported, such as groups that were chosen by another criterion.
        error: None, or why the cell could not be finished.
    """

    criterion: str
    repair: Repair
    budget: str
    seed: int
    macs: int | None = None
    params: int | None = None
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    top1_tuned: float | None = None
    top5_tuned: float | None = None
    loss_tuned: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells the cell from the others of its comparison."""
        return self.criterion, self.repair, self.budget, self.seed

    @property
    def name(self) -> str:
        """The key as people read it."""
        return f"{self.criterion}, {self.repair}, {self.budget}, seed {self.seed}"

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Cell:
        """The cell that `dataclasses.asdict` wrote; raises TypeError or KeyError for others."""
        named: dict[str, Any] = {field.name: data[field.name] for field in fields(Cell)}
        named["notes"] = tuple(named["notes"])
        return Cell(**named)


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean and sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Point:
    """One method at one budget, over its seeds.

    Attributes:
        seeds: that were finished; the numbers are over these.
        failed: seeds that were not.
        macs, params, seconds: means.
    """

    criterion: str
    repair: str
    budget: str
    seeds: int
    failed: int
    seconds: float
    macs: float | None = None
    params: float | None = None
    top1: Spread | None = None
    top5: Spread | None = None
    top1_tuned: Spread | None = None
    top5_tuned: Spread | None = None

    @property
    def method(self) -> str:
        """Criterion and repair."""
        return f"{self.criterion}, {self.repair}"


@dataclass(frozen=True)
class Comparison:
    """The dense network and all cells that were asked for, in the order of the plan.

    Attributes:
        others: how many more cells the folder holds, which were asked for earlier.
    """

    dense: Dense
    cells: tuple[Cell, ...]
    others: int = 0

    @property
    def points(self) -> tuple[Point, ...]:
        """Means over seeds, method by method, the budgets in the order they were given."""
        found: dict[tuple[str, ...], list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda c: self._methods.index((c.criterion, c.repair))):
            found.setdefault(cell.key[:3], []).append(cell)
        return tuple(_point(cells) for cells in found.values())

    @property
    def failed(self) -> tuple[Cell, ...]:
        """The cells that could not be finished."""
        return tuple(cell for cell in self.cells if cell.error is not None)

    @property
    def _methods(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((cell.criterion, cell.repair) for cell in self.cells))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the dense network, the cells, and their means as `points`."""
        return {**asdict(self), "points": [asdict(point) for point in self.points]}


def _point(cells: list[Cell]) -> Point:
    done = [cell for cell in cells if cell.error is None]
    first = cells[0]
    return Point(
        first.criterion, first.repair, first.budget, len(done), len(cells) - len(done),
        seconds=statistics.fmean(cell.seconds for cell in cells),
        macs=_mean(cell.macs for cell in done),
        params=_mean(cell.params for cell in done),
        top1=_spread(cell.top1 for cell in done),
        top5=_spread(cell.top5 for cell in done),
        top1_tuned=_spread(cell.top1_tuned for cell in done),
        top5_tuned=_spread(cell.top5_tuned for cell in done),
    )  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)
