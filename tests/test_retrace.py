"""Groups that do not follow a cut are locked, each once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import thinet


class CountsItsChannels(nn.Module):
    """The number of channels scales a tensor that has none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.outer(inner) + x * inner.shape[1]


def test_twins_that_are_both_culprits_are_locked_once() -> None:
    model = nn.Sequential(CountsItsChannels(), CountsItsChannels()).eval()
    groups = thinet.find_groups(model, torch.randn(1, 3, 4, 4))
    locked = {g.name: g.locked for g in groups if g.name.endswith("inner")}
    assert list(locked) == ["0.inner", "1.inner"]
    assert all(reason and "aten.mul in " in reason for reason in locked.values())
