"""What a criterion is given, what it returns, and the table of all criteria."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from thinet.errors import CalibrationError, CriterionError, OptionError, ThinetError

Need = Literal[
    "gram", "systems", "hessians", "weights", "filters", "zeros", "taylor", "taylor_fo", "bn_scale"
]
"""What a criterion looks at; `weights` are the consumers' weights, `hessians` the second moments of
their inputs too, `systems` either these or what stands in for them (`Consumer.system`)."""


@dataclass(frozen=True)
class Consumer:
    """One module that mixes the group's channels.

    Attributes:
        weight: (N, C, *kernel), dense over groups.
        units: (C,) unit of each input channel, -1 for channels that are not of the group.
        second: (C * taps, C * taps) second moments or covariance of its input patches,
            channel-major (shrunk where the patches are few), or None where they were not collected.
        energy: energy of its output, by which its errors are divided.
        gains: (N,) factor of each output in the signal that goes on (a BatchNorm's scale), or None;
            `energy` is that signal's, which for a residual network is the stream's.
        parts: (units, units) second moments of what each unit adds to the output, about their
            means, where the input is too wide for `second`.
    """

    weight: Tensor
    units: Tensor
    second: Tensor | None = None
    energy: float = 1.0
    gains: Tensor | None = None
    parts: Tensor | None = None

    @property
    def system(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Second moments, weight and units of the least squares from which errors follow.

        Of a consumer too wide for second moments its `parts`, each with the weight one: the errors
        are those of one scalar for each unit, more than with all weights refitted. None where
        nothing was observed.
        """
        if self.second is not None:
            return self.second, self.signal_weight, self.units
        if self.parts is not None:
            count = len(self.parts)
            return self.parts, self.parts.new_ones(1, count), torch.arange(count)
        return None

    @property
    def signal_weight(self) -> Tensor:
        """The weight in units of the signal that goes on."""
        if self.gains is None:
            return self.weight
        shape = (-1, *[1] * (self.weight.ndim - 1))
        return self.weight * self.gains.to(self.weight).reshape(shape)

    @property
    def per_energy(self) -> float:
        """What this consumer's errors are multiplied with; 0 where its output is dead."""
        return 1 / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class GroupStatistics:
    """All that is known about one group; what a criterion does not need may be missing.

    Attributes:
        name: of the group.
        channels: number of units.
        gram: (units, units), the consumers' grams, each divided by its output energy, added up.
        consumers: the modules that mix these channels.
        filters: for each producer its weight as (units, fan); where no weight only produces, for
            each consumer.
        zeros: (units,) share of zeros after the activation, 0..1.
        taylor: (units,) mean over images of |mean over positions of gradient * activation|.
        taylor_fo: (units,) mean over batches of (sum of gradient * weight)^2.
        bn_scale: (units,) BatchNorm scale behind the producers.
        seed: of whatever is random.
    """

    name: str
    channels: int
    gram: Tensor | None = None
    consumers: tuple[Consumer, ...] = ()
    filters: tuple[Tensor, ...] = ()
    zeros: Tensor | None = None
    taylor: Tensor | None = None
    taylor_fo: Tensor | None = None
    bn_scale: Tensor | None = None
    seed: int = 0

    def has(self, need: Need) -> bool:
        """Whether these statistics were collected."""
        if need == "hessians":
            return bool(self.consumers) and all(c.second is not None for c in self.consumers)
        if need == "systems":
            return bool(self.consumers) and all(c.system is not None for c in self.consumers)
        if need == "weights":
            return bool(self.consumers)
        found = getattr(self, need)
        return found is not None and len(found) > 0


@dataclass(frozen=True)
class Order:
    """The order in which a group's units go, first to go first: one run serves every budget.

    Attributes:
        removed: all units, each once; the last one is the last to stay.
        errors: None, or `channels + 1` non-decreasing numbers: `errors[r]` is what the criterion
            loses when the first r units are gone, as a fraction of the consumers' output energy
            (in nats where choosing is loss-aware).
    """

    removed: tuple[int, ...]
    errors: tuple[float, ...] | None = None

    def keep(self, count: int) -> tuple[int, ...]:
        """The `count` units that stay longest, sorted.

        Raises:
            OptionError: count is outside 1..channels.
        """
        if not 1 <= count <= len(self.removed):
            raise OptionError(f"cannot keep {count} of {len(self.removed)} channels")
        return tuple(sorted(self.removed[len(self.removed) - count :]))


@dataclass(frozen=True)
class Criterion:
    """A named way to order a group's units; call it with the group's statistics."""

    name: str
    needs: frozenset[Need]
    choose: Callable[[GroupStatistics], Order]

    @property
    def reads_labels(self) -> bool:
        """Whether it goes by gradients of the loss, and so by labels where there are some."""
        return not {"taylor", "taylor_fo"}.isdisjoint(self.needs)

    def __call__(self, stats: GroupStatistics) -> Order:
        """Order the units.

        Raises:
            CalibrationError: what it needs was not collected, or is not finite.
            CriterionError: the function behind it failed, or returned no order of the units.
        """
        missing = sorted(need for need in self.needs if not stats.has(need))
        if missing:
            raise CalibrationError(
                f"group {stats.name!r}: criterion {self.name!r} needs {', '.join(missing)}, which "
                "this group has not; choose another criterion or skip the group"
            )
        try:
            order = self.choose(stats)
        except (ThinetError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CriterionError(
                f"group {stats.name!r}: criterion {self.name!r} failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(order, Order):
            raise CriterionError(
                f"criterion {self.name!r} must return a thinet.criteria.Order; for group "
                f"{stats.name!r} it returned {type(order).__name__} (by_score makes one of scores)"
            )
        if sorted(order.removed) != list(range(stats.channels)):
            raise CriterionError(
                f"group {stats.name!r}: criterion {self.name!r} must order units "
                f"0..{stats.channels - 1}, each once; it returned {len(order.removed)} entries"
            )
        return order


_TABLE: dict[str, Criterion] = {}


def criterion(
    name: str, *, needs: Collection[Need] | Need
) -> Callable[[Callable[[GroupStatistics], Order]], Criterion]:
    """Add a function `GroupStatistics -> Order` to the table of criteria.

        @criterion("first", needs=())
        def first(stats):
            return Order(tuple(range(stats.channels)))

    Raises:
        OptionError: the name is taken, or a need is unknown.
    """
    wanted: set[Need] = {needs} if isinstance(needs, str) else set(needs)
    unknown = sorted(wanted - set(get_args(Need)))
    if unknown:
        raise OptionError(
            f"criterion {name!r} needs unknown statistics {', '.join(unknown)}; "
            f"there are {', '.join(get_args(Need))}"
        )
    if name in _TABLE:
        raise OptionError(f"criterion {name!r} exists already; choose another name")

    def register(choose: Callable[[GroupStatistics], Order]) -> Criterion:
        _TABLE[name] = Criterion(name, frozenset(wanted), choose)
        return _TABLE[name]

    return register


def criteria() -> tuple[str, ...]:
    """The names of all criteria."""
    return tuple(_TABLE)


def get(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        OptionError: there is none; the message names the nearest.
    """
    if isinstance(name, str) and name in _TABLE:
        return _TABLE[name]
    near = difflib.get_close_matches(str(name), _TABLE, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise OptionError(f"unknown criterion {name!r}; {hint or 'there are ' + ', '.join(_TABLE)}")


def by_score(stats: GroupStatistics, scores: Tensor) -> Order:
    """Remove the smallest score first; equal scores go by index.

    Args:
        scores: (units,).

    Raises:
        CalibrationError: a score is not finite, or there is not one for each unit.
    """
    scores = scores.detach().double()
    if scores.shape != (stats.channels,):
        raise CalibrationError(
            f"group {stats.name!r}: {tuple(scores.shape)} scores for {stats.channels} channels"
        )
    check_finite(stats, scores)
    return Order(tuple(torch.argsort(scores, stable=True).tolist()))


def check_finite(stats: GroupStatistics, *values: Tensor) -> None:
    """Raise a `CalibrationError` naming the group if a value is NaN or infinite."""
    if not all(bool(torch.isfinite(v).all()) for v in values):
        raise CalibrationError(
            f"group {stats.name!r}: its statistics hold NaN or infinite values; check the "
            "calibration images and the weights"
        )


def rising(errors: Tensor) -> tuple[float, ...]:
    """Errors from nothing removed on, as the running maximum."""
    start = errors.new_zeros(1)
    return tuple(torch.cat([start, errors]).cummax(0).values.tolist())
