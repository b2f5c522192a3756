"""Attention between all tokens of a sequence, an image or a window, as timm's models have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinet.surgery.explicit.heads import Heads, Stacked


class ExplicitAttention(Stacked):
    """Attention and nothing else: (..., n, c) -> (..., n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._project(self._attend(*self._stacked(x)))


class ExplicitGridAttention(Stacked):
    """VOLO's: (n, h, w, c) -> (n, h, w, c)."""

    def forward(self, x: Tensor) -> Tensor:
        out = self._attend(*self._stacked(x.flatten(1, 2)))
        return self._project(out.unflatten(1, x.shape[1:3]))


class ExplicitMapAttention(Stacked):
    """FastViT's: (n, c, h, w) -> (n, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        out = self._project(self._attend(*self._stacked(x.flatten(2).transpose(1, 2))))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class ExplicitBlockAttention(Stacked):
    """NesT's, within blocks: (n, blocks, l, c) -> the same. The heads' channels interleave."""

    def forward(self, x: Tensor) -> Tensor:
        out = self._attend(*self._stacked(x))
        out = out.unflatten(-1, (self.num_heads, -1)).transpose(-2, -1).flatten(-2)
        return self._project(out)


class ExplicitSharedBiasAttention(Stacked):
    """BEiT's: (n, l, c) -> (n, l, c), with biases of positions, its own and shared ones."""

    _get_rel_pos_bias: Callable[[], Tensor]
    relative_position_bias_table: Tensor | None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        (q, k, v), bias = self._stacked(x), shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        return self._project(self._attend(q, k, v, bias))


class ExplicitRelPosAttention(Stacked):
    """Relative position biases by a module: (n, l, c) -> (n, l, c)."""

    rel_pos: Any
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        q, k, v = self._stacked(x)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return self._project(self._attend(self.q_norm(q), self.k_norm(k), v, bias))


class ExplicitRotaryAttention(Stacked):
    """EVA's: (n, l, c) -> (n, l, c), with rotary positions, norms and a gate where it has them."""

    num_prefix_tokens: int
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        gate: Any = getattr(self, "gate", None)
        layers: Any = [getattr(self, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if layers[0] is None:
            q, k, v = self._stacked(x)
        else:
            q, k, v = (self._heads(layer(x)) for layer in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotated(part, rope).type_as(v) for part in (q, k))
        if is_causal:
            attn_mask = _causal(q, attn_mask)
        out = self.norm(self._attend(q, k, v, attn_mask))
        return self._project(out if gate is None else out * gate(x).sigmoid())

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        first, rest = x.tensor_split([self.num_prefix_tokens], dim=2)
        half = bool(getattr(self, "rotate_half", False))
        return torch.cat([first, apply_rot_embed_cat(rest, rope, half=half)], dim=2)


def _causal(q: Tensor, mask: Tensor | None) -> Tensor:
    """(l, l) or the mask's shape, boolean: nobody looks ahead."""
    length = q.shape[-2]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return past
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, float("-inf"))


class ExplicitDecomposedAttention(Stacked):
    """SAM's: (n, h, w, c) -> (n, h, w, c), positions by row and column or rotary."""

    use_rel_pos: bool
    rope: Any
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat
        from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

        size = x.shape[1], x.shape[2]
        q, k, v = self._stacked(x.flatten(1, 2))
        q, k, bias = self.q_norm(q), self.k_norm(k), None
        if self.use_rel_pos:
            rows, columns = self.get_parameter("rel_pos_h"), self.get_parameter("rel_pos_w")
            bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), rows, columns, size, size)
            bias = bias.unflatten(0, (-1, self.num_heads))
        elif self.rope is not None:
            rope = self.rope.get_embed()
            q, k = (apply_rot_embed_cat(part, rope).type_as(v) for part in (q, k))
        out = self._project(self._attend(q, k, v, bias))
        return out.unflatten(1, size)


class ExplicitTalkingHeads(Stacked):
    """CaiT's: (n, l, c) -> (n, l, c). Heads mix before and after the softmax."""

    proj_l: nn.Linear
    proj_w: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._stacked(x)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = self.proj_l(scores.movedim(1, -1)).movedim(-1, 1).softmax(-1)
        weights = self.proj_w(weights.movedim(1, -1)).movedim(-1, 1)
        return self._project((self._dropped(weights) @ v).transpose(1, 2).flatten(2))


class ExplicitGatedPositions(Heads):
    """ConViT's: (n, l, c) -> (n, l, c). Weights from contents and from positions, by a gate."""

    qk: nn.Linear
    v: nn.Linear
    pos_proj: nn.Linear
    gating_param: Tensor
    rel_indices: Tensor | None
    get_rel_indices: Callable[[int], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        weights = self.get_attention(x)
        out = (weights @ self._heads(self.v(x))).transpose(1, 2).flatten(2)
        return self._project(out)

    def get_attention(self, x: Tensor) -> Tensor:
        """(n, heads, l, l)."""
        assert self.rel_indices is not None
        q, k = self._apart(self.qk(x), 2)
        contents = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1)
        positions = self.pos_proj(self.rel_indices.expand(len(x), -1, -1, -1))
        positions = positions.permute(0, 3, 1, 2).softmax(-1)
        gate = torch.sigmoid(self.gating_param.view(1, -1, 1, 1))
        weights = (1.0 - gate) * contents + gate * positions
        return self._dropped(weights / weights.sum(-1).unsqueeze(-1))


class ExplicitGlobalQueries(Stacked):
    """GCViT's: (windows, l, c) -> the same. Queries of its own, or one set for all windows."""

    use_global: bool
    rel_pos: nn.Module

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if self.use_global and q_global is not None:
            k, v = self._apart(self.qkv(x), 2)
            q = self._heads(q_global.flatten(1, -2).repeat_interleave(len(x) // len(q_global), 0))
        else:
            q, k, v = self._stacked(x)
        scores = self.rel_pos((q * self.scale) @ k.transpose(-2, -1))
        out = self._dropped(scores.softmax(-1)) @ v
        return self._project(out.transpose(1, 2).flatten(2))


class ExplicitLocalAttention(Stacked):
    """Twins', within windows of an image: (n, h x w, c) -> the same."""

    ws: int

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (high, wide), side = size, self.ws
        x = F.pad(x.unflatten(1, (high, wide)), (0, 0, 0, -wide % side, 0, -high % side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4)
        out = self._attend(*self._stacked(x)).unflatten(3, (side, side)).transpose(2, 3)
        out = out.flatten(3, 4).flatten(1, 2)[:, :high, :wide]
        return self._project(out.flatten(1, 2))


class ExplicitLatentPool(Heads):
    """timm's attention pooling: (n, l, c) -> (n, c), or (n, latents, c) unpooled."""

    q: nn.Module
    kv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    latent: Tensor
    pool: str

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        places: Any = getattr(self, "pos_embed", None)
        mlp: Any = getattr(self, "mlp", None)
        if places is not None:
            x = x + places.unsqueeze(0).to(x.dtype)
        q = self._heads(self.q(self.latent.expand(len(x), -1, -1)))
        k, v = self._apart(self.kv(x), 2)
        x = self._project(self._attend(self.q_norm(q), self.k_norm(k), v, attn_mask))
        if mlp is not None:
            x = x + mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x
