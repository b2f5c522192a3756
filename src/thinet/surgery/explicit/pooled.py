"""Attention whose queries or values are gathered from neighbouring places of an image."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from thinet.surgery.explicit.heads import Heads, Sizes, Stacked


class ExplicitOutlook(Heads):
    """VOLO's: (n, h, w, c) -> (n, h, w, c). Weights come from the place itself, without keys."""

    v: nn.Linear
    attn: nn.Linear
    unfold: nn.Module
    pool: nn.Module
    kernel_size: int
    padding: int
    stride: int

    def forward(self, x: Tensor) -> Tensor:
        size, area = (x.shape[1], x.shape[2]), self.kernel_size**2
        places = math.prod(math.ceil(side / self.stride) for side in size)
        v = self.unfold(self.v(x).permute(0, 3, 1, 2))
        v = v.view(len(x), self.num_heads, -1, area, places).permute(0, 1, 4, 3, 2)
        weights = self.attn(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        weights = weights.view(len(x), places, self.num_heads, area, area).permute(0, 2, 1, 3, 4)
        weights = self._dropped((weights * self.scale).softmax(-1))
        out = (weights @ v).permute(0, 1, 4, 3, 2).flatten(1, 3)
        out = F.fold(out, size, self.kernel_size, padding=self.padding, stride=self.stride)
        return self._project(out.permute(0, 2, 3, 1))


class ExplicitMaskUnits(Stacked):
    """Hiera's: (n, l, c) -> (n, l / q_stride, c'), in windows or over all tokens."""

    heads: int
    q_stride: int
    window_size: int
    use_mask_unit_attn: bool

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {"num_heads": old.heads}

    def forward(self, x: Tensor) -> Tensor:
        if self.use_mask_unit_attn:
            windows = x.shape[1] // (self.q_stride * self.window_size)
            x = x.unflatten(1, (-1, windows)).transpose(1, 2)
        q, k, v = self._stacked(x)
        if self.q_stride > 1:
            q = q.unflatten(-2, (self.q_stride, -1)).amax(-3)
        out = self._attend(q, k, v)
        if self.use_mask_unit_attn:
            out = out.transpose(1, 2).flatten(1, 2)
        return self._project(out)


class ExplicitPooledQueries(Stacked):
    """SAM 2's: (n, h, w, c) -> (n, h', w', c'). Queries are pooled where a stage begins."""

    q_pool: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        q, k, v = self._stacked(x.flatten(1, 2))
        if self.q_pool is not None:
            q = q.transpose(-2, -1).flatten(1, 2).unflatten(2, size)
            q = self.q_pool(q)
            size = q.shape[2:]
            q = q.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(-2, -1)
        return self._project(self._attend(q, k, v)).unflatten(1, size)
