"""An optimizer for a cut model that goes on where that of the dense model was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from thinet.errors import OptionError
from thinet.plan import Plan
from thinet.surgery.apply import sliced
from thinet.types import Slice


def cut_optimizer(
    optimizer: Optimizer, model: nn.Module, small: nn.Module, plan: Plan
) -> Optimizer:
    """A copy of the optimizer for the cut model's parameters.

    Momenta and other state of a parameter's shape lose what the parameter lost; counters,
    hyper-parameters, parameter groups and their order stay. The given one is left as it was.

    Raises:
        OptionError: the state of a cut parameter has another shape than the parameter, or the
            optimizer has no parameter of the model.
    """
    theirs = dict(small.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    cuts: dict[int, list[Slice]] = {}
    first = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    for piece in plan.kept:
        for key, name in first.items():
            if name == piece.parameter:
                cuts.setdefault(key, []).append(piece)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptionError(
            "LBFGS keeps its state over all parameters at once, so it cannot be cut with them; "
            "make a new optimizer for the cut model"
        )
    if not any(id(p) in names for group in optimizer.param_groups for p in group["params"]):
        raise OptionError(
            "the optimizer has none of the model's parameters; give the one that trains this model"
        )
    memo: dict[int, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            # What is not of this model, such as a loss with weights, is shared.
            memo[id(parameter)] = parameter if name is None else theirs[name]
    states: dict[torch.Tensor, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        if id(parameter) in cuts:
            pieces = cuts[id(parameter)]
            made = _sliced_state(names[id(parameter)], parameter, state, pieces)
            states[memo[id(parameter)]] = made
    new = copy.deepcopy(optimizer, memo)
    for parameter, state in states.items():
        new.state[parameter] = state
    return new


def _sliced_state(
    name: str, parameter: torch.Tensor, state: Mapping[str, Any], pieces: list[Slice]
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            made[key] = sliced({pieces[0].parameter: value}, pieces)[pieces[0].parameter]
        elif isinstance(value, (list, dict)) or (isinstance(value, torch.Tensor) and value.ndim):
            raise OptionError(
                f"the optimizer keeps {key!r} of {name} in another shape than the parameter's "
                f"{tuple(parameter.shape)}, so it cannot be cut with it; make a new optimizer for "
                "the cut model"
            )
        else:
            made[key] = copy.deepcopy(value)
    return made
