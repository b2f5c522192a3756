"""Convolutions with zero taps as thinner dense products, and the channels that nothing reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from thinet.errors import OptionError
from thinet.plan import Plan, Replacement
from thinet.surgery.replace import replace
from thinet.surgery.thin_conv import not_thinnable, options_of, take_weights
from thinet.trace.analyse import analyse
from thinet.trace.record import check_model
from thinet.trace.replica import copied
from thinet.types import ExampleInputs


@dataclass(frozen=True)
class ThinResult:
    """A model whose convolutions multiply only by what is not zero, and the plan that makes it.

    Attributes:
        taps: for each convolution that was thinned, by path: taps that are left, and all of them.
    """

    model: nn.Module
    plan: Plan
    taps: dict[str, tuple[int, int]]


def thin(model: nn.Module, *, only: str | Sequence[str] | None = None) -> ThinResult:
    """A copy in which every convolution with zero taps is a `ThinConv2d` of those that are left.

    A tap is one (input channel, row, column) of the kernel over all filters (Lebedev and Lempitsky,
    CVPR 2016); it is left out where all its weights are exactly zero, as fine-tuning with a
    `GroupSparsity` leaves them. The new model computes the same but for the order of the sums. Cut
    the input channels of which no tap is left first, by `thinet.cut` with `read_channels`: that is
    free, while gathering taps costs time (see docs/method.md). `thinet.save` and `load` take the
    model with the plan; for a model that was cut before, with `plan_cut(...).then(result.plan)`.

    Args:
        only: glob patterns on module paths; None takes every convolution that has zero taps.

    Raises:
        OptionError: no convolution has zero taps, a pattern fits none, or fits one that cannot be
            thinned (which, and why).
    """
    check_model(model)
    patterns = (only,) if isinstance(only, str) else only
    stays: dict[str, Tensor] = {}
    convolutions = {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for path, module in convolutions.items():
        named = patterns is not None and any(fnmatchcase(path, p) for p in patterns)
        fault = not_thinnable(module)
        if names[id(module)] > 1:
            fault = "it stands in the model under several names, of which one would be replaced"
        if fault is not None and named:
            raise OptionError(f"{path} cannot be thinned: {fault}; leave it out of only")
        if fault is None and (named or patterns is None):
            left = (module.weight.detach() != 0).any(dim=0)
            if not bool(left.any()):
                raise OptionError(f"{path} cannot be thinned: all its weights are zero")
            if not bool(left.all()):
                stays[path] = left
    if not stays:
        raise OptionError(
            f"none of {', '.join(convolutions) or 'the modules'} "
            + (f"that fit {', '.join(patterns)} " if patterns is not None else "")
            + "is a convolution with a tap that is zero in all filters; train with a GroupSparsity "
            "whose keep is below 1"
        )
    plan = Plan(
        replaced=tuple(
            Replacement(path, "thin-convolution", options_of(_conv(model, path), left))
            for path, left in stays.items()
        )
    )
    new = copied(model)
    replace(new, plan.replaced)
    for path, left in stays.items():
        take_weights(new.get_submodule(path), _conv(model, path), left)
    counts = {path: (int(left.sum()), left.numel()) for path, left in stays.items()}
    return ThinResult(new, plan, counts)


def read_channels(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, tuple[int, ...]]:
    """For `thinet.cut`: the units that stay of each group of which some are read by nothing.

    A unit is read by nothing where every weight that would multiply it is zero in all consumers of
    the group, as when all taps of an input map are gone. Cutting the others changes no output.
    Locked groups, those that meet in products of two activations and those read by parametrized
    weights are left out; a group of which nothing is read keeps its first unit.
    """
    analysis = analyse(model, example_inputs)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    keep: dict[str, tuple[int, ...]] = {}
    for group in analysis.groups:
        weighed = [member for member in group.members if member.role == "consumes"]
        between = any(site.parameter is None for site in group.sites)
        # what a weight is computed from may be zero where the weight is not
        computed = any("parametrizations" in member.parameter.split(".") for member in weighed)
        if group.locked is not None or between or computed or not weighed:
            continue
        read: set[int] = set()
        for member in weighed:
            weight = named[member.parameter].detach().movedim(member.dim, 0)
            used = (weight != 0).flatten(1).any(dim=1).tolist()
            read |= {unit for unit, on in zip(member.units, used, strict=True) if on and unit >= 0}
        if len(read) < group.channels:
            keep[group.name] = tuple(sorted(read)) or (0,)
    return keep


def _conv(model: nn.Module, path: str) -> nn.Conv2d:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Conv2d)
    return module
