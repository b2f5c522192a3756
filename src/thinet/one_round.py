"""One round of pruning: measure, choose, cut, repair."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from thinet.allocate import LATE, error_widths
from thinet.budget import Budget, check_reached, uniform_widths
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.calibrate.collect import Observations, collect
from thinet.calibrate.curvature import collect_curvature
from thinet.calibrate.gradients import Gradients, collect_gradients
from thinet.calibrate.statistics import group_statistics
from thinet.criteria import get
from thinet.criteria.base import Order
from thinet.criteria.curves import group_refit_errors
from thinet.cut import apply_to_copy
from thinet.dynamic import allocate_dynamic
from thinet.errors import CalibrationError
from thinet.latency_budget import latency_widths, time_share
from thinet.outcome import NOTHING, Clock, PruneReport, PruneResult, group_report, share
from thinet.prune_options import PruneOptions
from thinet.refine import Refined, refine
from thinet.repair import Repaired, repair_full, repair_scale
from thinet.store import Store
from thinet.trace.groups import Analysis, never_run
from thinet.trace.planning import check_left, make_plan
from thinet.types import ChannelGroup, ExampleInputs, Progress
from thinet.verify import verify_cut

Pairs = Sequence[tuple[ExampleInputs, Tensor | None]]


@dataclass(frozen=True)
class Task:
    """What is cut, how far, and how.

    Attributes:
        groups: those that may be cut.
        fixed: units of the groups whose widths are given.
        on_the_way: whether this is a step towards the budget that was asked for, which need not be
            met within 1 %.
    """

    model: nn.Module
    inputs: ExampleInputs
    analysis: Analysis
    groups: Sequence[ChannelGroup]
    fixed: Mapping[str, int]
    budget: Budget
    options: PruneOptions
    store: Store
    progress: Progress | None
    on_the_way: bool = False

    @property
    def by_error(self) -> bool:
        return self.options.by_error(self.budget)

    def reached(self, widths: Mapping[str, int]) -> dict[str, float]:
        """What stays at these widths, as fractions, but for the time that it takes."""
        costs = self.analysis.costs
        return {
            "macs": costs.macs(widths) / max(costs.macs({}), 1),
            "params": costs.params(widths) / max(costs.params({}), 1),
            "keep": share(self.groups, widths),
        }

    def share_of_time(self, widths: Mapping[str, int]) -> float:
        """Measured time of the network cut to these widths, of the dense one's."""
        any_units = {name: range(width) for name, width in widths.items()}
        small = apply_to_copy(self.model, make_plan(self.analysis, self.model, any_units))
        return time_share(self.model, small, self.inputs)


def known_widths(task: Task) -> dict[str, int] | None:
    """The widths, where they follow from the budget alone; None where errors decide.

    Raises:
        BudgetError: the budget cannot be met; says the nearest that can.
    """
    budget, costs = task.budget, task.analysis.costs
    if budget.kind == "latency":
        if task.by_error:
            return None
        return latency_widths(
            budget, lambda at: uniform_widths(at, task.groups, costs), task.share_of_time
        )
    widths = uniform_widths(budget, task.groups, costs)
    if task.by_error:
        return None
    if budget.kind != "keep":
        check_reached(budget, task.reached(widths))
    return widths


def one_round(
    task: Task, known: Mapping[str, int] | None, pairs: Pairs, *, iterations: int, clock: Clock
) -> PruneResult:
    """Measure, choose, cut and repair once.

    Args:
        known: of `known_widths`.
        iterations: of the joint refit of producers and consumers.

    Raises: as `thinet.prune`.
    """
    model, options, batches = task.model, task.options, [inputs for inputs, _ in pairs]
    groups = [g for g in task.groups if known is None or known[g.name] < g.channels]
    seen, gradients = _measured(task, groups, pairs)
    clock.lap("measuring")
    orders, curves, notes = _orders(task, groups, seen, gradients)
    kept = dict(known) if known is not None else _widths(task, groups, curves)
    keep = {g.name: orders[g.name].keep(kept[g.name]) for g in groups if kept[g.name] < g.channels}
    notes += _of_the_cut(task, groups, keep)
    clock.lap("choosing")
    check_left(task.analysis, keep)
    plan = make_plan(task.analysis, model, keep)
    small = apply_to_copy(model, plan)
    if options.verify:
        verify_cut(model, small, task.inputs, task.analysis, keep)
    clock.lap("cutting")
    repaired, refined = Repaired((), {}), Refined({}, {})
    settings = options.repair_settings
    if options.repair == "full":
        repaired = repair_full(
            small, plan, seen, batches,
            settings=settings, store=task.store, progress=task.progress,
        )  # fmt: skip
    elif options.repair == "scale":
        repaired = repair_scale(small, model, groups, plan, seen)
    clock.lap("repairing")
    if iterations:
        refined = refine(
            small, model, plan, batches[:: settings.every],
            iterations=iterations, seed=options.seed, store=task.store, progress=task.progress,
        )  # fmt: skip
        clock.lap("refining")
    if options.recalibrate:
        small = recalibrate_bn(small, [(batch, None) for batch in batches])
        clock.lap("recalibrating")
    plan = replace(plan, settings=_settings(task))
    report = _report(task, small, kept, orders)
    skipped = dict(repaired.skipped)
    if options.repair == "full":
        skipped |= _no_layers(task, seen, keep)
    report = replace(
        report, refitted=repaired.refitted, not_refitted=skipped, refined=refined.errors,
        not_refined=refined.skipped,
        seconds=clock.laps, notes=notes,
    )  # fmt: skip
    return PruneResult(small, plan, report)


def _measured(
    task: Task, groups: Sequence[ChannelGroup], pairs: Pairs
) -> tuple[Observations, Gradients]:
    """What the criterion, the error curves and the repair ask for, of the dense network."""
    options = task.options
    needs: Collection[str] = options.chosen_by.needs
    if task.by_error:
        needs = {*needs, "systems"}
    mixed = (
        not {"gram", "systems", "hessians", "zeros"}.isdisjoint(needs) or options.repair == "scale"
    )
    roots = None
    if options.loss_aware:
        roots = collect_curvature(
            task.model, pairs, program=task.analysis.program,
            wanted=[site.op for group in groups for site in group.sites],
            seed=options.seed, progress=task.progress,
        )  # fmt: skip
    seen = collect(
        task.model,
        [inputs for inputs, _ in pairs],
        program=task.analysis.program,
        groups=groups if mixed else (),
        targets=options.repair == "full" or task.by_error,
        shortcuts=options.repair == "full" and options.repair_settings.shortcut,
        zeros="zeros" in needs,
        sampling=options.sampling,
        rows=options.rows,
        seed=options.seed,
        store=task.store,
        roots=roots,
        progress=task.progress,
    )
    if {"taylor", "taylor_fo"}.isdisjoint(needs):
        return seen, Gradients()
    return seen, collect_gradients(task.model, pairs, groups, program=task.analysis.program)


def _orders(
    task: Task, groups: Sequence[ChannelGroup], seen: Observations, gradients: Gradients
) -> tuple[dict[str, Order], dict[str, Sequence[float]], tuple[str, ...]]:
    """The order in which each group's units go, and the error at each width if it is wanted.

    By weight sum where the consumers could not be measured. Errors are those of a full refit, in
    units of the signal that goes on, or of the loss where its curvature was observed.

    Raises:
        CalibrationError: the criterion can judge none of the groups.
    """
    criterion = task.options.chosen_by
    orders: dict[str, Order] = {}
    curves: dict[str, Sequence[float]] = {}
    unmeasured: dict[str, str] = {}
    for group in groups:
        stats = replace(
            group_statistics(task.model, group, seen, seed=task.options.seed),
            taylor=gradients.taylor.get(group.name),
            taylor_fo=gradients.taylor_fo.get(group.name),
        )
        missing = sorted(need for need in criterion.needs if not stats.has(need))
        if missing and stats.has("filters"):
            unmeasured[group.name] = ", ".join(missing)
            order = get("weight-sum")(stats)
        else:
            order = criterion(stats)
        orders[group.name] = order
        if task.by_error and criterion.name == "block-obs" and order.errors is not None:
            curves[group.name] = order.errors
        elif task.by_error and stats.has("systems"):
            curves[group.name] = group_refit_errors(stats.consumers, order.removed, name=group.name)
    if groups and len(unmeasured) == len(groups):
        paper = task.options.sampling == "paper"
        raise CalibrationError(
            f"criterion {criterion.name!r} can judge none of the chosen groups; choose another "
            f"criterion{' or exact sampling' if paper else ''}: "
            + "; ".join(
                f"{name}: {what} could not be measured"
                + "".join(f"; {why}" for why in _no_layers(task, seen, [name]).values())
                for name, what in list(unmeasured.items())[:3]
            )
        )
    notes = (
        f"{name}: what {criterion.name} looks at could not be measured ({what}), so its channels "
        "were chosen by weight sum"
        for name, what in unmeasured.items()
    )
    return orders, curves, tuple(notes)


def _no_layers(task: Task, seen: Observations, names: Collection[str]) -> dict[str, str]:
    """Consumers of these groups that are no layers to measuring and repair, with the reason."""
    ops = task.analysis.program.ops
    return {
        site.module or "the model": (
            f"weights are solved for convolutions and linear layers whose weights are parameters "
            f"as they stand; {site.module or 'the model itself'} "
            f"({ops[site.op].name.removeprefix('aten.')}) is no such layer"
        )
        for group in task.groups
        if group.name in names
        for site in group.sites
        if site.op not in seen.layers
    }


def _of_the_cut(
    task: Task, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]
) -> tuple[str, ...]:
    """What a reader of the report should know about the cut itself."""
    if not keep:
        return (NOTHING,)
    return never_run(task.analysis, task.model) + tuple(
        f"{group.name}: {group.normalised_over}, so what stays changes with what goes; this cut is "
        "not exact and was not verified"
        for group in groups
        if group.normalised_over is not None and group.name in keep
    )


def _widths(
    task: Task, groups: Sequence[ChannelGroup], curves: Mapping[str, Sequence[float]]
) -> dict[str, int]:
    """Widths by error under the budget."""
    options = task.options

    def widths_at(budget: Budget) -> dict[str, int]:
        return error_widths(
            budget, groups, curves, task.analysis.costs,
            divisor=options.divisor, least=options.least, fixed=task.fixed,
            exactly=not task.on_the_way and task.budget.kind != "latency",
            late=LATE if options.repair == "full" else 1.0,
            allocator=allocate_dynamic if options.widths == "dynamic" else None,
        )  # fmt: skip

    if task.budget.kind == "latency":
        return latency_widths(task.budget, widths_at, task.share_of_time)
    return widths_at(task.budget)


def _settings(task: Task) -> dict[str, Any]:
    """What the plan remembers of how it was made."""
    budget, options = task.budget, task.options
    return {
        "criterion": options.criterion,
        "repair": options.repair,
        "budget": {budget.kind: dict(budget.named) if budget.named else budget.fraction},
        "widths": options.widths if task.by_error else "uniform",
        "sampling": options.sampling,
        "recalibrate": options.recalibrate,
        "normalised": options.normalised,
        "choices": dict(options.choices or {}),
        "loss_aware": options.loss_aware,
        "seed": options.seed,
    }


def _report(
    task: Task, small: nn.Module, kept: Mapping[str, int], orders: Mapping[str, Order]
) -> PruneReport:
    """Costs and widths."""
    budget, costs, reached = task.budget, task.analysis.costs, task.reached(kept)
    if budget.kind == "latency":
        reached["latency"] = time_share(task.model, small, task.inputs)
    return PruneReport(
        criterion=task.options.criterion,
        repair=task.options.repair,
        budget=budget.kind,
        target=reached["keep"] if budget.named else budget.fraction,
        reached=reached[budget.kind],
        macs_before=costs.macs({}),
        macs_after=costs.macs(kept),
        params_before=costs.params({}),
        params_after=costs.params(kept),
        groups=tuple(group_report(g, task.groups, kept, orders) for g in task.analysis.groups),
    )
