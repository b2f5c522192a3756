"""A recipe as frozen data: what is cut in which order, and how long is trained after each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from thinet.errors import OptionError
from thinet.plan import Replacement


@dataclass(frozen=True)
class Tuning:
    """Fine-tuning after a step: SGD whose rate is divided by ten at each milestone.

    Attributes:
        epochs: passes over the training data, at least 1.
        lr: learning rate of the first epoch.
        milestones: epochs after which the rate falls, increasing, below `epochs`.
    """

    epochs: int
    lr: float
    milestones: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        rising = all(a < b for a, b in zip((0, *self.milestones), (*self.milestones, self.epochs)))
        if not isinstance(self.epochs, int) or self.epochs < 1 or not self.lr > 0 or not rising:
            raise OptionError(
                "fine-tuning of a step needs at least one epoch, a rate above zero and increasing "
                f"milestones below the number of epochs; got {self}"
            )

    def scaled(self, epochs: float = 1.0, lr: float = 1.0) -> Tuning:
        """The same with so many times the epochs (whole ones, at least 1) and the rate."""
        if not epochs > 0 or not lr > 0:
            raise OptionError(f"a schedule is scaled by factors above zero, got {epochs} and {lr}")
        length = max(1, round(self.epochs * epochs))
        falls = sorted({round(m * epochs) for m in self.milestones})
        return Tuning(length, self.lr * lr, tuple(m for m in falls if 0 < m < length))


@dataclass(frozen=True)
class Step:
    """What is done to the network between two trainings.

    Attributes:
        name: a module path, for people.
        keep: group name to the number of channels that stay.
        replaced: modules that are replaced before anything is cut in this step.
        tuning: the training after it.
    """

    name: str
    keep: Mapping[str, int]
    tuning: Tuning
    replaced: tuple[Replacement, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """The steps of a named strategy for one network, in order.

    Attributes:
        name: such as `vgg16-gap`.
        steps: at least one.
        source: where the strategy is from.
    """

    name: str
    steps: tuple[Step, ...]
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        names = [name for step in self.steps for name in step.keep]
        if not names and not self.replaced:
            raise OptionError(f"the recipe {self.name} does nothing")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise OptionError(f"the recipe {self.name} cuts the group {twice!r} in two steps")

    @property
    def keep(self) -> dict[str, int]:
        """What stays of every group that is cut in any step."""
        return {name: units for step in self.steps for name, units in step.keep.items()}

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """What is replaced in any step."""
        return tuple(replacement for step in self.steps for replacement in step.replaced)

    def scaled(self, epochs: float = 1.0, lr: float = 1.0) -> Recipe:
        """The same with so many times the epochs and the rate after each step."""
        steps = (replace(step, tuning=step.tuning.scaled(epochs, lr)) for step in self.steps)
        return replace(self, steps=tuple(steps))

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the record."""
        return {"name": self.name, "steps": [_plain(asdict(step)) for step in self.steps]}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value
