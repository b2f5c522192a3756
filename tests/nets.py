"""Tiny convolutional nets, each named for the hazard it holds and carrying its hand-worked groups.

`expected` maps the module path (or raw parameter) of a group's first producer to

    5           one unlocked group of five units
    (2, 3)      one of these sizes: several right choices exist
    "locked"    no unlocked group may start here
    "any"       locked or cut, as long as a cut is exact

Every unlocked group of at least two units must be listed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Expected = dict[str, int | tuple[int, ...] | str]


class Net(nn.Module):
    """Base of the nets: the answers and the example input."""

    expected: ClassVar[Expected] = {}
    shape: ClassVar[tuple[int, ...]] = (2, 3, 8, 8)

    def example(self) -> Any:
        return torch.randn(*self.shape, generator=torch.Generator().manual_seed(7))


class TwoConvNet(Net):
    """conv1, then whatever `between` does with its channels, then conv2, pooling and fc.

    `c1` is the width that conv1 makes and `c2` the width that conv2 takes.
    """

    c1: ClassVar[int] = 6
    c2: ClassVar[int] = 6
    expected: ClassVar[Expected] = {"conv1": 6, "conv2": 5}

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, self.c1, 3, padding=1)
        self.conv2 = nn.Conv2d(self.c2, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)
        self.build()

    def build(self) -> None:
        pass

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.conv1(x))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


# --- plain chains ---------------------------------------------------------------------------


class PlainVGG(Net):
    expected = {"features.0": 6, "features.2": 8, "classifier.0": 10, "classifier.3": 7}
    norm = False

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 6), (6, 8)):
            layers.append(nn.Conv2d(c_in, c_out, 3, padding=1))
            layers += [nn.BatchNorm2d(c_out)] if self.norm else []
            layers.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*layers, nn.MaxPool2d(2))
        self.avgpool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Sequential(
            *(nn.Linear(8 * 9, 10), nn.ReLU(True), nn.Dropout()),
            *(nn.Linear(10, 7), nn.ReLU(True), nn.Linear(7, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class BatchNormVGG(PlainVGG):
    expected = {"features.0": 6, "features.3": 8, "classifier.0": 10, "classifier.3": 7}
    norm = True


class BatchNormVariantsNet(TwoConvNet):
    """A cumulative average, no affine, and no running statistics: three sets of buffers."""

    def build(self) -> None:
        self.a = nn.BatchNorm2d(6, momentum=None)
        self.b = nn.BatchNorm2d(6, affine=False)
        self.c = nn.BatchNorm2d(6, track_running_stats=False)

    def between(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.c(self.b(self.a(x))))


class FrozenNet(TwoConvNet):
    """Freezing never hides a layer."""

    def build(self) -> None:
        self.bn = nn.BatchNorm2d(6)
        for p in (*self.conv1.parameters(), *self.bn.parameters()):
            p.requires_grad_(False)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class NoGradStemNet(TwoConvNet):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.conv1(x))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class PReLUNet(TwoConvNet):
    def build(self) -> None:
        self.act = nn.PReLU(6)

    def between(self, x: Tensor) -> Tensor:
        return self.act(x)


class BufferScaleNet(TwoConvNet):
    """A buffer that is no module's weight but has one entry a channel."""

    def build(self) -> None:
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6).view(1, 6, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x * self.scale)


class RawParameterNet(Net):
    expected = {"kernel": 6, "conv2": 5}

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.shift = nn.Parameter(torch.randn(6))
        self.conv2 = nn.Conv2d(6, 5, 1)
        self.out = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.shift))
        return F.relu(self.conv2(x)).mean((2, 3)) @ self.out


class WeightNormNet(TwoConvNet):
    def build(self) -> None:
        self.conv1 = nn.utils.parametrizations.weight_norm(self.conv1)


class WeightNormConsumerNet(WeightNormNet):
    """Taking inputs from a weight-normed filter changes its norm, hence all its weights."""

    expected = {"conv1": "any", "conv2": "any"}

    def build(self) -> None:
        self.conv2 = nn.utils.parametrizations.weight_norm(self.conv2)


class SpectralNormNet(TwoConvNet):
    expected = {"conv1": "any", "conv2": "any"}

    def build(self) -> None:
        self.conv1 = nn.utils.parametrizations.spectral_norm(self.conv1)


class HookNet(TwoConvNet):
    """A user's hook takes part in the computation."""

    def build(self) -> None:
        self.conv1.register_forward_hook(double_output)


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


class UnusedNet(TwoConvNet):
    expected = {"conv1": 6, "conv2": 5, "spare": "locked"}

    def build(self) -> None:
        self.spare = nn.Conv2d(6, 6, 1)


# --- additions and concatenations -----------------------------------------------------------


class BasicResidualNet(Net):
    expected = {"stem": 6, "conv1": 5}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.fc(F.relu(y).mean((2, 3)))


class BottleneckProjectionNet(Net):
    expected = {"stem": 6, "conv1": 4, "conv2": 5, "conv3": 8}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 4, 1)
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.conv3, self.bn3 = nn.Conv2d(5, 8, 1), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(F.relu(self.bn3(self.conv3(y)) + self.downsample(x)).mean((2, 3)))


class OptionANet(Net):
    """The padded shortcut: channels 2..5 of conv2 meet the stem's, the others meet zeros."""

    expected = {"stem": 4, "conv1": 5, "conv2": "any"}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(5, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x))) + shortcut).mean((2, 3)))


class InputResidualNet(TwoConvNet):
    """Channels added to the model's input stay."""

    c1 = c2 = 3
    expected = {"conv1": "locked", "conv2": 5}

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) + x)
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class ConcatNet(Net):
    expected = {"a": 4, "b": 5, "c": 6}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


class SelfConcatNet(TwoConvNet):
    """One unit lies at two places of the consumer."""

    c1, c2 = 4, 8
    expected = {"conv1": 4, "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), x.neg().relu()], 1)


class DenseNet(Net):
    expected = {"stem": 4, "convs.0": 3, "convs.1": 3}

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(c) for c in (4, 7, 10))
        self.convs = nn.ModuleList(nn.Conv2d(c, 3, 3, padding=1) for c in (4, 7))
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for bn, conv in zip(self.bns, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(bn(x)))], 1)
        return self.fc(F.relu(self.bns[2](x)).mean((2, 3)))


class SharedConvNet(TwoConvNet):
    """One module run twice: its inputs and outputs are the same channels."""

    def build(self) -> None:
        self.shared = nn.Conv2d(6, 6, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.shared(F.relu(self.shared(F.relu(x)))))


class SharedHeadNet(Net):
    """One head on two branches ties the branches."""

    expected = {"a": 6}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(F.relu(m(x)).mean((2, 3))) for m in (self.a, self.b)], 1)


# --- grouped convolutions -------------------------------------------------------------------


class DepthwiseNet(TwoConvNet):
    def build(self) -> None:
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def between(self, x: Tensor) -> Tensor:
        return F.relu6(self.depthwise(F.relu6(x)))


class DepthwiseMultiplierNet(TwoConvNet):
    """Each input channel makes two outputs; they go together."""

    c1, c2 = 4, 8
    expected = {"conv1": 4, "conv2": 5}

    def build(self) -> None:
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.depthwise(F.relu(x)))


class GroupedNet(TwoConvNet):
    """Whole groups (4 units) or the same index of every group (2 and 3 units)."""

    c1, c2 = 8, 12
    expected = {"conv1": (2, 4), "grouped": "any", "conv2": 5}

    def build(self) -> None:
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.grouped(F.relu(x)))


class GroupedOnTheInputNet(TwoConvNet):
    """The grouped convolution's inputs stay; its outputs can go, the same ones of every group."""

    expected = {"conv1": 2, "conv2": 5}

    def build(self) -> None:
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, groups=3)


class ChannelShuffleNet(TwoConvNet):
    """ShuffleNet's shuffle of two groups: index j of both groups goes together."""

    c1 = c2 = 8
    expected = {"conv1": 4, "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = F.relu(x).view(b, 2, c // 2, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(b, -1, h, w)


class PixelShuffleNet(TwoConvNet):
    """Four channels make one."""

    c1, c2 = 12, 3
    expected = {"conv1": 3, "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(F.pixel_shuffle(x, 2))


class PixelUnshuffleNet(TwoConvNet):
    c1, c2 = 4, 16
    expected = {"conv1": 4, "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.relu(F.pixel_unshuffle(x, 2))


# --- other convolutions ---------------------------------------------------------------------


class ConvTransposeNet(TwoConvNet):
    c1, c2 = 5, 6
    expected = {"conv1": 5, "up": 6, "conv2": 5}

    def build(self) -> None:
        self.up = nn.ConvTranspose2d(5, 6, 2, stride=2)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.up(F.relu(x)))


class Conv1dNet(Net):
    expected = {"layers.0": 6, "layers.3": 5}
    shape = (2, 3, 16)
    conv: Any = nn.Conv1d
    norm: Any = nn.BatchNorm1d

    def __init__(self) -> None:
        super().__init__()
        first, second = self.conv(3, 6, 3, padding=1), self.conv(6, 5, 3)
        self.layers = nn.Sequential(first, self.norm(6), nn.ReLU(), second, nn.SiLU())
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).flatten(2).mean(2))


class Conv3dNet(Conv1dNet):
    shape = (2, 3, 4, 4, 4)
    conv = nn.Conv3d
    norm = nn.BatchNorm3d


class UnfoldNet(Net):
    """A convolution written as im2col and a matrix product."""

    expected = {"conv1": "any", "fc": "locked"}

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.unfold(F.relu(self.conv1(x)), 3).transpose(1, 2)).mean(1)


# --- gates ----------------------------------------------------------------------------------


class SENet(TwoConvNet):
    expected = {"conv1": 6, "squeeze": 3, "conv2": 5}

    def build(self) -> None:
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)

    def between(self, x: Tensor) -> Tensor:
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return F.relu(x * torch.sigmoid(gate))


class LinearSENet(SENet):
    def build(self) -> None:
        self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)

    def between(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3)))))
        return F.relu(x * torch.sigmoid(gate).view(b, c, 1, 1))


class GLUNet(TwoConvNet):
    """Value i and gate i go together."""

    c1, c2 = 8, 4
    expected = {"conv1": 4, "conv2": 5}

    def between(self, x: Tensor) -> Tensor:
        return F.glu(x, 1)


class SpatialAttentionNet(TwoConvNet):
    """Mean and maximum over the channels change when one goes."""

    expected = {"conv1": "locked", "attend": "any", "conv2": 5}

    def build(self) -> None:
        self.attend = nn.Conv2d(2, 1, 3, padding=1)

    def between(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.attend(pooled))
