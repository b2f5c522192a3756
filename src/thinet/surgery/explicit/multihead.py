"""`nn.MultiheadAttention` with sizes of its own, which need not be those of the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExplicitMultiheadAttention(nn.MultiheadAttention):
    """The same parameters, names, arguments and results; heads and head width are attributes.

    `num_heads` and `head_dim` may both become smaller; `scale` stays what it was.
    """

    scale: float

    @staticmethod
    def sizes(old: nn.MultiheadAttention) -> dict[str, int | float | bool]:
        """Attributes that `nn.MultiheadAttention` derives from its width or does not have."""
        return {"scale": old.head_dim**-0.5, "_qkv_same_embed_dim": False}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`: (L, N, E), or (N, L, E) with `batch_first`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        alone = query is key and key is value
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._together(query) if alone else self._apart(query, key, value)
        mask = self._mask(q, key_padding_mask, attn_mask)
        k, v, mask = self._extended(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            causal = is_causal and key_padding_mask is None
            mask = None if causal else mask
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        out = out.transpose(1, 2).flatten(2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, heads x width) -> (N, heads, L, width)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _together(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is None:
            return self._apart(x, x, x)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def _apart(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weights: tuple[Tensor, ...] = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.unflatten(0, (3, -1)).unbind(0)
        )
        biases: tuple[Tensor | None, ...] = (
            (None, None, None)
            if self.in_proj_bias is None
            else self.in_proj_bias.unflatten(0, (3, -1)).unbind(0)
        )
        return tuple(
            self._heads(F.linear(x, w, b))
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )

    def _mask(
        self, q: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one addend that broadcasts to (N, heads, L, S)."""
        padding = F._canonical_mask(
            mask=key_padding_mask,
            mask_name="key_padding_mask",
            other_type=F._none_or_dtype(attn_mask),
            other_name="attn_mask",
            target_type=q.dtype,
        )
        mask = F._canonical_mask(
            mask=attn_mask,
            mask_name="attn_mask",
            other_type=None,
            other_name="",
            target_type=q.dtype,
            check_other=False,
        )
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the learned extra key and value, and the zero ones, where the module has them."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            rows = (self._heads(b).expand(len(k), -1, -1, -1) for b in (self.bias_k, self.bias_v))
            k, v = (torch.cat([x, row], dim=2) for x, row in zip((k, v), rows, strict=True))
            extra += 1
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            extra += 1
        return k, v, mask if mask is None or not extra else F.pad(mask, (0, extra))
