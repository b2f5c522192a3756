"""What `prune` takes beside the network, its data and the budget, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from thinet.budget import Budget
from thinet.calibrate.rows import Rows
from thinet.criteria import get
from thinet.criteria.base import Criterion, Need
from thinet.errors import OptionError
from thinet.repair import RepairSettings
from thinet.trace.record import check_model

Repair = Literal["none", "scale", "full"]
Sampling = Literal["exact", "paper"]
Widths = Literal["error", "dynamic", "uniform"]

WEIGHED: frozenset[Need] = frozenset({"gram", "systems", "hessians", "weights"})
"""What a criterion sees of a consumer's outputs, which the curvature of the loss can weigh."""


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The options of `thinet.prune`, which says what each is.

    Raises:
        OptionError: an unknown criterion or choice, or a number out of range.
    """

    criterion: str = "thinet"
    repair: Repair = "full"
    only: str | Sequence[str] | None = None
    skip: str | Sequence[str] | None = None
    recalibrate: bool = False
    sampling: Sampling = "exact"
    widths: Widths = "error"
    divisor: int = 8
    least: int | None = None
    fixed: Mapping[str, int | float] | None = None
    rounds: int | None = None
    rows: Rows | None = None
    repair_settings: RepairSettings = field(default_factory=RepairSettings)
    memory: float | None = None
    normalised: bool = False
    choices: Mapping[str, str] | None = None
    loss_aware: bool = False
    verify: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        get(self.criterion)
        for name, kind in (("repair", Repair), ("sampling", Sampling), ("widths", Widths)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise OptionError(
                    f"unknown {name} {value!r}; choose one of {', '.join(get_args(kind))}"
                )
        if self.repair != "full" and getattr(self.repair_settings, "refine", None):
            raise OptionError(
                f"refine={self.repair_settings.refine} refits producers and consumers together "
                f"after repair='full'; with repair={self.repair!r} leave it out"
            )
        if self.loss_aware and self.sampling == "paper":
            raise OptionError("loss_aware weighs all outputs; leave out sampling='paper'")
        if (
            not isinstance(self.seed, int)
            or isinstance(self.seed, bool)
            or not 0 <= self.seed < 2**32
        ):
            raise OptionError(f"seed is a whole number from 0 to 2^32 - 1; got {self.seed!r}")
        for name in ("divisor", "least", "rounds"):
            value = getattr(self, name)
            if name != "divisor" and value is None:
                continue
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} is a whole number from 1; got {value!r}")
        if self.rows is not None and not isinstance(self.rows, Rows):
            raise OptionError(f"rows is a thinet.calibrate.rows.Rows; got {self.rows!r}")
        if not isinstance(self.repair_settings, RepairSettings):
            raise OptionError(
                f"repair_settings is a thinet.repair.RepairSettings; got {self.repair_settings!r}"
            )

    @property
    def chosen_by(self) -> Criterion:
        return get(self.criterion)

    def by_error(self, budget: Budget) -> bool:
        """Whether the budget is shared out by error curves."""
        return self.widths != "uniform" and budget.kind != "keep" and self.sampling == "exact"

    def can_hear_the_loss(self, budget: Budget) -> bool:
        """Whether what goes depends on errors of outputs, so that `loss_aware` makes sense."""
        return self.by_error(budget) or not WEIGHED.isdisjoint(self.chosen_by.needs)


def check_network(model: nn.Module) -> None:
    """See that a model is one that can be run and cut.

    Raises:
        OptionError: it is scripted, compiled, no module at all, has no data, or is on a device
            without float64.
    """
    check_model(model)
    if hasattr(model, "_orig_mod"):
        raise OptionError("the model is compiled; prune model._orig_mod and compile the result")
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise OptionError(f"{empty[0]} has no data (it is on the meta device); load the weights")
    if any(parameter.device.type == "mps" for parameter in model.parameters()):
        raise OptionError(
            "the model is on an Apple GPU, which has no float64, in which moments are summed and "
            "weights solved; prune model.cpu() and move the result"
        )


def check_budget(budget: object, options: PruneOptions) -> None:
    """See that a budget is one, and goes with the options.

    Raises:
        OptionError: it does not.
    """
    if not isinstance(budget, Budget):
        raise OptionError(
            f"budget={budget!r} does not say of what; give thinet.Budget(macs=0.5), or params=, "
            "latency= or keep="
        )
    if budget.kind == "latency" and options.rounds not in (None, 1):
        raise OptionError("rounds are steps of a budget of macs or params, not of latency")
    if options.rounds not in (None, 1) and not options.by_error(budget):
        raise OptionError(
            "rounds are steps of a budget that is shared out by error; with widths='uniform', "
            "keep= or sampling='paper' leave them out"
        )
    if options.loss_aware and not options.can_hear_the_loss(budget):
        raise OptionError(
            f"loss_aware weighs errors of outputs, at which criterion {options.criterion!r} does "
            "not look; choose another criterion, such as 'thinet', or a budget of macs or params "
            "that is shared out by error"
        )
