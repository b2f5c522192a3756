"""The paper's tables of sizes, from networks that are really cut, in the authors' own counting.

ThiNet (Luo, Wu, Lin, ICCV 2017), tables 1, 3 and 4. The networks live on the `meta` device: they
have shapes and no weights, so nothing is computed and little memory is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from thinet.count import count
from thinet.cut import cut
from thinet.errors import OptionError
from thinet.recipes import RECIPES
from thinet.recipes.structure import Network, network
from thinet.surgery.replace import replace
from thinet.trace.replica import copied
from thinet.vision import torchvision

Stride = Literal["first", "middle"]
"""Which convolution of a bottleneck halves the picture: the first 1 x 1 (Caffe, as the authors) or
the 3 x 3 in the middle (torchvision)."""

SIDE = 224
ALEXNET_SIDE = 227


@dataclass(frozen=True)
class Row:
    """One network of a table, ours beside what the paper prints.

    Attributes:
        table: number of the paper's table.
        params, flops: counted by us in the authors' convention, see `authors_counts`.
        paper_params, paper_flops: as printed there, such as `8.32M` and `9.34B`.
        paper_top1, paper_top5: printed accuracy in percent, None where there is none.
        dataset: whose classes the network has.
    """

    name: str
    table: int
    params: int
    flops: int
    paper_params: str
    paper_flops: str
    paper_top1: float | None = None
    paper_top5: float | None = None
    dataset: str = "ImageNet"

    @property
    def printed_params(self) -> str:
        """Ours, to the digits that the paper prints."""
        return f"{self.params / 1e6:.2f}M"

    @property
    def printed_flops(self) -> str:
        """Ours, to the digits that the paper prints."""
        return f"{self.flops / 1e9:.2f}B"

    @property
    def agrees(self) -> bool:
        """Whether both figures are the paper's to the printed digit."""
        ours = (self.printed_params, self.printed_flops)
        return ours == (self.paper_params, self.paper_flops)


def authors_counts(model: nn.Module, inputs: torch.Tensor) -> tuple[int, int]:
    """Parameters and FLOPs as the authors' tool counts them (`FLOPs_and_size.py`).

    Weights of convolutions and fully connected layers without biases; two numbers for each channel
    of a BatchNorm (of its four); twice the multiply-adds of these layers and of those numbers.

    Args:
        inputs: one image, (1, 3, height, width).
    """
    weights = {
        id(m.weight): m.weight.numel()
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    norms = sum(2 * m.num_features for m in model.modules() if isinstance(m, _BatchNorm))
    macs = count(model, inputs).macs
    return sum(weights.values()) + norms, 2 * (macs + norms)


def resnet50(stride: Stride = "first", classes: int = 1000) -> nn.Module:
    """torchvision's ResNet-50 with random weights, in either stride convention.

    Raises:
        OptionError: no such convention.
    """
    model = torchvision().models.resnet50(num_classes=classes)
    if stride == "first":
        stride_first(model)
    elif stride != "middle":
        raise OptionError(f"the stride is in the first or the middle convolution, not {stride!r}")
    return model


def stride_first(model: nn.Module) -> None:
    """Move the stride of torchvision's bottlenecks to their first convolution, in place.

    The weights stay valid in shape only: a network trained in one convention is another in the
    other.
    """
    for block in model.modules():
        if isinstance(block, torchvision().models.resnet.Bottleneck):
            first, middle = block.conv1, block.conv2
            assert isinstance(first, nn.Conv2d)
            assert isinstance(middle, nn.Conv2d)
            first.stride, middle.stride = middle.stride, first.stride


def alexnet(classes: int = 1000) -> nn.Module:
    """AlexNet as in Caffe: 227 pixels, two groups in three of its convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(),
        nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, classes),
    )  # fmt: skip


def tables(stride: Stride = "first") -> tuple[Row, ...]:
    """The eight networks of tables 1 and 3.

    Args:
        stride: of ResNet-50; the paper's figures are those of "first".
    """
    return (*table_1(), *table_3(stride))


def table_1() -> tuple[Row, ...]:
    """VGG-16 and what the paper makes of it."""
    net = traced(torchvision().models.vgg16)
    return (
        Row("VGG-16", 1, *cut_counts(net), "138.34M", "30.94B", 68.34, 88.44),
        Row("ThiNet-Conv", 1, *cut_counts(net, "vgg16-conv"), "131.44M", "9.58B", 69.80, 89.53),
        Row("ThiNet-GAP", 1, *cut_counts(net, "vgg16-gap"), "8.32M", "9.34B", 67.34, 87.92),
        Row("ThiNet-Tiny", 1, *cut_counts(net, "vgg16-tiny"), "1.32M", "2.01B", 59.34, 81.97),
    )


def table_3(stride: Stride = "first") -> tuple[Row, ...]:
    """ResNet-50 and what the paper makes of it."""
    net = traced(lambda: resnet50(stride))
    return (
        Row("ResNet-50", 3, *cut_counts(net), "25.56M", "7.72B", 72.88, 91.14),
        Row("ThiNet-70", 3, *cut_counts(net, "resnet50-70"), "16.94M", "4.88B", 72.04, 90.67),
        Row("ThiNet-50", 3, *cut_counts(net, "resnet50-50"), "12.38M", "3.41B", 71.01, 90.02),
        Row("ThiNet-30", 3, *cut_counts(net, "resnet50-30"), "8.66M", "2.20B", 68.42, 88.30),
    )


PRINTED_4 = {
    "CUB-200": (
        200,
        {
            "VGG-16": ("135.07M", "30.93B", 72.30),
            "ThiNet-Conv": ("128.16M", "9.58B", 70.90),
            "ThiNet-GAP": ("7.91M", "9.34B", 69.43),
            "ThiNet-Tiny": ("1.12M", "2.01B", 65.45),
            "AlexNet": ("57.68M", "1.44B", 57.28),
        },
    ),
    "Indoor-67": (
        67,
        {
            "VGG-16": ("134.52M", "30.93B", 72.46),
            "ThiNet-Conv": ("127.62M", "9.57B", 72.31),
            "ThiNet-GAP": ("7.84M", "9.34B", 70.22),
            "ThiNet-Tiny": ("1.08M", "2.01B", 62.84),
            "AlexNet": ("57.13M", "1.44B", 59.55),
        },
    ),
}
"""Classes of each data set, and parameters, FLOPs and top-1 as table 4 prints them."""

RECIPE_OF = {"ThiNet-Conv": "vgg16-conv", "ThiNet-GAP": "vgg16-gap", "ThiNet-Tiny": "vgg16-tiny"}


def table_4() -> tuple[Row, ...]:
    """The networks that the paper transfers to CUB-200 and Indoor-67."""
    rows: list[Row] = []
    for dataset, (classes, printed) in PRINTED_4.items():
        vgg = traced(lambda n=classes: torchvision().models.vgg16(num_classes=n))
        alex = traced(lambda n=classes: alexnet(n), ALEXNET_SIDE)
        for name, (params, flops, top1) in printed.items():
            counts = cut_counts(alex if name == "AlexNet" else vgg, RECIPE_OF.get(name))
            rows.append(Row(name, 4, *counts, params, flops, top1, dataset=dataset))
    return tuple(rows)


def traced(build: Callable[[], nn.Module], side: int = SIDE) -> Network:
    """A network of shapes alone, for images of `side` pixels."""
    with torch.device("meta"):
        return network(build(), torch.empty(1, 3, side, side))


def cut_counts(
    net: Network, recipe: str | None = None, *, keep: float | None = None
) -> tuple[int, int]:
    """The authors' counts of a network, cut by a recipe: real modules of the new shapes."""
    assert isinstance(net.inputs, torch.Tensor)
    if recipe is None:
        return authors_counts(net.model, net.inputs)
    steps = RECIPES[recipe](net, keep)
    model = copied(net.model)
    replace(model, steps.replaced)
    units = {name: range(kept) for name, kept in steps.keep.items()}
    # Which channels stay has no effect on a size, and without weights nothing can be compared.
    return authors_counts(cut(model, net.inputs, units, verify=False), net.inputs)


def to_dict(row: Row) -> dict[str, Any]:
    """The row as what JSON can hold: counts as integers, the paper's figures as printed."""
    return {**asdict(row), "agrees": row.agrees}
