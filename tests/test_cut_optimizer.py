"""`cut(..., optimizer=...)`: training goes on as if the removed channels had never been there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import thinet
from thinet.errors import OptionError

torch.set_num_threads(1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).mean((2, 3)))


Make = Callable[[list[dict[str, Any]]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
}
KEEP = [0, 2, 5]


def trained(name: str) -> tuple[nn.Module, Optimizer, Tensor]:
    torch.manual_seed(0)
    model = Small()
    last = [*model.head.parameters()]
    rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = OPTIMIZERS[name]([{"params": rest}, {"params": last, "lr": 0.003}])
    x = torch.randn(4, 2, 8, 8)
    for _ in range(2):
        step(model, optimizer, x)
    return model, optimizer, x


def step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_what_stays_is_kept(name: str) -> None:
    model, optimizer, x = trained(name)
    before = copy.deepcopy(optimizer.state_dict())
    small, new = thinet.cut(model, x, {"conv1": KEEP}, optimizer=optimizer)
    assert type(new) is type(optimizer)
    mine = [p for group in new.param_groups for p in group["params"]]
    assert {id(p) for p in mine} == {id(p) for p in small.parameters()}
    assert [g["lr"] for g in new.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for key, value in optimizer.state[model.conv2.weight].items():
        found = new.state[small.conv2.weight][key]
        expected = value[:, KEEP] if isinstance(value, Tensor) and value.ndim else value
        assert found == expected if not isinstance(found, Tensor) else torch.equal(found, expected)
    for key, value in optimizer.state[model.norm.bias].items():
        if isinstance(value, Tensor) and value.ndim:
            assert torch.equal(new.state[small.norm.bias][key], value[KEEP])
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for state, other in zip(before["state"].values(), after["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(other[k])) for k in state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_equals_that_of_the_dense_model_without_the_channels(name: str) -> None:
    model, optimizer, x = trained(name)
    with torch.no_grad():
        model.conv2.weight[:, [1, 3, 4]] = 0
    small, new = thinet.cut(model, x, {"conv1": KEEP}, optimizer=optimizer)
    model.train()
    small.train()
    step(model, optimizer, x)
    step(small, new, x)
    torch.testing.assert_close(small.conv2.weight, model.conv2.weight[:, KEEP])
    torch.testing.assert_close(small.conv1.weight, model.conv1.weight[KEEP])
    torch.testing.assert_close(small.head.weight, model.head.weight)


def test_a_schedule_goes_on() -> None:
    model, optimizer, x = trained("sgd")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    step(model, optimizer, x)
    schedule.step()
    small, schedule.optimizer = thinet.cut(model, x, {"conv1": KEEP}, optimizer=optimizer)
    step(small, schedule.optimizer, x)
    schedule.step()
    assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_state_of_another_shape_is_refused() -> None:
    model, optimizer, x = trained("sgd")
    optimizer.state[model.conv1.weight]["row"] = torch.zeros(6)
    with pytest.raises(OptionError, match="'row' of conv1.weight"):
        thinet.cut(model, x, {"conv1": KEEP}, optimizer=optimizer)


def test_what_is_not_of_the_model_is_shared() -> None:
    model, _, x = trained("sgd")
    scale = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    _, new = thinet.cut(model, x, {"conv1": KEEP}, optimizer=optimizer)
    assert new.param_groups[0]["params"][-1] is scale


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, x = Small(), torch.randn(2, 2, 7, 7)
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(OptionError, match="the optimizer has none of the model's parameters"):
        thinet.cut(model, x, {"conv1": KEEP}, optimizer=other)
    whole = torch.optim.LBFGS(model.parameters())
    with pytest.raises(OptionError, match="LBFGS keeps its state over all parameters at once"):
        thinet.cut(model, x, {"conv1": KEEP}, optimizer=whole)
