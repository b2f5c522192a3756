"""Random weights for an architecture: the honest baseline of every cut network."""

from __future__ import annotations

import torch
from torch import nn

from thinet.errors import ModelError
from thinet.paths import named_modules
from thinet.seeds import seeded
from thinet.trace.replica import copied


def from_scratch(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy with new random weights, to train a cut architecture for the same budget without what
    the dense network knew (Liu et al., Rethinking the Value of Network Pruning, ICLR 2019).

    Every module is asked to draw its own weights (`reset_parameters`); what a model's constructor
    did to them beside that is not done again.

    Args:
        seed: of the weights; the global random state stays as it is.

    Raises:
        ModelError: a module has parameters and cannot draw them; says which.
    """
    fresh = copied(model)
    with seeded("scratch", seed):
        for path, module in named_modules(fresh).items():
            own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
            before = [p.detach().clone() for p in own]
            draw = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if draw is not None:
                draw()
            elif own:
                raise ModelError(
                    f"{path or 'the model'} ({type(module).__name__}) has parameters and no "
                    "reset_parameters() that draws them anew; give it one"
                )
            drawn = [
                (old, new)
                for old, new in zip(before, own, strict=True)
                if old.ndim > 1 and bool((old != old.flatten()[0]).any())
            ]
            if drawn and all(torch.equal(old, new) for old, new in drawn):
                raise ModelError(
                    f"the reset_parameters() of {path or 'the model'} ({type(module).__name__}) "
                    "leaves its weights as they are, as under torch.nn.utils.weight_norm; fold "
                    "such a norm into the weights first (torch.nn.utils.remove_weight_norm)"
                )
    return fresh
