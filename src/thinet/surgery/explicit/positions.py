"""Position biases of timm with their number of heads read off the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from thinet.surgery.explicit.heads import Sizes


class ExplicitRelPosBias(nn.Module):
    """A table of biases: `get_bias()` is (1, heads, l, l)."""

    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    bias_shape: tuple[int, int, int]

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {}

    def forward(self, attn: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return attn + self.get_bias()

    def get_bias(self) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index]
        bias = bias.unflatten(0, self.bias_shape[:2]).permute(2, 0, 1)
        return bias.unsqueeze(0).contiguous()


class ExplicitRelPosMlp(nn.Module):
    """A small network makes the biases: `get_bias()` is (1, heads, l, l)."""

    mlp: nn.Module
    rel_coords_log: Tensor
    relative_position_index: Tensor
    bias_shape: tuple[int, int, int]
    bias_act: nn.Module
    bias_gain: float | None
    prefix_tokens: int

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {}

    def forward(self, attn: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return attn + self.get_bias()

    def get_bias(self) -> Tensor:
        bias = self.mlp(self.rel_coords_log).flatten(0, -2)[self.relative_position_index]
        bias = self.bias_act(bias.unflatten(0, self.bias_shape[:2]).permute(2, 0, 1))
        if self.bias_gain is not None:
            bias = self.bias_gain * bias
        if self.prefix_tokens:
            bias = F.pad(bias, [self.prefix_tokens, 0, self.prefix_tokens, 0])
        return bias.unsqueeze(0).contiguous()


class ExplicitRelPosLookup(nn.Module):
    """TensorFlow's way: a table of distances, read by one-hot rows. `get_bias()` is (heads, l, l).

    The original's einsum takes another way for one head.
    """

    relative_position_bias_table: Tensor
    height_lookup: Tensor
    width_lookup: Tensor

    @staticmethod
    def sizes(old: Any) -> Sizes:
        return {}

    def forward(self, attn: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        return attn + self.get_bias()

    def get_bias(self) -> Tensor:
        rows, columns = self.height_lookup, self.width_lookup
        bias = rows.flatten(0, 1) @ self.relative_position_bias_table @ columns.flatten(0, 1).T
        bias = bias.unflatten(2, columns.shape[:2]).unflatten(1, rows.shape[:2])
        return bias.transpose(2, 3).flatten(3, 4).flatten(1, 2)
