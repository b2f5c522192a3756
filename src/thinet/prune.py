"""The main verb: measure, choose, cut, repair."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import nn

from thinet.budget import Budget, check_reached, uniform_widths
from thinet.calibrate.batches import calibration_inputs
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.calibrate.collect import Observations, Rows, collect
from thinet.calibrate.statistics import group_statistics
from thinet.criteria import get
from thinet.criteria.base import Criterion, Order
from thinet.cut import apply_to_copy
from thinet.errors import LockedGroupError, OptionError, UnknownGroupError
from thinet.plan import Plan
from thinet.repair import Repaired, RepairSettings, repair_full, repair_scale
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.trace.planning import make_plan
from thinet.types import ChannelGroup, ExampleInputs, Progress
from thinet.verify import verify_cut

Repair = Literal["none", "scale", "full"]
Sampling = Literal["exact", "paper"]


@dataclass(frozen=True)
class GroupReport:
    """What became of one group.

    Attributes:
        channels, kept: units before and after.
        locked: why it may not be cut.
        skipped: why it was left whole although it may be cut.
        error: what the criterion lost, as a fraction of the consumers' output energy, if it knows.
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
    """What was asked, what was reached, and how. Costs are for one batch of the example inputs."""

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
    refitted: tuple[str, ...]
    not_refitted: Mapping[str, str]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneResult:
    """A smaller model, the plan that made it, and the report."""

    model: nn.Module
    plan: Plan
    report: PruneReport


def prune(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any],
    *,
    budget: Budget,
    criterion: str = "thinet",
    repair: Repair = "full",
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    recalibrate: bool = False,
    sampling: Sampling = "exact",
    rows: Rows | None = None,
    repair_settings: RepairSettings | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneResult:
    """Make a smaller model in one shot, without any training.

    Args:
        model: the dense model; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        calibration: batches of unlabelled images: tensors, (tensor, target) pairs or dicts.
        budget: the fraction that stays, or what stays of each named group.
        criterion: how channels are chosen, a name of `thinet.criteria`.
        repair: "none", "scale" (the paper: one scalar for each kept channel) or "full" (new weights
            for every layer behind the first cut, towards the dense network's outputs).
        only, skip: glob patterns on group names; by default all groups that may be cut.
        recalibrate: re-estimate BatchNorm statistics at the end.
        sampling: "exact" or "paper" (10 single outputs of each image).
        rows: how many output positions of each layer are looked at.
        verify: see that the cut, before the repair, computes what the silenced original computes.
        seed: of the sampled positions and random choices.

    Raises:
        BudgetError: the budget cannot be met; says the nearest that can.
        CalibrationError: the data is empty, not finite, or does not fit the model.
        OptionError: an unknown criterion or option.
        UnknownGroupError: a pattern that matches no group.
        LockedGroupError: no group may be cut; says why for each.
        RepairError, VerificationError: see `thinet.repair` and `thinet.cut`.
    """
    chosen = get(criterion)
    _check_option("repair", repair, get_args(Repair))
    _check_option("sampling", sampling, get_args(Sampling))
    clock = _Clock()
    device = next(iter(model.parameters()), torch.empty(0)).device
    batches = calibration_inputs(calibration, device=device)
    analysis = analyse(model, example_inputs)
    if budget.named is not None:
        only = _named_groups(analysis.groups, budget.named, only, skip)
    groups = select_groups(analysis.groups, only, skip)
    widths = uniform_widths(budget, groups, analysis.costs)
    _check_cost(budget, analysis, widths)
    clock.lap("groups")
    cut_groups = [g for g in groups if widths[g.name] < g.channels]
    seen = _observe(model, batches, analysis, cut_groups, chosen, repair, sampling, rows, seed, progress)
    clock.lap("measuring")
    orders, notes = _orders(model, cut_groups, chosen, seen, seed)
    keep = {name: order.keep(widths[name]) for name, order in orders.items()}
    clock.lap("choosing")
    plan = make_plan(analysis, model, keep)
    small = apply_to_copy(model, plan)
    if verify:
        verify_cut(model, small, example_inputs, analysis, keep)
    clock.lap("cutting")
    repaired = Repaired((), {})
    if repair == "full":
        repaired = repair_full(
            small, plan, seen, batches, settings=repair_settings, rows=rows, progress=progress
        )
    elif repair == "scale":
        repaired = repair_scale(small, model, cut_groups, plan, seen)
    if recalibrate:
        small = recalibrate_bn(small, batches)
    clock.lap("repairing")
    settings = {
        "criterion": criterion,
        "repair": repair,
        "budget": {budget.kind: dict(budget.named) if budget.named else budget.fraction},
        "sampling": sampling,
        "recalibrate": recalibrate,
        "seed": seed,
    }
    plan = Plan(plan.keep, plan.kept, plan.attributes, plan.replaced, settings)
    reached = {
        "macs": analysis.costs.macs(widths) / max(analysis.costs.macs({}), 1),
        "params": analysis.costs.params(widths) / max(analysis.costs.params({}), 1),
        "keep": _share(groups, widths) if budget.named else budget.fraction,
    }
    report = PruneReport(
        criterion=criterion,
        repair=repair,
        budget=budget.kind,
        target=_share(groups, widths) if budget.named else budget.fraction,
        reached=reached[budget.kind],
        macs_before=analysis.costs.macs({}),
        macs_after=analysis.costs.macs(widths),
        params_before=analysis.costs.params({}),
        params_after=analysis.costs.params(widths),
        groups=tuple(_group_report(g, groups, widths, orders) for g in analysis.groups),
        refitted=repaired.refitted,
        not_refitted=repaired.skipped,
        seconds=clock.laps,
        notes=notes,
    )
    return PruneResult(small, plan, report)


def select_groups(
    groups: Sequence[ChannelGroup],
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
) -> tuple[ChannelGroup, ...]:
    """The groups that may be cut and that the glob patterns choose.

    Raises:
        UnknownGroupError: a pattern matches no group.
        LockedGroupError: none of the chosen groups may be cut; says why for each.
    """
    chosen = [g for g in groups if only is None or _matches(g, _patterns(only))]
    for pattern in (*_patterns(only), *_patterns(skip)):
        if not any(_matches(g, (pattern,)) for g in groups):
            names = ", ".join(g.name for g in groups[:5])
            raise UnknownGroupError(
                f"the pattern {pattern!r} matches none of the {len(groups)} groups ({names}, ...); "
                "thinet inspect lists them all"
            )
    chosen = [g for g in chosen if not _matches(g, _patterns(skip))]
    free = tuple(g for g in chosen if g.locked is None and g.channels > 1)
    if not free:
        reasons = "".join(
            f"\n  {g.name}: {g.locked or 'it has a single channel'}" for g in chosen[:40]
        )
        raise LockedGroupError(
            "nothing can be cut" + (":" + reasons if reasons else "; no group is chosen")
        )
    return free


def _named_groups(
    groups: Sequence[ChannelGroup],
    named: Mapping[str, object],
    only: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
) -> list[str]:
    """The names of a budget that names its groups; errors as `select_groups` raises them."""
    if only is not None or skip is not None:
        raise OptionError("this budget names its groups; leave only and skip out")
    known = {group.name: group for group in groups}
    for name in named:
        if name not in known:
            raise UnknownGroupError(
                f"the budget names the group {name!r}, which is none of the {len(known)} groups; "
                "thinet inspect lists them all"
            )
        if known[name].locked is not None:
            raise LockedGroupError(f"group {name!r} may not be cut: {known[name].locked}")
    return list(named)


def _share(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> float:
    """Units that stay, of all units of these groups."""
    return sum(widths[g.name] for g in groups) / sum(g.channels for g in groups)


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(group: ChannelGroup, patterns: Sequence[str]) -> bool:
    """By the group's name, with or without the number of a second group of one producer."""
    names = (group.name, group.name.partition(":")[0])
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_option(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError(f"unknown {name} {value!r}; choose one of {', '.join(allowed)}")


def _check_cost(budget: Budget, analysis: Analysis, widths: Mapping[str, int]) -> None:
    if budget.kind != "keep":
        measure = analysis.costs.macs if budget.kind == "macs" else analysis.costs.params
        check_reached(budget, {budget.kind: measure(widths) / max(measure({}), 1)})


def _observe(
    model: nn.Module,
    batches: Sequence[ExampleInputs],
    analysis: Analysis,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    repair: Repair,
    sampling: Sampling,
    rows: Rows | None,
    seed: int,
    progress: Progress | None,
) -> Observations:
    """Only what the criterion and the repair need is measured."""
    moments = criterion.needs & {"gram", "hessians"} or repair == "scale"
    zeros = "zeros" in criterion.needs
    return collect(
        model,
        batches,
        program=analysis.program,
        groups=groups if moments or zeros else (),
        targets=repair == "full",
        zeros=zeros,
        sampling=sampling,
        rows=rows,
        seed=seed,
        progress=progress,
    )


def _orders(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    seen: Observations,
    seed: int,
) -> tuple[dict[str, Order], tuple[str, ...]]:
    """The order in which each group's units go; by weight sum where nothing could be measured."""
    orders: dict[str, Order] = {}
    notes: list[str] = []
    for group in groups:
        stats = group_statistics(model, group, seen, seed=seed)
        missing = sorted(need for need in criterion.needs if not stats.has(need))
        if missing and stats.has("filters"):
            notes.append(
                f"{group.name}: its consumers could not be measured ({', '.join(missing)}), so its "
                "channels were chosen by weight sum"
            )
            orders[group.name] = get("weight-sum")(stats)
        else:
            orders[group.name] = criterion(stats)
    return orders, tuple(notes)


def _group_report(
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


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
