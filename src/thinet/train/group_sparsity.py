"""Group-wise Brain Damage in training: whole kernel taps are driven to zero and then held there.

Lebedev and Lempitsky, "Fast ConvNets Using Group-wise Brain Damage", CVPR 2016. A group is one tap
of one input map over all filters, Gamma_cyx = {K[n, c, y, x] for all n}: one row of the matrix that
a convolution by im2col multiplies with. The penalty

    strength * sum over c, y, x of || Gamma_cyx ||_2

is added to the loss; its gradient, strength * K / || Gamma ||, goes through the same SGD as the
loss's (no proximal step), so it makes groups small and not zero. Zero they become by thresholding:
the groups of least norm of each layer are set to zero, more of them as the run goes on, and stay
so. What is left is exported by `thinet.thin`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from thinet.errors import ModelError, OptionError
from thinet.surgery.thin_conv import not_thinnable
from thinet.train.checks import out_of_range


@dataclass(frozen=True)
class GroupSparsity:
    """How kernel taps are driven out.

    Attributes:
        strength: lambda, the weight of the penalty; 0 only fixes and holds groups.
        keep: fraction of each layer's groups that stays (rounded down, at least one); 1 fixes no
            group but those that are zero from the start.
        until: share of the run's steps over which the other groups are fixed, evenly.
        truncate: None, or the norm from which on a group is not pulled at: the penalty is then
            strength * sum of min(|| Gamma ||, truncate), which spares the groups that matter.
        layers: glob patterns on the paths of convolutions; None takes all that can be thinned.
    """

    strength: float
    keep: float = 1.0
    until: float = 0.5
    truncate: float | None = None
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            given = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
            object.__setattr__(self, "layers", given)
        faults = list(self._faults())
        if faults:
            raise OptionError("group sparsity: " + "; ".join(faults))

    def _faults(self) -> Iterator[str]:
        yield from out_of_range("strength", self.strength, least=0)
        yield from out_of_range("keep", self.keep, above=0, most=1)
        yield from out_of_range("until", self.until, least=0, most=1)
        if self.truncate is not None:
            yield from out_of_range("truncate", self.truncate, above=0)
        if self.layers == ():
            yield "layers is empty; leave it out to take all convolutions"


class TapGroups:
    """The tap groups of a model in training, and which of them stay.

    Attributes:
        stays: for each chosen convolution, by its path, a bool (C, kh, kw): False is held at zero.

    Raises:
        OptionError: a pattern fits no convolution, or one whose taps cannot be taken out (why).
        ModelError: no convolution can be thinned, or one's weights are all zero.
    """

    def __init__(self, model: nn.Module, options: GroupSparsity, steps: int) -> None:
        self.options = options
        self._ramp = max(1, math.ceil(options.until * steps))
        self._weights = _chosen(model, options.layers)
        self.stays = {path: tap_norms(weight) > 0 for path, weight in self._weights.items()}
        for path, stays in self.stays.items():
            if not bool(stays.any()):
                raise ModelError(f"the weights of {path} are all zero; it has no tap to keep")

    @torch.no_grad()
    def pull(self) -> None:
        """Add the penalty's gradient to the weights' own; taps that are held have none."""
        for path, weight in self._weights.items():
            if weight.grad is None:
                continue
            norms = tap_norms(weight)
            pulled = norms > 0
            if self.options.truncate is not None:
                pulled &= norms <= self.options.truncate
            share = torch.where(pulled, self.options.strength / norms, 0.0)
            weight.grad.add_(weight * share).mul_(self.stays[path])

    @torch.no_grad()
    def fix(self, step: int) -> None:
        """After step `step` (from 0): set the groups that are due to zero, and hold all of them."""
        share = min(1.0, (step + 1) / self._ramp)
        for path, weight in self._weights.items():
            stays = self.stays[path]
            groups = stays.numel()
            kept = max(1, math.floor(self.options.keep * groups + 1e-9))
            due = math.floor(share * (groups - kept) + 1e-9) - int((~stays).sum())
            if due > 0:
                norms = tap_norms(weight).masked_fill(~stays, math.inf).flatten()
                stays.view(-1)[norms.argsort(stable=True)[:due]] = False
            weight.mul_(stays)

    @torch.no_grad()
    def hold(self, model: nn.Module) -> None:
        """Set the fixed groups of another model of the same structure to zero."""
        for path, stays in self.stays.items():
            _weight(model.get_submodule(path)).mul_(stays)

    def restore(self, stays: dict[str, Tensor]) -> None:
        """Take over what stays in a run that goes on."""
        self.stays = {path: stays[path].to(now.device) for path, now in self.stays.items()}


def tap_norms(weight: Tensor) -> Tensor:
    """(C, kh, kw) norms over all filters of a (N, C, kh, kw) weight."""
    return torch.linalg.vector_norm(weight.detach(), dim=0)


def _chosen(model: nn.Module, patterns: tuple[str, ...] | None) -> dict[str, nn.Parameter]:
    """The weights of the convolutions that the patterns name, by path; a tied one once."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    faults = {path: _fault(module) for path, module in found.items()}
    chosen = [path for path, fault in faults.items() if fault is None]
    if patterns is not None:
        unfit = [p for p in patterns if not any(fnmatchcase(path, p) for path in found)]
        if unfit:
            raise OptionError(
                f"group sparsity: no convolution of the model fits {', '.join(map(repr, unfit))}; "
                f"it has {', '.join(found) or 'none'}"
            )
        chosen = [path for path in found if any(fnmatchcase(path, p) for p in patterns)]
        for path in chosen:
            if faults[path] is not None:
                raise OptionError(
                    f"group sparsity: taps of {path} cannot be taken out: {faults[path]}; leave it "
                    "out of layers"
                )
    if not chosen:
        why = "; ".join(f"{path}: {fault}" for path, fault in list(faults.items())[:3])
        raise ModelError(
            "group sparsity: the model has no convolution whose taps can be taken out"
            + (f" ({why})" if why else "")
        )
    weights = {path: _weight(found[path]) for path in chosen}
    first = {id(weight): path for path, weight in reversed(weights.items())}
    return {path: weight for path, weight in weights.items() if first[id(weight)] == path}


def _fault(module: nn.Conv2d) -> str | None:
    fault = not_thinnable(module)
    if fault is None and not module.weight.requires_grad:
        fault = "its weights are frozen"
    return fault


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
