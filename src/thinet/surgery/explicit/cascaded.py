"""Attention whose heads take a part of the channels each and hand their results on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ExplicitCascade(nn.Module):
    """EfficientViT's (MSRA): (n, c, h, w) -> (n, c, h, w).

    Each head is as wide as its own convolutions are, where timm's divides the channels evenly.
    """

    qkvs: nn.ModuleList
    dws: nn.ModuleList
    proj: nn.Module
    scale: float
    get_attention_biases: Callable[[torch.device], Tensor]

    @staticmethod
    def sizes(old: Any) -> dict[str, int | float | bool]:
        for layer in (*old.qkvs, *old.dws):
            _first(layer)  # of another kind, and there is no such form
        return {}

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split([_first(qkv).in_channels for qkv in self.qkvs], 1)
        biases = self.get_attention_biases(x.device)
        found: list[Tensor] = []
        for part, bias, qkv, mix in zip(parts, biases, self.qkvs, self.dws, strict=True):
            given = qkv(found[-1] + part if found else part)
            keys = _first(mix).out_channels
            q, k, v = given.split([keys, keys, given.shape[1] - 2 * keys], 1)
            q, k, v = (y.flatten(2) for y in (mix(q), k, v))
            scores = (q * self.scale).transpose(-2, -1) @ k + bias
            found.append((v @ scores.softmax(-1).transpose(-2, -1)).unflatten(2, x.shape[2:]))
        return self.proj(torch.cat(found, 1))


def _first(layer: nn.Module) -> nn.Conv2d:
    """The convolution that a layer is or begins with."""
    found = next(iter(layer.children()), layer) if isinstance(layer, nn.Sequential) else layer
    if not isinstance(found, nn.Conv2d):
        raise AttributeError(f"{type(layer).__name__} does not begin with a convolution")
    return found
