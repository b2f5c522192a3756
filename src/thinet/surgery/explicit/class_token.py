"""Attention of one query, the class token, to all tokens: (n, l, c) -> (n, 1, c)."""

from __future__ import annotations

from torch import Tensor, nn

from thinet.surgery.explicit.heads import Heads


class ExplicitClassAttention(Heads):
    """CaiT's, with one layer each for the query, the keys and the values."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self._heads(f(part)) for f, part in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return self._project(self._attend(q, k, v))


class ExplicitCrossAttention(Heads):
    """CrossViT's: the same with other names."""

    wq: nn.Linear
    wk: nn.Linear
    wv: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        layers = ((self.wq, x[:, :1]), (self.wk, x), (self.wv, x))
        return self._project(self._attend(*(self._heads(f(part)) for f, part in layers)))
