"""Taylor importances against finite differences and hand-worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import thinet
from thinet.calibrate.gradients import collect_gradients, loss_of
from thinet.errors import CalibrationError


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
    groups = thinet.find_groups(net, x)[:1]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = collect_gradients(net, [(x[:3], labels[:3]), (x[3:], labels[3:])], groups)

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
    groups = thinet.find_groups(net, x)[:1]
    found = collect_gradients(net, [(x, None)], groups).taylor["conv1"]
    assert found[1] == 0
    assert found[0] > 0


def test_a_model_without_logits_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1))
    x = torch.randn(2, 1, 3, 3)
    with pytest.raises(CalibrationError, match=r"logits of shape \(images, classes\).*\(2, 2, 3"):
        collect_gradients(net, [(x, None)], thinet.find_groups(net, x)[:1])


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
    plain = collect_gradients(net, [(x, labels)], thinet.find_groups(net, x)[:1])
    for first in (True, False):
        named = Named(net, first)
        groups = thinet.find_groups(named, x)[:1]
        found = collect_gradients(named, [(x, labels.to(torch.int32))], groups)
        for ours, theirs in ((found.taylor, plain.taylor), (found.taylor_fo, plain.taylor_fo)):
            (a,), (b,) = ours.values(), theirs.values()
            assert torch.equal(a, b) and bool(a.any())
    loss = loss_of({"made": torch.zeros(2, 3)}, torch.tensor([0, 1]))  # the only one
    assert float(loss) == pytest.approx(2 * math.log(3))
    with pytest.raises(CalibrationError, match="2 tensors, none of them first or named `logits`"):
        loss_of({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, torch.tensor([0, 1]))
