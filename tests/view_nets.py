"""Tiny nets that look at channels through views: split, flattened, flipped, sliced, written to.

Same conventions as `tests.nets`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import Net, TwoConvNet


class ChunkNet(Net):
    """`chunk(2)` needs equal pieces: unit i is channel i of both."""

    expected = {"conv1": 4, "a": 3, "b": 5}

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.conv1(x)).chunk(2, 1)
        joined = torch.cat([self.a(first), self.b(second)], 1)
        return self.fc(F.relu(joined).mean((2, 3)))


class ChunkOneUsedNet(TwoConvNet):
    """Only one piece is read, and still both must shrink."""

    c1, c2 = 8, 4
    expected = {"conv1": (4,), "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x.chunk(2, 1)[1])


class SplitConstantNet(ChunkNet):
    """Sizes written into the code: nothing of conv1 can go."""

    expected = {"conv1": "any", "a": 3, "b": 5}

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.conv1(x)).split([4, 4], 1)
        return self.fc(F.relu(torch.cat([self.a(first), self.b(second)], 1)).mean((2, 3)))


class SplitAttributeNet(ChunkNet):
    """Sizes held by the module can follow."""

    expected = {"conv1": "any", "a": 3, "b": 5}

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [5, 3]
        self.a, self.b = nn.Conv2d(5, 3, 1), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.conv1(x)).split(self.sizes, 1)
        return self.fc(F.relu(torch.cat([self.a(first), self.b(second)], 1)).mean((2, 3)))


class FlattenTwiceNet(Net):
    """The same channels flattened at two spatial sizes: 16 and 4 columns a channel."""

    expected = {"conv1": 4, "a": 5}

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b, self.fc = nn.Linear(64, 5), nn.Linear(16, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        a = self.a(F.max_pool2d(x, 2).flatten(1))
        return self.fc(F.relu(a + self.b(F.adaptive_avg_pool2d(x, 2).flatten(1))))


class PermuteThenFlattenNet(Net):
    """Channels last when flattened: the columns of a channel lie apart."""

    expected = {"conv1": 4, "fc1": 5}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc1 = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4 * 9, 5)
        self.fc2 = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x)).permute(0, 2, 3, 1)
        return self.fc2(F.relu(self.fc1(x.reshape(x.shape[0], -1))))


class FlipChannelsNet(TwoConvNet):
    def between(self, x: Tensor) -> Tensor:
        return F.relu(x).flip(1)


class FlipAddNet(TwoConvNet):
    """Channel i meets channel 4 - i: pairs, and the middle one."""

    c1 = c2 = 5
    expected = {"conv1": (3,), "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) + x.flip(1)


class RollChannelsNet(TwoConvNet):
    """`roll` by a constant keeps every shape and still puts channels elsewhere."""

    c1 = c2 = 5
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return torch.roll(F.relu(x), 2, 1)


class RollAddNet(TwoConvNet):
    """Tied to itself by a roll of two: {0, 2} and {1, 3}, and a roll of two of two is none."""

    c1 = c2 = 4
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) + 2 * x.roll(2, 1)


class StridedChannelSliceNet(TwoConvNet):
    c1, c2 = 6, 3
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x)[:, ::2]


class EverySecondOfFourNet(StridedChannelSliceNet):
    """One unit of each half gone leaves two channels, of which the slice takes the wrong one."""

    c1, c2 = 4, 2


class PaddedStrideNet(TwoConvNet):
    """The slice takes padding and channel 2; without channel 0 it would take padding twice."""

    c1, c2 = 3, 2
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.pad(F.relu(x), (0, 0, 0, 0, 1, 2))[:, ::3]


class ConstantSliceNet(TwoConvNet):
    c1, c2 = 6, 4
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x[:, :4])


class GenerousSliceNet(TwoConvNet):
    """A slice longer than the channels: shapes never complain."""

    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x[:, :32])


class NeighbourAddNet(TwoConvNet):
    """Every channel meets the next one: all or nothing."""

    c1, c2 = 6, 5
    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x[:, 1:] + x[:, :-1])


class ConstantViewNet(Net):
    """Three channels of 64 pixels also fit into `view(B, 4, -1)`: it runs and is wrong."""

    expected = {"conv1": "any"}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.fc(x.view(x.shape[0], 4, -1).mean(2))


class AttributeViewNet(ConstantViewNet):
    def __init__(self) -> None:
        super().__init__()
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return self.fc(x.view(x.shape[0], self.width, -1).mean(2))


class IndexBufferNet(TwoConvNet):
    """A permutation held as a buffer of indices."""

    expected = {"conv1": "any", "conv2": 5}

    def build(self) -> None:
        self.register_buffer("order", torch.tensor([5, 2, 0, 1, 4, 3]))

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x[:, self.order])


class InPlaceViewNet(TwoConvNet):
    """A write through a view reaches the tensor it looks at."""

    expected = {"conv1": "any", "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        x = F.relu(x) + 0.1
        x[:, 3:].mul_(2.0)
        x[:, :4].add_(0.5)
        return x


class RepeatNet(TwoConvNet):
    c1, c2 = 4, 16
    expected = {"conv1": 4, "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x.repeat(1, 2, 1, 1)).repeat_interleave(2, dim=1)


class StackNet(TwoConvNet):
    def build(self) -> None:
        self.other = nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([self.conv1(x), self.other(x)], 1).sum(1)
        return self.fc(F.relu(self.conv2(F.relu(x))).mean((2, 3)))
