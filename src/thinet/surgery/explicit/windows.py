"""torchvision's window attentions with sizes of their own. They are told by name, not imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExplicitShiftedWindows(nn.Module):
    """Swin's attention, both versions: (n, h, w, c) -> (n, h, w, c).

    The same parameters and attributes as torchvision's; `head_dim` and `scale` are added.
    """

    qkv: nn.Linear
    proj: nn.Linear
    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    head_dim: int
    scale: float
    attention_dropout: float
    dropout: float
    relative_position_index: Tensor

    @staticmethod
    def sizes(old: Any) -> dict[str, int | float | bool]:
        width = old.qkv.weight.shape[0] // 3 // old.num_heads
        return {"head_dim": width, "scale": width**-0.5}

    def forward(self, x: Tensor) -> Tensor:
        bias = self.position_bias()
        _, high, wide, _ = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -wide % columns, 0, -high % rows))
        n, h, w, _ = x.shape
        down = 0 if rows >= h else self.shift_size[0]
        right = 0 if columns >= w else self.shift_size[1]
        moved = down + right > 0
        if moved:
            x = x.roll((-down, -right), (1, 2))
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(0, 2)
        mask = self._apart(x, (h, w), (rows, columns), (down, right)) if moved else None
        x = self._attend(x, bias, mask)
        x = F.dropout(F.linear(x, self.proj.weight, self.proj.bias), self.dropout, self.training)
        x = x.unflatten(1, (rows, columns)).unflatten(0, (n, h // rows, w // columns))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if moved:
            x = x.roll((down, right), (1, 2))
        return x[:, :high, :wide].contiguous()

    def position_bias(self) -> Tensor:
        """(1, heads, window, window)."""
        cells = self.window_size[0] * self.window_size[1]
        if hasattr(self, "cpb_mlp"):
            mlp = self.get_submodule("cpb_mlp")
            table: Tensor = mlp(self.get_buffer("relative_coords_table")).flatten(0, -2)
        else:
            table = self.get_parameter("relative_position_bias_table")
        bias = table[self.relative_position_index].unflatten(0, (cells, cells))
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        return 16 * torch.sigmoid(bias) if hasattr(self, "cpb_mlp") else bias

    def _attend(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """(windows, cells, c) -> (windows, cells, heads x width)."""
        cosine = getattr(self, "logit_scale", None)
        added = self.qkv.bias
        if cosine is not None and added is not None:  # keys have no bias
            q, k, v = added.unflatten(0, (3, -1)).unbind(0)
            added = torch.stack([q, torch.zeros_like(k), v]).flatten()
        qkv = F.linear(x, self.qkv.weight, added)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cosine is None:
            scores = (q * self.scale) @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            scores = scores * cosine.clamp(max=math.log(100.0)).exp()
        scores = scores + bias
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
            scores = scores.flatten(0, 1)
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)

    def _apart(
        self, x: Tensor, whole: Sequence[int], window: Sequence[int], shift: Sequence[int]
    ) -> Tensor:
        """(windows of one input, cells, cells): -100 between what the shift brought together.

        Sizes, windows and shifts are of any number of dimensions.
        """
        region = x.new_zeros(whole)
        parts = [
            (slice(0, -size), slice(-size, -by), slice(-by, None))
            for size, by in zip(window, shift, strict=True)
        ]
        for number, part in enumerate(product(*parts)):
            region[part] = number
        for dim, size in reversed(list(enumerate(window))):
            region = region.unflatten(dim, (-1, size))
        places = range(region.ndim)
        region = region.permute(*places[::2], *places[1::2])
        region = region.flatten(len(window)).flatten(0, len(window) - 1)
        apart = region[:, None] - region[:, :, None]
        return apart.masked_fill(apart != 0, -100.0)


class ExplicitShiftedVolumes(ExplicitShiftedWindows):
    """Swin's attention over time too: (n, t, h, w, c) -> (n, t, h, w, c).

    A window larger than the input becomes as large as the input, and is not shifted.
    """

    relative_position_bias_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        whole = x.shape[1:4]
        fits = [size > window for size, window in zip(whole, self.window_size, strict=True)]
        t, h, w = (min(pair) for pair in zip(whole, self.window_size, strict=True))
        shift = [by if moves else 0 for by, moves in zip(self.shift_size, fits, strict=True)]
        cells = t * h * w
        index = self.relative_position_index[:cells, :cells].flatten()
        bias = self.relative_position_bias_table[index].unflatten(0, (cells, cells))
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        x = F.pad(x, (0, 0, 0, -whole[2] % w, 0, -whole[1] % h, 0, -whole[0] % t))
        n, padded = x.shape[0], x.shape[1:4]
        if any(shift):
            x = x.roll([-by for by in shift], (1, 2, 3))
        x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)
        mask = self._apart(x, padded, (t, h, w), shift) if any(shift) else None
        x = self._attend(x, bias, mask)
        x = F.dropout(F.linear(x, self.proj.weight, self.proj.bias), self.dropout, self.training)
        x = x.unflatten(1, (t, h, w))
        x = x.unflatten(0, (n, padded[0] // t, padded[1] // h, padded[2] // w))
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x[:, : whole[0], : whole[1], : whole[2]].contiguous()


class ExplicitRelativeAttention(nn.Module):
    """MaxViT's attention: (n, windows, cells, c) -> the same, with torchvision's parameters."""

    to_qkv: nn.Linear
    merge: nn.Linear
    n_heads: int
    head_dim: int
    max_seq_len: int
    scale_factor: float
    relative_position_index: Tensor
    relative_position_bias_table: Tensor

    @staticmethod
    def sizes(old: Any) -> dict[str, int | float | bool]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.unflatten(0, (self.max_seq_len, self.max_seq_len)).permute(2, 0, 1)
        weights = (q @ (k * self.scale_factor).transpose(-2, -1) + bias).softmax(-1)
        return self.merge((weights @ v).transpose(2, 3).flatten(3))
