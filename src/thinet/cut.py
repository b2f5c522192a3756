"""The verb that makes a smaller model, and the proof that it computes the same."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import overload

from torch import nn
from torch.optim import Optimizer

from thinet.errors import LockedGroupError, OptionError, UnknownGroupError
from thinet.plan import Plan
from thinet.surgery.apply import apply_plan
from thinet.surgery.optimizer import cut_optimizer
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.trace.planning import check_left, make_plan
from thinet.trace.replica import copied
from thinet.types import ChannelGroup, ExampleInputs, check_indices
from thinet.verify import verify_cut


@overload
def cut(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Mapping[str, Sequence[int]],
    *,
    verify: bool = True,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
    optimizer: None = None,
    analysis: Analysis | None = None,
) -> nn.Module: ...


@overload
def cut(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Mapping[str, Sequence[int]],
    *,
    verify: bool = True,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
    optimizer: Optimizer,
    analysis: Analysis | None = None,
) -> tuple[nn.Module, Optimizer]: ...


def cut(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Mapping[str, Sequence[int]],
    *,
    verify: bool = True,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
    optimizer: Optimizer | None = None,
    analysis: Analysis | None = None,
) -> nn.Module | tuple[nn.Module, Optimizer]:
    """A new, smaller model that keeps the named units of the named groups.

    Groups that are not named stay whole. The given model is left as it was.

    Args:
        model: the dense model.
        example_inputs: what `find_groups` was given.
        keep: group name to the units that stay, in any order.
        verify: run both models on the example inputs and compare the cut one with the original
            whose removed channels are silenced at the consumers' inputs.
        normalised: as in `find_groups`; such cuts are not exact and not verified.
        choices: as in `find_groups`.
        optimizer: that of the dense model. Its momenta and steps go on for what stays.
        analysis: what `thinet.trace.analyse.analyse` found with these, where several cuts of one
            model share it; it holds until the model changes.

    Returns:
        The cut model; with `optimizer`, the cut model and an optimizer of the same class for it.
        A learning rate scheduler goes on with `scheduler.optimizer = optimizer`.

    Raises:
        LockedGroupError: a group may not be cut; the text says why.
        UnknownGroupError: no group has that name.
        IndicesError: indices that are empty, repeated or out of range (a ValueError), or that leave
            nothing of a slice or a piece of a split (NothingLeftError).
        VerificationError: the cut model differs; it is not returned.
        OptionError: the optimizer's state of a cut parameter does not have its shape, or choices
            that the model does not leave, or a model without data that is to be verified.
    """
    if analysis is None:
        analysis = analyse(model, example_inputs, normalised=normalised, choices=choices)
    if verify and (empty := [name for name, p in model.named_parameters() if p.is_meta]):
        raise OptionError(
            f"{empty[0]} has no data (it is on the meta device), so the cut cannot be verified; "
            "load the weights, or cut the shapes alone with verify=False"
        )
    plan = plan_cut(model, example_inputs, keep, analysis=analysis)
    small = apply_to_copy(model, plan)
    if verify:
        verify_cut(model, small, example_inputs, analysis, plan.keep)
    if optimizer is None:
        return small
    return small, cut_optimizer(optimizer, model, small, plan)


def plan_cut(
    model: nn.Module,
    example_inputs: ExampleInputs,
    keep: Mapping[str, Sequence[int]],
    *,
    normalised: bool = False,
    choices: Mapping[str, str] | None = None,
    analysis: Analysis | None = None,
) -> Plan:
    """What `cut` carries out, as frozen data: `save` writes it beside the cut model's weights, so
    that `load` makes the same cut of the dense model.

    Args and errors as those of `cut`; nothing is cut, run or verified.
    """
    if analysis is None:
        analysis = analyse(model, example_inputs, normalised=normalised, choices=choices)
    checked = check_keep(analysis.groups, keep)
    check_left(analysis, checked)
    return make_plan(analysis, model, checked)


def apply_to_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model with the plan carried out."""
    small = copied(model)
    apply_plan(small, plan)
    return small


def check_keep(
    groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """Sorted indices for each named group, whole groups left out; errors as `cut` raises them."""
    if not isinstance(keep, Mapping):
        raise OptionError(
            f"keep maps names of groups to the units that stay, such as {{'conv1': [0, 2]}}; got "
            f"{type(keep).__name__}"
        )
    known = {group.name: group for group in groups}
    checked: dict[str, list[int]] = {}
    for name, indices in keep.items():
        if name not in known:
            raise UnknownGroupError(_unknown(name, known))
        group = known[name]
        units = check_indices(group, indices)
        if group.locked is not None:
            raise LockedGroupError(f"group {name!r} may not be cut: {group.locked}")
        if len(units) < group.channels:
            checked[name] = units
    return checked


def _unknown(name: str, known: Mapping[str, ChannelGroup]) -> str:
    holder = next(
        (g.name for g in known.values() if name in g.producers or name in g.consumers), None
    )
    near = [holder] if holder else difflib.get_close_matches(str(name), list(known), n=3)
    hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
    return f"no group is named {name!r}; {hint}find_groups lists all {len(known)}"
