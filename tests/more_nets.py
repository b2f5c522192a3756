"""Tiny nets beyond chains of convolutions: channels mixed, inputs and outputs, sequences.

Same conventions as `tests.nets`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import view_nets
from tests.nets import Expected, Net, TwoConvNet

# --- channels that look at each other: removing one changes the rest ------------------------


class MixedChannelsNet(TwoConvNet):
    """Base: conv1's channels may go only if the cut is exact, and here it never is."""

    expected: ClassVar[Expected] = {"conv1": "locked", "conv2": 5}


class LayerNormNet(MixedChannelsNet):
    def build(self) -> None:
        self.norm = nn.LayerNorm(6)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class RMSNormNet(LayerNormNet):
    def build(self) -> None:
        self.norm = nn.RMSNorm(6, eps=1e-6)


class HandWrittenNormNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class GroupNormNet(TwoConvNet):
    """A group of three channels goes whole: its mean and deviation are nobody else's."""

    expected: ClassVar[Expected] = {"conv1": 2, "conv2": 5}

    def build(self) -> None:
        self.norm = nn.GroupNorm(2, 6)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class InstanceNormNet(TwoConvNet):
    """Each channel by itself: exact."""

    def build(self) -> None:
        self.norm = nn.InstanceNorm2d(6, affine=True)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class PlainInstanceNormNet(InstanceNormNet):
    """No weight to slice, and still a number of features that must follow."""

    def build(self) -> None:
        self.norm = nn.InstanceNorm2d(6)


class SoftmaxChannelsNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class UnitLengthNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class LocalResponseNormNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return F.local_response_norm(x, 3)


class StandardDeviationNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return x / (1 + x.std(1, keepdim=True))


class WholeTensorNormNet(MixedChannelsNet):
    """The maximum over everything has no channel dimension left to show for it."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) / (1 + x.abs().mean())


class SortChannelsNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class CumulativeSumNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x.cumsum(1))


class LogSumExpNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x - x.logsumexp(1, keepdim=True))


class ArgmaxNet(MixedChannelsNet):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x * x.argmax(1, keepdim=True))


class PositionNet(MixedChannelsNet):
    """A weight by position: the third channel is no longer third."""

    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) * torch.arange(x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


class DividedByWidthNet(MixedChannelsNet):
    """The number of channels enters as a number."""

    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) * x.shape[1] ** -0.5


class BranchOnWidthNet(MixedChannelsNet):
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.shape[1] % 3 == 0 else torch.sigmoid(x)


class CornerByWidthNet(MixedChannelsNet):
    """The number of channels chooses pixels: no shape shows it."""

    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) + x[:, :, x.shape[1] - 1 : x.shape[1], :]


class MaxoutNet(TwoConvNet):
    """Pairs of neighbours by a constant: the pairs go, or nothing."""

    c1, c2 = 8, 4
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:]).amax(2)


class GramNet(Net):
    """The product of the channels with themselves, flattened: rows and columns both vary."""

    expected = {"conv1": "any"}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x)).flatten(2)
        return self.fc((x @ x.transpose(1, 2)).flatten(1) / 36)


class SumOverChannelsNet(TwoConvNet):
    """A sum has no weight to slice, yet it takes what is not there as zero."""

    c2 = 1
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x).sum(1, keepdim=True)


class EinsumNet(TwoConvNet):
    c1, c2 = 6, 4
    expected = {"conv1": 6, "mix": 4, "conv2": 5}

    def build(self) -> None:
        self.mix = nn.Parameter(torch.randn(6, 4))

    def between(self, x: Tensor) -> Tensor:
        return F.relu(torch.einsum("bchw,cd->bdhw", F.relu(x), self.mix))


# --- inputs and outputs ---------------------------------------------------------------------


class TupleInputNet(Net):
    expected = {"a": 6, "conv2": 5}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(2, 6, 1)
        self.conv2, self.fc = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def example(self) -> Any:
        g = torch.Generator().manual_seed(7)
        return torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 2, 8, 8, generator=g)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = F.relu(self.a(first) + self.b(second))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class DictInputNet(TupleInputNet):
    def example(self) -> Any:
        first, second = super().example()
        return {"second": second, "first": first}


class DictOutputNet(TwoConvNet):
    """Channels that leave the model stay."""

    expected = {"conv1": 6, "conv2": "locked"}

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.conv2(self.between(self.conv1(x))))
        return {"features": features, "scores": [self.fc(features.mean((2, 3)))]}


class TrainOnlyHeadNet(TwoConvNet):
    """A head that runs in training only still reads conv1."""

    expected = {"conv1": "any", "conv2": 5}

    def build(self) -> None:
        self.aux = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.conv1(x))
        out = self.fc(F.relu(self.conv2(x)).mean((2, 3)))
        return (out, self.aux(x.mean((2, 3)))) if self.training else out


# --- sequences ------------------------------------------------------------------------------


class EmbeddingNet(Net):
    expected = {"embed": 6, "fc1": 7}

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 4)

    def example(self) -> Any:
        return torch.arange(10).view(2, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.embed(tokens)))).mean(1)


class TiedEmbeddingNet(EmbeddingNet):
    """The embedding is the last layer's weight, too."""

    expected = {"embed": 6, "fc1": 7}

    def __init__(self) -> None:
        super().__init__()
        self.fc2, self.head = nn.Linear(7, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.fc2(F.relu(self.fc1(x))))


class TiedAutoencoderNet(Net):
    """One matrix forwards and transposed."""

    expected = {"fc0": 7, "encode": 4}
    shape = (3, 5)

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.encode, self.fc1 = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.encode(torch.tanh(self.fc0(x))))
        return self.fc1(torch.tanh(F.linear(code, self.encode.weight.t())))


class SwiGLUNet(Net):
    """Gate and value made by one layer: unit i is row i and row 4 + i."""

    expected = {"fc0": 6, "w12": 4}
    shape = (2, 5, 3)

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.w12 = nn.Linear(3, 6), nn.Linear(6, 8)
        self.w3, self.fc = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc0(x)
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.fc(x + self.w3(F.silu(gate) * value)).mean(1)


class AttentionNet(Net):
    """Two heads of four; the scale is held by the module and stays at its old value."""

    expected = {"fc0": 6, "q": "any", "k": "any", "v": "any"}
    shape = (2, 5, 3)

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 4
        self.scale = self.head_dim**-0.5
        self.fc0 = nn.Linear(3, 6)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.out, self.fc = nn.Linear(8, 6), nn.Linear(6, 4)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, self.head_dim).transpose(1, 2)

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(layer(x)) for layer in (self.q, self.k, self.v))
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc0(x)
        return self.fc(x + self.mix(x)).mean(1)


class FusedAttentionNet(AttentionNet):
    """One layer for query, key and value, and an unnamed scale: 1 / sqrt(head size)."""

    expected = {"fc0": 6, "qkv": "any"}

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(6, 24)

    def mix(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class GroupedQueryNet(AttentionNet):
    """Four query heads share two key/value heads."""

    expected = {"fc0": 6, "q": "any", "k": "any", "v": "any"}

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.out = nn.Linear(6, 16), nn.Linear(16, 6)

    def mix(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k, v = (f(x).view(b, n, 2, self.head_dim).transpose(1, 2) for f in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // 2, dim=1) for t in (k, v))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


class DerivedHeadsNet(AttentionNet):
    """Head size and scale derived from the residual width: C // heads, C ** -0.5."""

    expected = {"fc0": "any", "q": "any", "k": "any", "v": "any"}

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 6)

    def mix(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, n, c))


class MultiheadAttentionNet(AttentionNet):
    expected = {"fc0": "any", "attention": "any"}

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v, self.out
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class LSTMNet(Net):
    expected = {"fc0": "any", "lstm": "any"}
    shape = (2, 5, 3)

    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.lstm = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(torch.tanh(self.fc0(x)))[0].mean(1))


class GRUNet(LSTMNet):
    expected = {"fc0": "any", "gru": "any"}

    def __init__(self) -> None:
        super().__init__()
        self.lstm = None
        self.gru = nn.GRU(6, 5, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(torch.tanh(self.fc0(x)))[0].mean(1))


def every_net() -> list[type[Net]]:
    """All nets of this module, `tests.nets` and `tests.view_nets`."""
    assert view_nets
    found: list[type[Net]] = []
    todo = list(Net.__subclasses__())
    while todo:
        cls = todo.pop(0)
        found.append(cls)
        todo += cls.__subclasses__()
    return [cls for cls in dict.fromkeys(found) if cls not in (TwoConvNet, MixedChannelsNet)]
