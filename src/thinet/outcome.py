"""What `prune` gives back, and how the reports of several rounds become one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from thinet.criteria.base import Order
from thinet.plan import Plan
from thinet.refine import Refined
from thinet.types import ChannelGroup

NOTHING = "nothing was cut: every group keeps all of its channels"


@dataclass(frozen=True)
class GroupReport:
    """What became of one group.

    Attributes:
        channels, kept: units before and after.
        locked: why it may not be cut.
        skipped: why it was left whole although it may be cut.
        error: what the criterion lost, as a fraction of the consumers' output energy (in
            nats where choosing is loss-aware), if it knows; added up over the rounds.
    """

    name: str
    channels: int
    kept: int
    locked: str | None = None
    skipped: str | None = None
    error: float | None = None
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """What was asked, what was reached, and how. Costs are for one batch of the example inputs.

    Attributes:
        refitted, not_refitted: layers; the latter with the reason.
        refined: for each pair of layers that was refitted together, its mean squared error before
            and after.
        not_refined: why other pairs were left as the repair of single layers made them.
    """

    criterion: str
    repair: str
    budget: str
    target: float
    reached: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    groups: tuple[GroupReport, ...]
    refitted: tuple[str, ...] = ()
    not_refitted: Mapping[str, str] = field(default_factory=dict)
    refined: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    not_refined: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneResult:
    """A smaller model, the plan that made it, and the report."""

    model: nn.Module
    plan: Plan
    report: PruneReport


def joined(first: PruneResult, last: PruneResult, target: float) -> PruneResult:
    """The result of a round on what an earlier one left, as of one.

    Args:
        target: the fraction of the dense network that was asked for.
    """
    was, now = first.report, last.report
    after, before = (
        (now.macs_after, was.macs_before)
        if now.budget == "macs"
        else (now.params_after, was.params_before)
    )
    earlier = {group.name: group for group in was.groups}
    report = replace(
        now,
        target=target,
        reached=after / max(before, 1),
        macs_before=was.macs_before,
        params_before=was.params_before,
        groups=tuple(_both(earlier[g.name], g) if g.name in earlier else g for g in now.groups),
        seconds={
            name: round(was.seconds.get(name, 0) + now.seconds.get(name, 0), 3)
            for name in dict.fromkeys((*was.seconds, *now.seconds))
        },
        notes=tuple(dict.fromkeys(_telling(was.notes, now.notes))),
    )
    plan = first.plan.then(last.plan)
    settings = {**last.plan.settings, "budget": {now.budget: target}}
    return PruneResult(last.model, replace(plan, settings=settings), report)


def _telling(was: Sequence[str], now: Sequence[str]) -> list[str]:
    """The notes of both rounds, but for that of one that cut nothing where the other did."""
    nowhere = NOTHING in was and NOTHING in now
    return [note for note in (*was, *now) if nowhere or note != NOTHING]


def _both(was: GroupReport, now: GroupReport) -> GroupReport:
    """A group over two rounds; one that the first left with a single channel was not cut again."""
    errors = [error for error in (was.error, now.error) if error is not None]
    return replace(
        now, channels=was.channels, skipped=was.skipped, error=sum(errors) if errors else None
    )


def refitted(result: PruneResult, refined: Refined, seconds: float) -> PruneResult:
    """After a joint refit of the result's model that took so many seconds."""
    report = result.report
    spent = {**report.seconds, "refining": report.seconds.get("refining", 0.0) + seconds}
    report = replace(report, refined=refined.errors, not_refined=refined.skipped, seconds=spent)
    return replace(result, report=report)


def with_notes(result: PruneResult, notes: Sequence[str]) -> PruneResult:
    """With more notes, each once."""
    every = tuple(dict.fromkeys((*result.report.notes, *notes)))
    return replace(result, report=replace(result.report, notes=every))


def group_report(
    group: ChannelGroup,
    chosen: Sequence[ChannelGroup],
    widths: Mapping[str, int],
    orders: Mapping[str, Order],
) -> GroupReport:
    kept = widths.get(group.name, group.channels)
    order = orders.get(group.name)
    error = None
    if order is not None and order.errors is not None:
        error = order.errors[group.channels - kept]
    free = group.locked is None
    return GroupReport(
        name=group.name,
        channels=group.channels,
        kept=kept,
        locked=group.locked,
        skipped="not chosen" if free and group not in chosen else None,
        error=error,
        producers=group.producers,
        consumers=group.consumers,
    )


def share(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> float:
    """Units that stay, of all units of these groups."""
    return sum(widths[g.name] for g in groups) / sum(g.channels for g in groups)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        """Seconds since the last one, kept under this name."""
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
        return self.laps[name]
