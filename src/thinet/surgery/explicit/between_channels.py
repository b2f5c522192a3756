"""Attention between the channels of a head instead of between tokens: (n, l, c) -> (n, l, c)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from thinet.surgery.explicit.heads import Sizes, Stacked


class ExplicitCrossCovariance(Stacked):
    """XCiT's and EdgeNeXt's: cosines between channels, times a temperature for each head."""

    temperature: Tensor

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-2, -1) for part in self._stacked(x))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if getattr(self, "fused_attn", False):
            out = F.scaled_dot_product_attention(q * self.temperature, k, v, scale=self.scale)
        else:
            scores = (q @ k.transpose(-2, -1)) * self.temperature
            out = self._dropped(scores.softmax(-1)) @ v
        return self._project(out.permute(0, 3, 1, 2).flatten(2))


class ExplicitChannelAttention(Stacked):
    """DaViT's, first version."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._stacked(x)
        weights = ((k * self.scale).transpose(-1, -2) @ v).softmax(-1)
        out = (weights @ q.transpose(-1, -2)).transpose(-1, -2)
        return self._project(out.transpose(1, 2).flatten(2))


class ExplicitScaledChannelAttention(Stacked):
    """DaViT's, second version: the scale may be that of the number of tokens."""

    groups: int
    dynamic_scale: bool

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {"num_heads": old.groups, "scale": old.head_dim**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._stacked(x)
        scale = x.shape[1] ** -0.5 if self.dynamic_scale else self.scale
        weights = ((q * scale).transpose(-1, -2) @ k).softmax(-1)
        out = (weights @ v.transpose(-1, -2)).transpose(-1, -2)
        return self._project(out.transpose(1, 2).flatten(2))


class ExplicitFactorised(Stacked):
    """CoaT's: keys are normalised over tokens; positions by a convolution of the values."""

    crpe: Any

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = self._stacked(x)
        out = self.scale * (q @ (k.softmax(2).transpose(-1, -2) @ v))
        out = out + self.crpe(q, v, size=size)
        return self._project(out.transpose(1, 2).flatten(2))
