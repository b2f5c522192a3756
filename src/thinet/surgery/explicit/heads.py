"""What explicit forms of attention share: the number of heads and the scale are attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sizes = dict[str, int | float | bool]


class Heads(nn.Module):
    """Attention whose last layer `proj` takes `num_heads` times the width of a head.

    Either may become smaller; `scale` stays what it was.
    """

    num_heads: int
    scale: float
    proj: nn.Linear

    @staticmethod
    def sizes(old: Any) -> Sizes:
        """Attributes that the original derives from its width or does not have."""
        return {}

    def _apart(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., n, parts x heads x width) -> `parts` of (..., heads, n, width)."""
        x = x.unflatten(-1, (parts, self.num_heads, -1))
        return x.movedim(-3, 0).transpose(-3, -2).unbind(0)

    def _heads(self, x: Tensor) -> Tensor:
        """(..., n, heads x width) -> (..., heads, n, width)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., heads, n, width), and the same for keys and values -> (..., n, heads x width).

        `bias` is added to the scores, or says where to look if it is boolean.
        """
        drop: Any = getattr(self, "attn_drop", None)
        if getattr(self, "fused_attn", False):
            rate = drop.p if drop is not None and self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, bias, rate, scale=self.scale)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            if bias is not None and bias.dtype == torch.bool:
                scores = scores.masked_fill(~bias, float("-inf"))
            elif bias is not None:
                scores = scores + bias
            out = self._dropped(scores.softmax(-1)) @ v
        return out.transpose(-3, -2).flatten(-2)

    def _dropped(self, weights: Tensor) -> Tensor:
        drop: Any = getattr(self, "attn_drop", None)
        return weights if drop is None else drop(weights)

    def _project(self, x: Tensor) -> Tensor:
        drop: Any = getattr(self, "proj_drop", None)
        return self.proj(x) if drop is None else drop(self.proj(x))


class Stacked(Heads):
    """Queries, keys and values come from one layer, their biases perhaps from three parameters."""

    qkv: nn.Linear

    def _stacked(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., n, c) -> queries, keys and values (..., heads, n, width)."""
        if getattr(self, "q_bias", None) is None:
            return self._apart(self.qkv(x), 3)
        parts: Any = [getattr(self, f"{name}_bias") for name in "qkv"]
        bias = torch.cat(parts)
        if getattr(self, "qkv_bias_separate", False):
            return self._apart(self.qkv(x) + bias, 3)
        return self._apart(F.linear(x, self.qkv.weight, bias), 3)
