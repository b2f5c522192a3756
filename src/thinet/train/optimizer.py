"""The optimizer of a run: fresh SGD, or a copy of one that goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from thinet.errors import OptionError
from thinet.trace import replica
from thinet.train.config import FinetuneConfig
from thinet.train.processes import Processes


def sgd(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """SGD with momentum over all parameters that are trained.

    Without `decay_norm_and_bias`, parameters of fewer than two dimensions are not decayed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if config.decay_norm_and_bias or p.ndim > 1]
    spared = [p for p in trained if not config.decay_norm_and_bias and p.ndim <= 1]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def copied(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: FinetuneConfig,
    processes: Processes,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of a model on the device, and of its optimizer, or fresh SGD where there is none.

    Raises:
        OptionError: the optimizer holds a parameter that is not the model's.
    """
    if optimizer is not None:
        ours = {id(p) for p in model.parameters()}
        if any(id(p) not in ours for g in optimizer.param_groups for p in g["params"]):
            raise OptionError(
                "the optimizer holds parameters that are not the model's; make it over "
                "model.parameters(), or let thinet.cut carry it over with the model"
            )
    memo: dict[int, Any] = {}
    model = replica.copied(model, memo)
    optimizer = copy.deepcopy(optimizer, memo)  # over the copy's parameters
    model.to(processes.device)
    processes.same_model(model)
    if optimizer is None:
        return model, sgd(model, config)
    optimizer.load_state_dict(optimizer.state_dict())  # its state follows to the device
    return model, optimizer
