"""The main verb: measure, choose, cut, repair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from thinet.budget import Budget, check_reached, units
from thinet.calibrate.batches import calibration_pairs, images_in
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.calibrate.rows import Rows
from thinet.calibrate.ways import same_way
from thinet.errors import BudgetError, OptionError
from thinet.hull import width_step
from thinet.observe import full_products
from thinet.one_round import Pairs, Task, known_widths, one_round
from thinet.outcome import Clock, PruneResult, joined, refitted, with_notes
from thinet.prune_options import (
    PruneOptions,
    Repair,
    Sampling,
    Widths,
    check_budget,
    check_network,
)
from thinet.refine import AFFORDED, ITERATIONS, refine
from thinet.repair import RepairSettings
from thinet.selection import check_names, named_groups, select_groups
from thinet.store import Store
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.types import ChannelGroup, ExampleInputs, Progress

FEW = 0.4
"""Of the costs: below it, two rounds are better than one (docs/method.md)."""

AT_ONCE = (
    "{rounds} rounds cannot meet {kind}={fraction:g} with widths as coarse as these, so it was "
    "reached in one ({reason})"
)

COARSE = (
    "multiples of {divisor} leave more than 1 % of the budget unused, so these widths are others: "
    "{widths}"
)

NOT_REFINED = (
    "producers and consumers were not refitted together: a pass over the calibration images costs "
    "{passed:.2g} multiply-adds, and that takes up to fifty; RepairSettings(refine=5) or "
    "--refine 5 does it"
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
    loss_aware: bool = False,
    analysis: Analysis | None = None,
    verify: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneResult:
    """Make a smaller model in one shot, without any training.

    Args:
        model: the dense model; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        calibration: batches of unlabelled images: tensors, (inputs, target) pairs or dicts of
            keyword inputs; of a model with several positional inputs also tuples of these, with or
            without a target at the end.
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
        loss_aware: channels and widths are chosen by what their loss costs the network's loss, to
            second order, and not by how much of the next layer's output it is: outputs are weighed
            by gradients, of the cross-entropy with the targets of the calibration or, without
            any, with labels drawn from the model's own answers (`thinet.calibrate.curvature`).
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
    options = PruneOptions(
        criterion=criterion, repair=repair, only=only, skip=skip, recalibrate=recalibrate,
        sampling=sampling, widths=widths, divisor=divisor, least=least, fixed=fixed, rounds=rounds,
        rows=rows, repair_settings=repair_settings or RepairSettings(), memory=memory,
        normalised=normalised, choices=choices, loss_aware=loss_aware, verify=verify, seed=seed,
    )  # fmt: skip
    check_network(model)
    check_budget(budget, options)
    with full_products():
        return _pruned(model, example_inputs, calibration, budget, options, analysis, progress)


def _pruned(
    model: nn.Module,
    inputs: ExampleInputs,
    calibration: Iterable[Any],
    budget: Budget,
    options: PruneOptions,
    analysis: Analysis | None,
    progress: Progress | None,
    on_the_way: bool = False,
) -> PruneResult:
    """`prune`, in as many rounds as it takes."""
    store, clock, only = Store(options.memory), Clock(), options.only
    if analysis is None:
        analysis = analyse(model, inputs, normalised=options.normalised, choices=options.choices)
    if budget.named is not None:
        only = named_groups(analysis.groups, budget.named, only, options.skip)
    groups = select_groups(analysis.groups, only, options.skip)
    fixed = _fixed(options.fixed, groups, options.by_error(budget))
    task = Task(
        model, inputs, analysis, groups, fixed, budget, options, store, progress, on_the_way
    )
    known = known_widths(task)
    device = next(iter(model.parameters()), torch.empty(0)).device
    pairs = calibration_pairs(calibration, device=device, like=inputs)
    alike, left_out = same_way(model, inputs, analysis.program, [batch for batch, _ in pairs])
    pairs = [pairs[number] for number in alike]
    images = sum(images_in(batch) for batch, _ in pairs)
    passed = analysis.costs.macs({}) * images / max(images_in(inputs), 1)
    iterations, notes = _iterations(task, passed)
    rounds = options.rounds or 1
    if options.rounds is None and task.by_error and budget.kind != "latency":
        rounds = 2 if iterations and budget.fraction < FEW else 1
    result = None
    if rounds > 1 and task.by_error:
        try:
            result = _in_rounds(task, rounds, pairs, iterations, clock)
        except BudgetError as error:
            told = {"rounds": rounds, "kind": budget.kind, "fraction": budget.fraction}
            notes = (*notes, AT_ONCE.format(**told, reason=error))
    if result is None:
        clock.lap("groups")
        result = one_round(task, known, pairs, iterations=iterations, clock=clock)
    return with_notes(result, (*left_out, *notes, *_of_the_widths(task, result.plan.keep)))


def _in_rounds(task: Task, rounds: int, pairs: Pairs, iterations: int, clock: Clock) -> PruneResult:
    """In equal steps, each chosen and repaired on what the one before left."""
    budget, settings = task.budget, task.options.repair_settings
    options = replace(task.options, recalibrate=False, sampling="exact")

    def step(
        model: nn.Module, fraction: float, rounds: int, settings: RepairSettings,
        fixed: Mapping[str, int], analysis: Analysis | None = None,
    ) -> PruneResult:  # fmt: skip
        part = replace(options, fixed=fixed or None, rounds=rounds, repair_settings=settings)
        to = Budget(**{budget.kind: fraction})
        return _pruned(model, task.inputs, pairs, to, part, analysis, task.progress, True)

    # What an early round leaves is refitted again: fewer images and iterations do for it.
    roughly = replace(settings, refine=-(-iterations * 3 // 5), every=2 * settings.every)
    between = budget.fraction ** (1 - 1 / rounds)
    first = step(task.model, between, rounds - 1, roughly, task.fixed, task.analysis)
    rest = min(budget.fraction / first.report.reached, 1.0)
    open_still = {name: width for name, width in task.fixed.items() if width > 1}
    last = step(first.model, rest, 1, replace(settings, refine=0), open_still)
    result = joined(first, last, budget.fraction)
    if not task.on_the_way:
        check_reached(budget, {budget.kind: result.report.reached})
    clock.lap("rounds")
    batches = [batch for batch, _ in pairs]
    if iterations:  # towards the dense network, not towards what the first round left
        refined = refine(
            result.model, task.model, result.plan, batches[:: settings.every],
            iterations=iterations, seed=options.seed, store=task.store, progress=task.progress,
        )  # fmt: skip
        result = refitted(result, refined, clock.lap("refining"))
    if task.options.recalibrate:
        without_targets = [(batch, None) for batch in batches]
        result = replace(result, model=recalibrate_bn(result.model, without_targets))
    return result


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
    check_names("fixed", given, groups)
    known = {group.name: group for group in groups}
    return {name: units(known[name], value) for name, value in given.items()}


def _of_the_widths(task: Task, keep: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """A note where the divisor gave way to the budget."""
    divisor = task.options.divisor
    odd = [
        f"{len(keep[group.name])} of {group.channels} in {group.name}"
        for group in task.groups
        if len(keep.get(group.name, ())) % width_step(group, divisor)
        and group.name not in task.fixed
    ]
    if not task.by_error or task.on_the_way or not odd:
        return ()
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return (COARSE.format(divisor=divisor, widths=", ".join(odd[:3]) + more),)


def _iterations(task: Task, passed: float) -> tuple[int, tuple[str, ...]]:
    """Iterations of the joint refit; where these would cost too much, none and a note.

    Args:
        passed: multiply-adds of a pass over the calibration images.
    """
    asked = task.options.repair_settings.refine
    if task.options.repair != "full":
        return 0, ()
    if asked is not None or not task.by_error:
        return asked or 0, ()
    return (ITERATIONS, ()) if passed <= AFFORDED else (0, (NOT_REFINED.format(passed=passed),))
