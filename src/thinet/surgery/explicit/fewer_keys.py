"""Attention of all tokens to keys and values of fewer places: (n, l, c) -> (n, l, c)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from thinet.surgery.explicit.heads import Heads


class ExplicitReducedAttention(Heads):
    """Twins' and PVT's: a strided convolution, or pooling, makes the places of the keys."""

    q: nn.Linear
    kv: nn.Linear
    sr: nn.Module | None
    norm: nn.Module | None

    def _reduced(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(n, l, c) -> (n, places, c)."""
        pool: Any = getattr(self, "pool", None)
        act: Any = getattr(self, "act", None)
        if self.sr is None or self.norm is None:
            return x
        x = x.transpose(1, 2).unflatten(2, tuple(size))
        x = self.sr(x if pool is None else pool(x)).flatten(2).transpose(1, 2)
        return self.norm(x) if act is None else act(self.norm(x))

    def _attended(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        k, v = self._apart(self.kv(self._reduced(x, size)), 2)
        return self._project(self._attend(self._heads(self.q(x)), k, v))


class ExplicitSubSampled(ExplicitReducedAttention):
    """Twins'."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self._attended(x, size)


class ExplicitPyramid(ExplicitReducedAttention):
    """PVT's, second version."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        return self._attended(x, feat_size)


class ExplicitPooledKeys(Heads):
    """Next-ViT's: tokens are averaged along the sequence."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    sr: nn.Module | None
    norm: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        fewer = x
        if self.sr is not None and self.norm is not None:
            fewer = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        parts = (self._heads(f(y)) for f, y in ((self.q, x), (self.k, fewer), (self.v, fewer)))
        return self._project(self._attend(*parts))
