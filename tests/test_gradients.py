"""Taylor importances against finite differences and hand-worked numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from thinet.calibrate.gradients import Gradients, collect_gradients, loss_of
from thinet.errors import CalibrationError
from thinet.trace.analyse import analyse

Batches = Sequence[tuple[Tensor, Tensor | None]]


def asked(net: nn.Module, batches: Batches, name: str | None = None) -> Gradients:
    """Of the group with this name, of the first one without."""
    analysis = analyse(net, batches[0][0])
    groups = [g for g in analysis.groups if name in (None, g.name)][:1]
    return collect_gradients(net, batches, groups, program=analysis.program)


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 1)
        self.conv2 = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x))).mean((2, 3))


def test_feature_maps_and_weights_agree_with_autograd_written_out() -> None:
    torch.manual_seed(0)
    net, x = TinyNet(), torch.randn(4, 1, 3, 3)
    labels = torch.tensor([0, 1, 1, 0])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = asked(net, [(x[:3], labels[:3]), (x[3:], labels[3:])])

    maps = torch.zeros(3, dtype=torch.float64)
    for image, label in zip(x, labels, strict=True):
        hidden = torch.relu(net.conv1(image[None])).detach().requires_grad_(True)
        logits = net.conv2(hidden).mean((2, 3))
        nn.functional.cross_entropy(logits, label[None]).backward()
        assert hidden.grad is not None
        maps += (hidden * hidden.grad).detach().double()[0].mean((1, 2)).abs() / 4
    torch.testing.assert_close(found.taylor["conv1"], maps, rtol=1e-5, atol=1e-9)

    weights = torch.zeros(3, dtype=torch.float64)
    for part in (slice(0, 3), slice(3, 4)):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[part]), labels[part], reduction="sum").backward()
        grad = net.conv1.weight.grad
        assert grad is not None
        weights += (grad * net.conv1.weight).detach().double().sum((1, 2, 3)).square() / 2
    torch.testing.assert_close(found.taylor_fo["conv1"], weights, rtol=1e-5, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_channel_that_never_lights_up_has_no_importance() -> None:
    torch.manual_seed(1)
    net, x = TinyNet(), torch.randn(5, 1, 2, 2)
    with torch.no_grad():
        net.conv1.weight[1] = 0
        assert net.conv1.bias is not None
        net.conv1.bias[1] = -1
    found = asked(net, [(x, None)]).taylor["conv1"]
    assert found[1] == 0
    assert found[0] > 0


def test_a_model_without_logits_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1))
    x = torch.randn(2, 1, 3, 3)
    with pytest.raises(CalibrationError, match=r"logits of shape \(images, classes\).*\(2, 2, 3"):
        asked(net, [(x, None)])


def test_both_criteria_run_in_prune() -> None:
    torch.manual_seed(2)
    net, x = TinyNet(), torch.randn(6, 1, 3, 3)
    for name in ("taylor", "taylor-fo"):
        result = thinet.prune(
            net, x[:1], [x], budget=thinet.Budget(keep=0.7), criterion=name, repair="none"
        )
        assert result.report.groups[0].kept == 2


class Named(nn.Module):
    """Features and logits in a dict, in either order."""

    def __init__(self, net: nn.Module, first: bool) -> None:
        super().__init__()
        self.net, self.first = net, first

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.net(x)
        named = {"logits": y, "features": y.square() @ torch.ones(y.shape[1], 4)}
        return named if self.first else dict(reversed(named.items()))


def test_the_loss_is_asked_of_the_field_logits() -> None:
    torch.manual_seed(1)
    net, x, labels = TinyNet(), torch.randn(5, 1, 3, 3), torch.tensor([0, 1, 1, 0, 1])
    plain = asked(net, [(x, labels)])
    for first in (True, False):
        found = asked(Named(net, first), [(x, labels.to(torch.int32))])
        for ours, theirs in ((found.taylor, plain.taylor), (found.taylor_fo, plain.taylor_fo)):
            (a,), (b,) = ours.values(), theirs.values()
            assert torch.equal(a, b) and bool(a.any())
    loss = loss_of({"made": torch.zeros(2, 3)}, torch.tensor([0, 1]))  # the only one
    assert float(loss) == pytest.approx(2 * math.log(3))
    with pytest.raises(CalibrationError, match="2 tensors, none of them first or named `logits`"):
        loss_of({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, torch.tensor([0, 1]))


def by_hand(maps: Sequence[Tensor], loss: Tensor) -> Tensor:
    """(C,) of eq. 8, maps (images, positions, C), in the mean over places where they are read."""
    gradients = torch.autograd.grad(loss, list(maps))
    parts = [(m * g).mean(1).abs().mean(0) for m, g in zip(maps, gradients, strict=True)]
    return torch.stack(parts).detach().double().mean(0)


class Tokens(nn.Module):
    """As many tokens as channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x).relu())

    def rest(self, h: Tensor) -> Tensor:
        return self.head(self.b(h).relu().mean(1))


class Twice(Tokens):
    """The second layer is asked again for what it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)


class Bare(Tokens):
    """The second layer's weight is the model's own; both are as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), None
        self.weight = nn.Parameter(torch.randn(6, 8))

    def rest(self, h: Tensor) -> Tensor:
        return self.head((h @ self.weight.T).relu().mean(1))


class Beside(Tokens):
    """Two layers read the map, and each is given the gradient of both."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 6)

    def rest(self, h: Tensor) -> Tensor:
        return self.head((self.b(h) + self.c(h)).relu().mean(1))


@pytest.mark.parametrize("kind", [Tokens, Bare, Beside])
def test_maps_are_those_that_the_layer_reads(kind: Callable[[], Tokens]) -> None:
    torch.manual_seed(4)
    net, labels = kind().eval(), torch.tensor([0, 2, 1, 0])
    x = torch.randn(4, 8, net.a.in_features)
    hidden = net.a(x).relu().detach().requires_grad_()
    loss = nn.functional.cross_entropy(net.rest(hidden.clone()), labels, reduction="sum")
    found = asked(net, [(x[:3], labels[:3]), (x[3:], labels[3:])], "a").taylor["a"]
    torch.testing.assert_close(found, by_hand([hidden], loss), rtol=1e-5, atol=1e-9)
    assert bool(found.any())


class Undone(Twice):
    """The map is written over, though the derivative of its reader asks for it."""

    def rest(self, h: Tensor) -> Tensor:
        made = self.b(h)
        return self.head(h.mul_(2).add_(made).relu().mean(1))


def test_what_cannot_be_differentiated_is_said() -> None:
    net, x = Undone().eval(), torch.randn(4, 8, 5)
    with pytest.raises(CalibrationError, match="can be differentiated: one of the variables"):
        thinet.prune(net, x, x, budget=thinet.Budget(keep=0.5), criterion="taylor")


def test_each_use_of_a_layer_is_looked_at() -> None:
    torch.manual_seed(5)

    class Again(Twice):
        def rest(self, h: Tensor) -> Tensor:
            return self.head(self.b(self.b(h).relu()).relu().mean(1))

    net, labels = Again().eval(), torch.tensor([0, 2, 1, 0])
    x = torch.randn(4, 3, 5)
    first = net.a(x).relu().detach().requires_grad_()
    second = net.b(first).relu()
    third = net.b(second).relu()
    loss = nn.functional.cross_entropy(net.head(third.mean(1)), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, third, retain_graph=True)
    pooled = (third.mean(1) * gradient.sum(1)).abs().mean(0).detach().double()
    maps = by_hand([first, second], loss)
    found = asked(net, [(x, labels)], "a").taylor["a"]
    torch.testing.assert_close(found, (2 * maps + pooled) / 3, rtol=1e-5, atol=1e-9)


def test_frozen_and_shared_weights_have_gradients_too() -> None:
    torch.manual_seed(6)
    net, x, labels = TinyNet(), torch.randn(4, 1, 3, 3), torch.tensor([0, 1, 1, 0])
    want = asked(net, [(x, labels)])
    frozen = asked(net.requires_grad_(False), [(x, labels)])
    assert torch.equal(frozen.taylor["conv1"], want.taylor["conv1"])
    assert torch.equal(frozen.taylor_fo["conv1"], want.taylor_fo["conv1"])
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


class Rounded(torch.autograd.Function):
    """Rounds; its derivative is that of the identity (straight through)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyright: ignore
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return grad


class Quantised(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(Rounded.apply(self.a(x).relu()))


class InPart(Tokens):
    """A part of the forward pass has no gradient."""

    def rest(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            lost = 0.1 * torch.sin(h)
        return super().rest(h + lost)


@pytest.mark.parametrize("kind", [Quantised, InPart])
def test_a_models_own_derivatives_are_taken(kind: Callable[[], Tokens]) -> None:
    torch.manual_seed(4)
    net, labels = kind().eval(), torch.tensor([0, 2, 1, 0])
    x = torch.randn(4, 8, 5)
    before = net.a(x).relu()
    hidden = Rounded.apply(before) if kind is Quantised else before + 0.1 * before.sin()
    hidden = hidden.detach().requires_grad_()
    loss = nn.functional.cross_entropy(Tokens.rest(net, hidden), labels, reduction="sum")
    found = asked(net, [(x, labels)], "a")
    want = by_hand([hidden], loss)
    torch.testing.assert_close(found.taylor["a"], want, rtol=1e-5, atol=1e-9)
    net.zero_grad()
    nn.functional.cross_entropy(net(x), labels, reduction="sum").backward()
    assert net.a.weight.grad is not None
    weights = (net.a.weight.grad * net.a.weight).sum(1).square()
    torch.testing.assert_close(found.taylor_fo["a"], weights.detach().double())


class TokensFirst(Tokens):
    """Images along the second axis."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.transpose(0, 1)).relu()
        return self.head(self.b(h).relu().mean(0))


class MergedTokensFirst(Tokens):
    """Tokens and images in one axis, all images of a token one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.transpose(0, 1).flatten(0, 1)).relu() * 1
        return self.head(self.b(h).relu().unflatten(0, (x.shape[1], len(x))).mean(0))


class Windows(Tokens):
    """Two windows of each image, along the axis of the images."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.unflatten(1, (2, -1)).flatten(0, 1)).relu()
        return self.head(self.b(h).relu().unflatten(0, (len(x), 2)).mean((1, 2)))


@pytest.mark.parametrize("kind", [TokensFirst, MergedTokensFirst, Windows])
@pytest.mark.parametrize("tokens", [4, 8])
def test_images_are_found_wherever_they_lie(kind: Callable[[], Tokens], tokens: int) -> None:
    torch.manual_seed(4)
    net, labels = kind().eval(), torch.tensor([0, 2, 1, 0])
    x = torch.randn(4, tokens, 5)
    hidden = net.a(x).relu().detach().requires_grad_()
    loss = nn.functional.cross_entropy(net.rest(hidden), labels, reduction="sum")
    found = asked(net, [(x, labels)], "a").taylor["a"]
    torch.testing.assert_close(found, by_hand([hidden], loss), rtol=1e-5, atol=1e-9)


def test_images_that_cannot_be_told_apart_are_not_mixed() -> None:
    class Across(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x - x.mean(0)).relu()
            return self.head(self.b(h).relu().mean(1))

    net, x = Across().eval(), torch.randn(4, 8, 5)
    assert "a" not in asked(net, [(x, torch.tensor([0, 2, 1, 0]))], "a").taylor


def test_what_is_written_over_behind_a_fixed_layer_is_kept() -> None:
    class Fixed(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.a(x))

        def rest(self, h: Tensor) -> Tensor:
            y = nn.functional.linear(h, self.w)
            h.mul_(3)
            return self.head(y.relu().mean(1))

    torch.manual_seed(4)
    net, labels = Fixed().eval(), torch.tensor([0, 2, 1, 0])
    x = torch.randn(4, 6, 5)
    hidden = net.a(x).detach().requires_grad_()
    y = nn.functional.linear(hidden, net.w).relu().mean(1)
    loss = nn.functional.cross_entropy(net.head(y), labels, reduction="sum")
    found = asked(net, [(x, labels)], "a").taylor.get("a")
    assert found is not None
    torch.testing.assert_close(found, by_hand([hidden], loss), rtol=1e-5, atol=1e-9)
