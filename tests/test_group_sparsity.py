"""Kernel taps driven to zero in training: hand-worked gradients and counts, and exact resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_resume import Stopped, stop_after
from thinet.errors import ModelError, OptionError
from thinet.train.config import FinetuneConfig
from thinet.train.finetune import finetune
from thinet.train.group_sparsity import GroupSparsity, TapGroups
from thinet.train.identity import fingerprint

KERNELS = torch.tensor(
    [
        [[[3.0, 0.0], [1.0, 0.0]], [[0.0, 5.0], [2.0, 8.0]]],
        [[[4.0, 0.0], [0.0, 1.0]], [[2.0, 12.0], [0.0, 6.0]]],
    ]
)
"""Two filters over two input maps, 2 x 2: norms 5, 0, 1, 1 and 2, 13, 2, 10."""


def hand_worked() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 2, 2))
    with torch.no_grad():
        model[0].weight.copy_(KERNELS)  # type: ignore[union-attr]
    return model


def groups(options: GroupSparsity, steps: int = 4) -> tuple[Tensor, TapGroups]:
    model = hand_worked()
    weight = model.get_parameter("0.weight")
    weight.grad = torch.full_like(weight, 10.0)
    return weight, TapGroups(model, options, steps)


def test_the_pull_is_the_unit_vector_of_each_group() -> None:
    weight, taps = groups(GroupSparsity(0.5))
    taps.pull()
    assert weight.grad is not None
    assert weight.grad[:, 0, 0, 0].tolist() == pytest.approx([10.3, 10.4])  # 3/5, 4/5
    assert weight.grad[:, 0, 1, 1].tolist() == [10.0, 10.5]
    assert weight.grad[:, 1, 1, 1].tolist() == pytest.approx([10.4, 10.3])
    assert weight.grad[:, 0, 0, 1].tolist() == [0.0, 0.0]  # zero from the start, so it is held


def test_the_pull_is_the_gradient_of_the_penalty() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 1)).double()
    taps = TapGroups(model, GroupSparsity(0.3, truncate=0.4), 1)
    weights = [p for p in model.parameters() if p.ndim == 4]
    norms = [w.square().sum(0).sqrt() for w in weights]
    assert all(bool((n < 0.4).any()) for n in norms) and bool((norms[1] > 0.4).any())
    penalty = 0.3 * torch.stack([n.clamp(max=0.4).sum() for n in norms]).sum()
    expected = torch.autograd.grad(penalty, weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    taps.pull()
    for weight, gradient in zip(weights, expected, strict=True):
        assert torch.allclose(weight.grad, gradient, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "until", "fixed"),
    [
        (0.5, 1.0, [1, 2, 3, 4]),  # one at each of four steps
        (0.5, 0.5, [2, 4, 4, 4]),
        (0.5, 0.0, [4, 4, 4, 4]),
        (0.3, 1.0, [1, 3, 4, 6]),  # 2.4 of 8 groups stay: two; 1.5, 3, 4.5, 6 are due
        (0.01, 1.0, [1, 3, 5, 7]),  # at least one stays
        (1.0, 1.0, [1, 1, 1, 1]),
    ],
)
def test_groups_go_from_the_smallest_at_the_pace_that_was_asked(
    keep: float, until: float, fixed: list[int]
) -> None:
    weight, taps = groups(GroupSparsity(0.0, keep, until))
    smallest_first = [(0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 1, 0), (0, 0, 0), (1, 1, 1)]
    for step, count in enumerate(fixed):
        taps.fix(step)
        gone = {tuple(i) for i in (~taps.stays["0"]).nonzero().tolist()}
        assert gone == set(smallest_first[:count])
        zero = {tuple(i) for i in (weight == 0).all(0).nonzero().tolist()}
        assert zero == gone


def test_a_fixed_group_stays_fixed_whatever_moves_it() -> None:
    weight, taps = groups(GroupSparsity(0.0, keep=0.5, until=0.0))
    taps.fix(0)
    with torch.no_grad():
        weight.add_(100.0)
    taps.fix(1)
    assert (weight == 0).all(0).sum() == 4
    assert weight[:, 1, 0, 1].tolist() == [105.0, 112.0]


class Depth(nn.Module):
    """A grouped convolution, one that pads by reflection, a frozen one and one that is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(2, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("conv*", r"no convolution of the model fits 'conv\*'; it has plain, grouped, mirrored"),
        (("plain", "grouped"), "taps of grouped cannot be taken out: it has 2 groups, and a tap"),
        ("mir*", "it pads by 'reflect'; only zeros are supported; leave it out of layers"),
        ("frozen", "its weights are frozen"),
    ],
)
def test_layers_that_cannot_be_chosen_are_said(layers: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        TapGroups(Depth(), GroupSparsity(0.1, layers=layers), 1)


def test_without_patterns_what_can_be_thinned_is_taken() -> None:
    assert list(TapGroups(Depth(), GroupSparsity(0.1), 1).stays) == ["plain"]
    with pytest.raises(ModelError, match="has no convolution whose taps can be taken out"):
        TapGroups(nn.Linear(2, 2), GroupSparsity(0.1), 1)
    model = Depth()
    nn.init.zeros_(model.plain.weight)
    with pytest.raises(ModelError, match="the weights of plain are all zero"):
        TapGroups(model, GroupSparsity(0.1), 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strength": -1}, "strength must be at least 0, got -1"),
        ({"strength": 1, "keep": 0}, "keep must be above 0 and at most 1, got 0"),
        ({"strength": 1, "until": 2}, "until must be at least 0 and at most 1"),
        ({"strength": 1, "truncate": 0.0}, "truncate must be above 0"),
        ({"strength": 1, "layers": ()}, "layers is empty"),
    ],
)
def test_options_are_checked_when_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        GroupSparsity(**options)


def test_options_go_through_json() -> None:
    config = FinetuneConfig(group_sparsity=GroupSparsity(1e-4, 0.3, 0.7, 0.2, ("a*", "b")))
    assert FinetuneConfig.from_json(config.to_json()) == config
    with pytest.raises(OptionError, match=r"unknown fine-tuning options: kept; known are strength"):
        FinetuneConfig.from_json('{"group_sparsity": {"strength": 1, "kept": 0.5}}')
    with pytest.raises(OptionError, match="group_sparsity must be a GroupSparsity or None"):
        FinetuneConfig(group_sparsity=0.5)  # type: ignore[arg-type]


def toy(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Images of three maps of noise; the label is told by the middle of the first map alone."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(count, 16, 3, 3, 3, generator=random)
    labels = (images[:, :, 0, 1, 1] > 0).long()
    return list(zip(images, labels, strict=True))


def toy_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))


TOY = FinetuneConfig(lr=0.05, weight_decay=0.0, schedule="cosine")


def test_the_penalty_drives_out_the_taps_that_tell_nothing() -> None:
    """Of 27 taps only (0, 1, 1) matters: with the penalty the others vanish, without they stay."""
    left: dict[float, float] = {}
    for strength in (0.0, 0.08):
        config = replace(TOY, group_sparsity=GroupSparsity(strength))
        result = finetune(toy_net(), toy(), epochs=15, config=config)
        norms = result.model.get_parameter("0.weight").detach().norm(dim=0)
        useful, others = norms[0, 1, 1], norms.flatten().sort().values[:-1]
        assert useful == norms.max()
        left[strength] = float(others.max() / useful)
        assert result.history[-1].top1 > 0.95
    assert left[0.0] > 0.15
    assert left[0.08] < 0.03


def test_thresholding_leaves_what_matters_and_the_average_has_the_same_zeros() -> None:
    config = replace(TOY, group_sparsity=GroupSparsity(0.02, keep=0.04), ema_decay=0.9)
    result = finetune(toy_net(), toy(), epochs=12, config=config)
    alive = (result.model.get_parameter("0.weight") != 0).any(dim=0)
    assert alive.nonzero().tolist() == [[0, 1, 1]]
    assert result.history[-1].top1 > 0.95


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_stopped_run_goes_on_with_the_same_groups(tmp_path: Path, ema: float | None) -> None:
    sparse = GroupSparsity(0.02, keep=0.3, until=1.0)
    options: dict[str, Any] = {
        "epochs": 3,
        "config": replace(TOY, group_sparsity=sparse, ema_decay=ema, clip_norm=0.5),
        "save_every": 3,
    }
    whole = fingerprint(finetune(toy_net(), toy(), **options).model)
    for steps in (2, 9, 4):
        with pytest.raises(Stopped):
            finetune(toy_net(), toy(), checkpoint=tmp_path, progress=stop_after(steps), **options)
    resumed = finetune(toy_net(), toy(), checkpoint=tmp_path, **options)
    assert fingerprint(resumed.model) == whole
    assert (resumed.model.get_parameter("0.weight") == 0).all(dim=0).sum() == 19  # 8.1 of 27 stay


def test_a_weight_of_two_layers_is_pulled_at_once() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 2))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(KERNELS)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    found = TapGroups(model, GroupSparsity(2.0), 4)
    found.pull()
    assert list(found.stays) == ["0"]
    # 2 * K / || Gamma ||: the first tap has the norm 5
    assert model[0].weight.grad[:, 0, 0, 0].tolist() == pytest.approx([6 / 5, 8 / 5])
