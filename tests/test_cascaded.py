"""EfficientViT's attention, whose heads hand their results on to each other."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.surgery.explicit import all_explicit, explicit_class
from thinet.vision import torchvision

torch.set_num_threads(1)
KEY, VALUE, HEADS = 4, 8, 3


class Cascaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torchvision()
        module = importlib.import_module("timm.models.efficientvit_msra")
        self.stem = nn.Conv2d(3, HEADS * VALUE, 1)
        self.attn = module.CascadedGroupAttention(
            HEADS * VALUE, KEY, HEADS, attn_ratio=VALUE // KEY, resolution=4, kernels=(3, 5, 3)
        )
        self.head = nn.Conv2d(HEADS * VALUE, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(self.stem(x)))


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return randomise(Cascaded()).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 4, 4).double()


@pytest.mark.parametrize("training", [False, True])
def test_the_explicit_form_computes_the_same(model: Any, x: Tensor, training: bool) -> None:
    model.train(training)
    explicit = copy.deepcopy(model)
    all_explicit(explicit)
    assert type(explicit.attn) is explicit_class(model.attn)
    assert list(explicit.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(explicit(x), model(x), rtol=1e-12, atol=1e-12)


def test_keys_values_and_what_the_heads_take_can_go(model: Any, x: Tensor) -> None:
    groups = thinet.find_groups(model, x)
    free = {g.name: g for g in groups if g.locked is None}
    # A head's value joins what the next head takes; the first takes its part alone.
    keys = [free[f"attn.qkvs.{n}.conv"] for n in range(HEADS)]
    assert [g.channels for g in keys] == [KEY] * HEADS
    for group in keys:
        assert any(m.parameter.startswith("attn.dws.") for m in group.members)
    streams = [g for name, g in free.items() if name.startswith("stem")]
    assert [g.channels for g in streams] == [VALUE] * HEADS
    assert len(free) == 2 * HEADS + 1 + 1  # the last head's values, and what the attention makes
    removed = {g.name: [n % g.channels for n in range(k % 3 + 1)] for k, g in enumerate(keys)}
    check(model, x, groups, removed, thinet.cut)
    removed = {g.name: [0, *range(2, k + 3)] for k, g in enumerate(streams)}
    check(model, x, groups, removed, thinet.cut)
    small = thinet.cut(model, x, {keys[0].name: [1, 2], streams[1].name: [0, 5, 6]})
    assert small.attn.qkvs[0].conv.weight.shape[0] == 2 * 2 + 3  # two keys, two queries, values
    assert small.attn.dws[0].conv.groups == 2
    assert small.attn.qkvs[1].conv.weight.shape[1] == 3


@pytest.mark.parametrize("case", ["normed", "first a norm", "identity"])
def test_heads_that_begin_otherwise_have_no_such_form(model: Any, x: Tensor, case: str) -> None:
    if case == "first a norm":
        model.attn.qkvs[1] = nn.Sequential(nn.BatchNorm2d(VALUE).double(), model.attn.qkvs[1])
    elif case == "identity":
        model.attn.dws[0] = nn.Identity()
    else:  # the weight is computed, and the form is there all the same
        for qkv in model.attn.qkvs:
            torch.nn.utils.parametrizations.weight_norm(qkv.conv)
    model.eval()
    assert (explicit_class(model.attn) is not None) == (case == "normed")
    groups = thinet.find_groups(model, x)
    assert any(g.name == "stem" or g.name.startswith("stem:") for g in groups)
