"""Swin's second version as timm has it: cosines of queries and keys, in windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinet.surgery.explicit.heads import Sizes, Stacked


class ExplicitCosineAttention(Stacked):
    """(windows, l, c) -> the same; `bias` is (heads, l, l), `mask` (windows an image, l, l)."""

    logit_scale: Tensor

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {"scale": 1.0}

    def _within(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._stacked(x)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp().view(-1, 1, 1)
        scores = scores * scale + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self._dropped(scores.softmax(-1)) @ v
        return self._project(out.transpose(1, 2).flatten(2))


class ExplicitContinuousBias(ExplicitCosineAttention):
    """The original's: a small network of log-spaced distances, squashed."""

    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias = 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))
        return self._within(x, bias, mask)


class ExplicitMetaBias(ExplicitCosineAttention):
    """The other implementation's: one network for every pair of cells."""

    meta_mlp: nn.Module
    relative_coordinates_log: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self.meta_mlp(self.relative_coordinates_log).transpose(0, 1)
        return self._within(x, bias.unflatten(1, (x.shape[1], x.shape[1])), mask)
