"""The main verb: measure, choose, cut, repair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from thinet.allocate import LATE, error_widths
from thinet.budget import Budget, check_reached, uniform_widths, units
from thinet.calibrate.batches import calibration_pairs, images_in
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.calibrate.collect import Observations, Rows, collect
from thinet.calibrate.gradients import Gradients, collect_gradients
from thinet.calibrate.statistics import group_statistics
from thinet.criteria import get
from thinet.criteria.base import Criterion, Order
from thinet.criteria.curves import group_refit_errors
from thinet.cut import apply_to_copy
from thinet.dynamic import allocate_dynamic
from thinet.errors import BudgetError, CalibrationError, OptionError, UnknownGroupError
from thinet.latency_budget import latency_widths, time_share
from thinet.outcome import (
    Clock,
    PruneReport,
    PruneResult,
    group_report,
    joined,
    refitted,
    share,
    with_notes,
)
from thinet.plan import Plan
from thinet.refine import AFFORDED, ITERATIONS, Refined, refine
from thinet.repair import Repaired, RepairSettings, repair_full, repair_scale
from thinet.selection import named_groups, select_groups
from thinet.store import Store
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.trace.planning import make_plan
from thinet.types import ChannelGroup, ExampleInputs, Progress
from thinet.verify import verify_cut

Repair = Literal["none", "scale", "full"]
Sampling = Literal["exact", "paper"]
Widths = Literal["error", "dynamic", "uniform"]

FEW = 0.4
"""Of the costs: below it, two rounds are better than one (docs/method.md)."""

NOT_REFINED = (
    "producers and consumers were not refitted together: a pass over the calibration images costs "
    "{passed:.2g} multiply-adds, and that takes some fifty; RepairSettings(refine=5) or --refine 5 "
    "does it"
)


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
    widths: Widths = "error",
    divisor: int = 8,
    least: int | None = None,
    fixed: Mapping[str, int | float] | None = None,
    rounds: int | None = None,
    rows: Rows | None = None,
    repair_settings: RepairSettings | None = None,
    memory: float | None = None,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
    analysis: Analysis | None = None,
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
        widths: how a budget of costs is shared out: by "error" (each group gives up what loses
            least for what it saves), by "dynamic" programming over the same errors, or "uniform"
            (the same fraction everywhere, as the paper).
        fixed: what stays of single groups by name, as in `Budget(keep=...)`; the others are shared
            out around them.
        divisor: widths shared out by error are multiples of it, in groups of at least four times
            as many channels; networks run fastest at multiples of 8 or 16.
        least: no group is made narrower than this by error; None: two, or one where the budget
            takes that.
        rounds: in how many equal steps a budget that is shared out by error is reached, each chosen
            and repaired on what the one before left. None: two for less than `FEW` of the costs
            where layers are also refitted together (see `RepairSettings.refine`), else one.
        rows: how many output positions of each layer are looked at.
        memory: GiB that calibration, selection and repair may use above the model's, on the device
            where it lies; what does not fit waits in a temporary file (in TMPDIR), and the result
            is the same. None for 2, or as much more as the work cannot do without.
        normalised, choices: which groups there are, as for `find_groups`.
        analysis: what `thinet.trace.analyse.analyse` found with these, where several prunes of one
            model share it.
        verify: see that the cut, before the repair, computes what the silenced original computes.
        seed: of the sampled positions and random choices.

    Raises:
        BudgetError: the budget cannot be met; says the nearest that can.
        CalibrationError: the data is empty, not finite, or does not fit the model.
        OptionError: an unknown criterion or option, or too little memory (says what is needed).
        UnknownGroupError: a pattern that matches no group.
        LockedGroupError: no group may be cut; says why for each.
        RepairError, VerificationError: see `thinet.repair` and `thinet.cut`.
    """
    chosen = get(criterion)
    _check_model(model)
    _check_options(budget, repair, sampling, widths, seed)
    _check_settings(divisor, least, 1 if rounds is None else rounds, rows, repair_settings)
    by_error = widths != "uniform" and budget.kind != "keep" and sampling == "exact"
    timed = budget.kind == "latency"
    if timed and rounds not in (None, 1):
        raise OptionError("rounds are steps of a budget of macs or params, not of latency")
    store = Store(memory)
    clock = Clock()
    if analysis is None:
        analysis = analyse(model, example_inputs, normalised=normalised, choices=choices)
    if budget.named is not None:
        only = named_groups(analysis.groups, budget.named, only, skip)
    groups = select_groups(analysis.groups, only, skip)
    set_widths = _fixed(fixed, groups, by_error)
    kept = {g.name: g.channels for g in groups}

    def share_of(tried: Mapping[str, int]) -> float:
        units = {name: range(width) for name, width in tried.items()}
        return time_share(
            model, apply_to_copy(model, make_plan(analysis, model, units)), example_inputs
        )

    if timed and not by_error:
        kept = latency_widths(
            budget, lambda at: uniform_widths(at, groups, analysis.costs), share_of
        )
    elif not timed:
        kept = uniform_widths(budget, groups, analysis.costs)
        if not by_error:
            _check_cost(budget, analysis, kept)
    device = next(iter(model.parameters()), torch.empty(0)).device
    pairs = calibration_pairs(calibration, device=device)
    batches = [inputs for inputs, _ in pairs]
    settings = repair_settings or RepairSettings()
    passed = (
        analysis.costs.macs({}) * sum(map(images_in, batches)) / max(images_in(example_inputs), 1)
    )
    iterations, dear = _iterations(settings, repair, by_error, passed)
    if by_error and rounds is None:
        rounds = 2 if iterations and budget.fraction < FEW and not timed else 1
    if by_error and rounds and rounds > 1:
        again: dict[str, Any] = {
            "criterion": criterion, "repair": repair, "only": only, "skip": skip,
            "divisor": divisor, "least": least, "rows": rows, "widths": widths,
            "fixed": set_widths, "memory": memory, "normalised": normalised,
            "choices": choices, "verify": verify, "seed": seed, "progress": progress,
        }  # fmt: skip
        between = Budget(**{budget.kind: budget.fraction ** (1 - 1 / rounds)})
        # What an early round leaves is refitted again: fewer images and iterations do for it.
        roughly = replace(settings, refine=-(-iterations * 3 // 5), every=2 * settings.every)
        with suppress(BudgetError):  # coarse widths may only meet the budget at once
            first = prune(
                model, example_inputs, pairs, budget=between, rounds=rounds - 1,
                repair_settings=roughly, analysis=analysis, **again,
            )  # fmt: skip
            rest = Budget(**{budget.kind: min(budget.fraction / first.report.reached, 1.0)})
            last = prune(
                first.model, example_inputs, pairs, budget=rest, rounds=1,
                repair_settings=replace(settings, refine=0), **again,
            )  # fmt: skip
            result = joined(first, last, budget.fraction)
            clock.lap("rounds")
            if iterations:  # towards the dense network, not towards what the first round left
                refined = refine(
                    result.model, model, result.plan, batches[:: settings.every],
                    iterations=iterations, seed=seed, store=store, progress=progress,
                )  # fmt: skip
                result = refitted(result, refined, clock.lap("refining"))
            if recalibrate:
                result = replace(result, model=recalibrate_bn(result.model, batches))
            return with_notes(result, dear)
    clock.lap("groups")
    needs = chosen.needs | ({"hessians"} if by_error else set())
    cut_groups = [g for g in groups if by_error or kept[g.name] < g.channels]
    seen = collect(
        model,
        batches,
        program=analysis.program,
        groups=cut_groups if needs & {"gram", "hessians", "zeros"} or repair == "scale" else (),
        targets=repair == "full" or by_error,
        zeros="zeros" in needs,
        sampling=sampling,
        rows=rows,
        seed=seed,
        store=store,
        progress=progress,
    )
    gradients = Gradients()
    if needs & {"taylor", "taylor_fo"}:
        gradients = collect_gradients(model, pairs, cut_groups)
    clock.lap("measuring")
    orders, curves, notes = _orders(model, cut_groups, chosen, seen, gradients, seed, by_error)
    if by_error:

        def widths_at(costs: Budget) -> dict[str, int]:
            return error_widths(
                costs, cut_groups, curves, analysis.costs, divisor=divisor, least=least,
                late=LATE if repair == "full" else 1.0, fixed=set_widths,
                allocator=allocate_dynamic if widths == "dynamic" else None,
            )  # fmt: skip

        kept = latency_widths(budget, widths_at, share_of) if timed else widths_at(budget)
    keep = {
        g.name: orders[g.name].keep(kept[g.name]) for g in cut_groups if kept[g.name] < g.channels
    }
    clock.lap("choosing")
    plan = make_plan(analysis, model, keep)
    small = apply_to_copy(model, plan)
    if verify:
        verify_cut(model, small, example_inputs, analysis, keep)
    clock.lap("cutting")
    repaired, refined = Repaired((), {}), Refined({}, {})
    if repair == "full":
        repaired = repair_full(
            small, plan, seen, batches, settings=repair_settings, store=store, progress=progress
        )
    elif repair == "scale":
        repaired = repair_scale(small, model, cut_groups, plan, seen)
    clock.lap("repairing")
    if iterations:
        refined = refine(
            small, model, plan, batches[:: settings.every],
            iterations=iterations, seed=seed, store=store, progress=progress,
        )  # fmt: skip
        clock.lap("refining")
    if recalibrate:
        small = recalibrate_bn(small, batches)
        clock.lap("recalibrating")
    plan_settings = {
        "criterion": criterion,
        "repair": repair,
        "budget": {budget.kind: dict(budget.named) if budget.named else budget.fraction},
        "widths": widths if by_error else "uniform",
        "sampling": sampling,
        "recalibrate": recalibrate,
        "normalised": normalised,
        "choices": dict(choices or {}),
        "seed": seed,
    }
    plan = Plan(plan.keep, plan.kept, plan.attributes, plan.replaced, plan_settings)
    reached = {
        "macs": analysis.costs.macs(kept) / max(analysis.costs.macs({}), 1),
        "params": analysis.costs.params(kept) / max(analysis.costs.params({}), 1),
        "keep": share(groups, kept),
    }
    if timed:
        reached["latency"] = time_share(model, small, example_inputs)
    report = PruneReport(
        criterion=criterion,
        repair=repair,
        budget=budget.kind,
        target=share(groups, kept) if budget.named else budget.fraction,
        reached=reached[budget.kind],
        macs_before=analysis.costs.macs({}),
        macs_after=analysis.costs.macs(kept),
        params_before=analysis.costs.params({}),
        params_after=analysis.costs.params(kept),
        groups=tuple(group_report(g, groups, kept, orders) for g in analysis.groups),
        refitted=repaired.refitted,
        not_refitted=repaired.skipped,
        refined=refined.errors,
        seconds=clock.laps,
        notes=(*notes, *dear),
    )
    return PruneResult(small, plan, report)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise OptionError(
            f"the model is a {type(model).__name__}; give the torch.nn.Module in Python, neither "
            "scripted nor a function"
        )
    if hasattr(model, "_orig_mod"):
        raise OptionError("the model is compiled; prune model._orig_mod and compile the result")
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise OptionError(f"{empty[0]} has no data (it is on the meta device); load the weights")


def _check_settings(
    divisor: object, least: object, rounds: object, rows: object, repair: object
) -> None:
    given = {"divisor": divisor, "rounds": rounds} | ({} if least is None else {"least": least})
    for name, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is a whole number from 1; got {value!r}")
    for name, value, kind in (("rows", rows, Rows), ("repair_settings", repair, RepairSettings)):
        if value is not None and not isinstance(value, kind):
            raise OptionError(f"{name} is a {kind.__module__}.{kind.__name__}; got {value!r}")


def _check_options(
    budget: object, repair: object, sampling: object, widths: object, seed: object
) -> None:
    if not isinstance(budget, Budget):
        raise OptionError(
            f"budget={budget!r} does not say of what; give thinet.Budget(macs=0.5), or params=, "
            "latency= or keep="
        )
    options = (("repair", repair, Repair), ("sampling", sampling, Sampling))
    for name, value, kind in (*options, ("widths", widths, Widths)):
        if value not in get_args(kind):
            raise OptionError(
                f"unknown {name} {value!r}; choose one of {', '.join(get_args(kind))}"
            )
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise OptionError(f"seed is a whole number from 0 to 2^32 - 1; got {seed!r}")


def _check_cost(budget: Budget, analysis: Analysis, widths: Mapping[str, int]) -> None:
    if budget.kind != "keep":
        measure = analysis.costs.macs if budget.kind == "macs" else analysis.costs.params
        check_reached(budget, {budget.kind: measure(widths) / max(measure({}), 1)})


def _orders(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    seen: Observations,
    gradients: Gradients,
    seed: int,
    by_error: bool,
) -> tuple[dict[str, Order], dict[str, Sequence[float]], tuple[str, ...]]:
    """The order in which each group's units go, and the error at each width if it is wanted.

    By weight sum where the consumers could not be measured. Errors are those of a full refit, in
    units of the signal that goes on.

    Raises:
        CalibrationError: the criterion can judge none of the groups.
    """
    orders: dict[str, Order] = {}
    curves: dict[str, Sequence[float]] = {}
    notes: list[str] = []
    for group in groups:
        stats = replace(
            group_statistics(model, group, seen, seed=seed),
            taylor=gradients.taylor.get(group.name),
            taylor_fo=gradients.taylor_fo.get(group.name),
        )
        missing = sorted(need for need in criterion.needs if not stats.has(need))
        if missing and stats.has("filters"):
            notes.append(
                f"{group.name}: what {criterion.name} looks at could not be measured "
                f"({', '.join(missing)}), so its channels were chosen by weight sum"
            )
            order = get("weight-sum")(stats)
        else:
            order = criterion(stats)
        orders[group.name] = order
        if by_error and criterion.name == "block-obs" and order.errors is not None:
            curves[group.name] = order.errors
        elif by_error and stats.has("hessians"):
            curves[group.name] = group_refit_errors(stats.consumers, order.removed, name=group.name)
    if groups and len(notes) == len(groups):
        raise CalibrationError(
            f"criterion {criterion.name!r} can judge none of the chosen groups; choose another "
            "criterion: " + "; ".join(notes[:3])
        )
    return orders, curves, tuple(notes)


def _fixed(
    given: Mapping[str, int | float] | None, groups: Sequence[ChannelGroup], by_error: bool
) -> dict[str, int]:
    """Units of the groups whose widths are given; errors as for a budget that names groups."""
    if not given:
        return {}
    if not by_error:
        raise OptionError(
            "fixed widths go with a budget of macs or params that is shared out by error"
        )
    Budget(keep=given)  # its checks
    known = {group.name: group for group in groups}
    for name in given:
        if name not in known:
            raise UnknownGroupError(
                f"fixed names {name!r}, which is none of the {len(known)} groups that are cut here"
            )
    return {name: units(known[name], value) for name, value in given.items()}


def _iterations(
    settings: RepairSettings, repair: str, by_error: bool, passed: float
) -> tuple[int, tuple[str, ...]]:
    """Iterations of the joint refit; where these would cost too much, none and a note.

    Args:
        passed: multiply-adds of a pass over the calibration images.
    """
    if repair != "full":
        return 0, ()
    if settings.refine is not None or not by_error:
        return settings.refine or 0, ()
    return (ITERATIONS, ()) if passed <= AFFORDED else (0, (NOT_REFINED.format(passed=passed),))
