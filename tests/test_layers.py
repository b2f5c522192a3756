"""Which norm, shortcut and bias is found behind each layer of the usual blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinet.calibrate.layers import Layer, find_layers, same_layers
from thinet.trace.program import Program
from thinet.trace.record import record


class BasicBlock(nn.Module):
    """conv1 bn1 relu conv2 bn2 (+ x) relu; in place where asked."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=self.inplace)
        y = self.bn2(self.conv2(y))
        if self.inplace:
            y += x
            return F.relu(y, inplace=True)
        return F.relu(y + x)


class Bottleneck(nn.Module):
    """The shortcut is a convolution and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 5, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.downsample = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class PreActivation(nn.Module):
    """bn relu conv, added without a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x))) + x


class Plain(nn.Module):
    """No norm, no shortcut: a bias is added to other shapes, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.more = nn.Parameter(torch.randn(3, 1, 1))
        self.fc = nn.Linear(3, 4, bias=False)
        self.token = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv(x) + self.more).flatten(2).mean(2)
        return self.token((self.fc(x) + 1)[:, None])


class ActivationBetween(BasicBlock):
    """What is added is not the layer's own output but a function of it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True) + torch.tanh(self.conv2(x)) + x


class ReadTwice(BasicBlock):
    """conv1's output goes to a norm and elsewhere; bn2's sum is not all that goes on."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.bn2(self.conv2(x))
        return self.bn1(y) + y.abs() + (z + x) * z


class Returned(BasicBlock):
    """The model gives out what lies between."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv1(x)
        z = self.bn2(self.conv2(x))
        return self.bn1(y), y, z + x, z


class Weighted(BasicBlock):
    """The sum weighs what it adds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.conv1(x), x, alpha=2)


class SharedNorm(BasicBlock):
    """One norm behind two layers: its mean is not free for one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) * self.bn1(self.conv2(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.once = nn.Linear(4, 4)
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.right.bias = self.left.bias
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(self.twice(self.embed(ids)))
        return self.head(self.once(self.left(x) + self.right(x)))


class Frozen(nn.Module):
    """Batch statistics in evaluation: no running mean to put an intercept into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def found(model: nn.Module, inputs: Any = None) -> tuple[dict[str, Layer], Program]:
    program = record(model, torch.randn(2, 3, 6, 6) if inputs is None else inputs)
    layers = find_layers(program)
    assert list(layers) == [layer.op for layer in layers.values()]
    return {layer.weight.removesuffix(".weight"): layer for layer in layers.values()}, program


def norm(layer: Layer) -> str | None:
    return layer.norm.mean.removesuffix(".running_mean") if layer.norm else None


def made_by(program: Program, layer: Layer) -> str | None:
    """The module whose operation makes the shortcut, "input" for the model's input."""
    if layer.shortcut is None:
        return None
    value = layer.shortcut
    return next((op.module for op in program.ops if value in op.outputs()), "input")


@pytest.mark.parametrize("inplace", [False, True])
def test_basic_block(inplace: bool) -> None:
    layers, program = found(BasicBlock(inplace))
    assert list(layers) == ["conv1", "conv2"]
    assert norm(layers["conv1"]) == "bn1" and layers["conv1"].shortcut is None
    assert norm(layers["conv2"]) == "bn2" and made_by(program, layers["conv2"]) == "input"
    add = program.ops[layers["conv2"].add or 0]
    assert add.name == ("aten.add_" if inplace else "aten.add")
    assert not any(layer.shared or layer.bias for layer in layers.values())
    assert layers["conv1"].geometry.padding == (1, 1) and layers["conv1"].geometry.taps == 9


def test_bottleneck_with_downsample_gives_both_sides_each_other() -> None:
    layers, program = found(Bottleneck())
    assert {name: norm(layer) for name, layer in layers.items()} == {
        "conv1": "bn1", "conv2": "bn2", "downsample.0": "downsample.1"
    }  # fmt: skip
    assert made_by(program, layers["conv2"]) == "downsample.1"
    assert made_by(program, layers["downsample.0"]) == "bn2"
    assert layers["conv1"].shortcut is None


def test_pre_activation_has_no_norm_behind_and_a_shortcut() -> None:
    layers, program = found(PreActivation())
    conv = layers["conv"]
    assert (norm(conv), made_by(program, conv), conv.bias) == (None, "input", "conv.bias")


def test_plain_layers_have_neither() -> None:
    layers, _ = found(Plain())
    assert {n: (norm(x), x.shortcut, x.bias) for n, x in layers.items()} == {
        "conv": (None, None, "conv.bias"),
        "fc": (None, None, None),
        "token": (None, None, "token.bias"),
    }
    assert layers["fc"].geometry.rank == 0
    assert layers["fc"].read is not None and layers["fc"].read.shape == (3, 4)
    assert layers["conv"].read is None


@pytest.mark.parametrize("cls", [ActivationBetween, Weighted])
def test_what_is_not_added_as_it_is_has_no_shortcut(cls: type[nn.Module]) -> None:
    layers, _ = found(cls())
    assert all(layer.shortcut is None and layer.add is None for layer in layers.values())


@pytest.mark.parametrize("cls", [ReadTwice, Returned])
def test_what_is_read_elsewhere_too_is_not_made_up_for(cls: type[nn.Module]) -> None:
    layers, _ = found(cls())
    assert norm(layers["conv1"]) is None  # an intercept in bn1 would miss the other reader
    assert norm(layers["conv2"]) == "bn2" and layers["conv2"].shortcut is None


def test_a_norm_behind_two_layers_is_free_for_neither() -> None:
    layers, _ = found(SharedNorm())
    assert norm(layers["conv1"]) is None and norm(layers["conv2"]) is None


def test_a_norm_of_batch_statistics_takes_no_intercept() -> None:
    layers, _ = found(Frozen())
    assert norm(layers["conv"]) is None


def test_shared_weights_and_biases_are_flagged() -> None:
    program = record(Shared(), torch.zeros(2, 3, dtype=torch.long))
    layers = find_layers(program).values()
    assert [(layer.module, layer.shared) for layer in layers] == [
        ("twice", True), ("twice", True), ("left", True), ("right", True), ("once", False),
        ("head", True),
    ]  # fmt: skip


def test_computed_weights_are_no_layers() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    model = nn.Sequential(normed, nn.ConvTranspose2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    assert list(found(model)[0]) == ["2"]


def test_layers_are_told_by_weight_and_use_where_operations_differ() -> None:
    class Turned(nn.Module):
        """Reshaping copies for two images and not for one."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.first(x)).transpose(0, 1).reshape(-1, 4)
            return self.second(x)

    model = Turned()
    one, two = (find_layers(record(model, torch.randn(n, 5, 4))) for n in (1, 2))
    assert list(one) != list(two)
    assert same_layers(two, one) == dict(zip(two, one, strict=True))
    assert [one[i].weight for i in same_layers(two, one).values()] == [
        "first.weight", "first.weight", "second.weight"
    ]  # fmt: skip
    missing = dict(list(one.items())[:1])
    assert list(same_layers(two, missing)) == list(two)[:1]
