"""The worked example of docs/adding-an-op.md runs, and is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.trace.rules import RULES

torch.set_num_threads(1)
DOCS = Path(__file__).parent.parent / "docs" / "adding-an-op.md"
NAME = "mylib.mirrored"


@torch.library.custom_op("mylib::mirrored", mutates_args=())
def mirrored(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(1).flip(3)], 1)


@mirrored.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 2 * x.shape[1], *x.shape[2:]))


mirrored.register_autograd(
    lambda ctx, grad: grad[:, : grad.shape[1] // 2] + grad[:, grad.shape[1] // 2 :].flip(1).flip(3)
)


class MirrorNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.ops.mylib.mirrored(self.first(x)))


@pytest.fixture
def taught() -> Iterator[None]:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    exec(compile(code, str(DOCS), "exec"), {})
    yield
    del RULES[NAME]


def test_without_the_rule_the_operation_is_named() -> None:
    group = thinet.find_groups(MirrorNet(), torch.randn(1, 3, 8, 8))[0]
    assert group.locked == (
        f"there is no rule for {NAME} in the model itself (see docs/adding-an-op.md)"
    )


@pytest.mark.usefixtures("taught")
def test_with_the_rule_cuts_are_exact() -> None:
    model = randomise(MirrorNet()).double().eval()
    inputs = torch.randn(2, 3, 8, 8).double()
    groups = thinet.find_groups(model, inputs)
    (group,) = [g for g in groups if g.locked is None]
    slices = {(s.parameter, s.dim): s.indices for s in group.slices([1])}
    assert slices["last.weight", 1] == (1, 6)
    check(model, inputs, groups, {group.name: [1, 3]}, thinet.cut)
