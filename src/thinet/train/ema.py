"""An exponential moving average of the weights and running statistics."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from thinet.trace.replica import copied


class Ema:
    """A copy of a model that follows it: average = d * average + (1 - d) * model after each step.

    d grows from 0.18 to `decay` as min(decay, (1 + n) / (10 + n)) over the updates n, so that short
    runs do not keep their start. Integer buffers are copied. `model` is the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copied(model).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours = chain(self.model.parameters(), self.model.buffers())
        for average, value in zip(ours, chain(model.parameters(), model.buffers()), strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)
