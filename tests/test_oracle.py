"""The judge itself: it passes a right cut and fails every kind of wrong one."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.nets import BatchNormVGG, Net, TwoConvNet
from tests.oracle import WAYS, check, randomise
from thinet.trace.analyse import analyse
from thinet.types import ChannelGroup, Member

torch.set_num_threads(1)
EVERY = tuple(range(6))


def hand_group() -> ChannelGroup:
    """features.0 of the VGG, by hand."""
    rows = [
        *(("features.0.weight", "produces"), ("features.0.bias", "produces")),
        *((f"features.1.{n}", "follows") for n in ("weight", "bias")),
        *((f"features.1.running_{n}", "follows") for n in ("mean", "var")),
    ]
    members = [Member(name, 0, role, EVERY) for name, role in rows]  # pyright: ignore
    members.append(Member("features.3.weight", 1, "consumes", EVERY))
    return ChannelGroup(
        *("features.0", 6, None, ("features.0",), ("features.3",)), members=tuple(members)
    )


def hand_cut(model: nn.Module, inputs: Any, keep: dict[str, list[int]], verify: bool) -> nn.Module:
    cut, index = copy.deepcopy(model), torch.tensor(keep["features.0"])
    for member in hand_group().members:
        path, _, leaf = member.parameter.rpartition(".")
        owner = cut.get_submodule(path)
        old = getattr(owner, leaf)
        new = old.detach().index_select(member.dim, index)
        setattr(owner, leaf, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    return cut


def prepared() -> tuple[Net, Tensor]:
    model = BatchNormVGG().eval()
    return randomise(model).double().eval(), model.example().double()


def test_a_right_cut_passes_and_has_an_effect() -> None:
    model, x = prepared()
    verdict = check(model, x, (hand_group(),), {"features.0": [1, 4]}, hand_cut)
    assert verdict.way == WAYS[0]
    assert verdict.error < 1e-12 < 1e-3 < verdict.effect


def wrong_column(cut: Any, model: Any) -> None:
    weight = model.features[3].weight.detach()
    cut.features[3].weight = nn.Parameter(weight[:, [0, 1, 2, 3]].clone())


def wrong_variance(cut: Any, model: Any) -> None:
    cut.features[1].running_var = model.features[1].running_var[[0, 1, 2, 3]].clone()


def wrong_module(cut: Any, model: Any) -> None:
    cut.features[2] = nn.Hardswish()


def shares_weights(cut: Any, model: Any) -> None:
    cut.classifier[0].weight = model.classifier[0].weight


def forgets_freezing(cut: Any, model: Any) -> None:
    cut.features[3].weight.requires_grad_(False)


def touches_weights(cut: Any, model: Any) -> None:
    model.features[0].weight.data += 1


def touches_mode(cut: Any, model: Any) -> None:
    model.features[1].train()


def touches_hooks(cut: Any, model: Any) -> None:
    model.features[1].register_forward_hook(lambda *a: None)


def touches_random_state(cut: Any, model: Any) -> None:
    torch.rand(1)


def touches_flags(cut: Any, model: Any) -> None:
    model.features[0].weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (wrong_column, "kept entries"),
        (wrong_variance, "kept entries"),
        (wrong_module, "differs from the silenced"),
        (shares_weights, "is shared"),
        (forgets_freezing, "features.3.weight"),
        (touches_weights, "tensor features.0.weight"),
        (touches_mode, "module features.1"),
        (touches_hooks, "module features.1"),
        (touches_random_state, "torch rng"),
        (touches_flags, "facts features.0.weight"),
    ],
)
def test_a_wrong_cut_fails(spoil: Any, text: str) -> None:
    model, x = prepared()

    def spoiled(*args: Any, **kwargs: Any) -> nn.Module:
        cut = hand_cut(*args, **kwargs)
        spoil(cut, model)
        return cut

    with pytest.raises(AssertionError, match=text):
        check(model, x, (hand_group(),), {"features.0": [1, 4]}, spoiled)


def test_several_cuts_share_one_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(TwoConvNet()).eval()
    inputs = model.example()
    found = analyse(model, inputs)
    wanted = {g.name: range(1, g.channels) for g in found.groups if g.locked is None}
    alone = [thinet.cut(model, inputs, {name: keep}) for name, keep in wanted.items()]
    monkeypatch.setattr(import_module("thinet.cut"), "analyse", None)
    for (name, keep), other in zip(wanted.items(), alone, strict=True):
        shared = thinet.cut(model, inputs, {name: keep}, analysis=found)
        assert torch.equal(shared(inputs), other(inputs))
