"""Small networks of the structures that recipes look for, under names of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (8, 8, 8, 8, 12, 12, 12, 16, 16, 16, 16, 16, 16)
"""Thirteen convolutions, as VGG-16 has."""


class SmallVgg(nn.Module):
    """VGG-16's shape at a tenth of its width; its parts have other names than torchvision's."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, pools: tuple[int, ...] = (1, 3)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inputs, width) in enumerate(zip((3, *widths), widths, strict=False)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
            if number in pools:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.MaxPool2d(2))
        self.squeeze = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(
            nn.Linear(4 * widths[-1], 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.squeeze(self.body(x)), 1))


class FlatVgg(nn.Sequential):
    """The same as one plain list, the flatten and the head included."""

    def __init__(self) -> None:
        body = list(SmallVgg().body)
        super().__init__(*body, nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Dropout(),
                         nn.Linear(20, 5))  # fmt: skip


class FixedViewVgg(SmallVgg):
    """Its forward code holds the size of the maps."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.squeeze(self.body(x)).view(-1, 64))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 under names of its own; a projection where the shape changes."""

    def __init__(
        self, inputs: int, width: int, outputs: int, *, late: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.late = late
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(width)
        self.spatial = nn.Conv2d(width, width, 3, padding=1, bias=False, **options)
        self.norm_b = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm_c = nn.BatchNorm2d(outputs)
        self.project = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm_a(self.reduce(x)))
        y = functional.relu(self.norm_b(self.spatial(y)))
        if self.late:
            y = self.norm_c(self.expand(y))
            y += self.project(x)
            return functional.relu(y)
        return functional.relu(self.project(x) + self.norm_c(self.expand(y)))


class DeepStem(nn.Module):
    """Three convolutions in a row before the first shortcut: they are not of a block."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.a = Bottleneck(16, 8, 16, **options)
        self.b = Bottleneck(16, 12, 24, **options)
        self.out = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(self.stem(x))).mean((2, 3)))


class PreActivation(nn.Module):
    """Two basic blocks whose norms come first, changed in place, with a gate on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.gate = nn.Linear(8, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.convs[0](functional.relu(self.norms[0](x), inplace=True))
        y = self.convs[1](functional.relu(self.norms[1](y), inplace=True))
        y += x
        z = self.convs[2](functional.relu(self.norms[2](y)))
        z = self.convs[3](functional.relu(self.norms[3](z)))
        z = z * torch.sigmoid(self.gate(z.mean((2, 3))))[:, :, None, None]
        return self.out((y + z).mean((2, 3)))


def images(count: int = 32, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def labelled_batches(count: int = 32, side: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8 images with labels of 5 classes."""
    x = images(count, side)
    y = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(2))
    return list(zip(x.split(8), y.split(8), strict=True))
