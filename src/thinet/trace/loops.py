"""PyTorch's own loops over time steps, thousands of operations for one layer.

No number of a model's own can be inside: where the inputs follow a cut the loop does. So a trace
that is only compared with another may pass by all its operations but those of one step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOOPS = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))


def is_loop(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is one over a whole tensor, not over packed sequences."""
    return func in LOOPS and len(args) == 9 and isinstance(args[3], bool)


def one_step(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Results without data, of all steps, by way of a single one.

    Args:
        args: input, states, weights, and six settings, the last whether the batch comes first.
    """
    x, batch_first = args[0], args[8]
    time = 1 if batch_first else 0
    out, *states = func(x.narrow(time, 0, 1), *args[1:])
    shape = list(out.shape)
    shape[time] = x.shape[time]
    if batch_first:  # steps come first in memory all the same
        return out.new_empty(shape[1], shape[0], *shape[2:]).transpose(0, 1), *states
    return out.new_empty(shape), *states
