"""What a criterion is given about groups that were coupled in every way, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from thinet.calibrate.collect import collect
from thinet.calibrate.statistics import _by_unit, group_statistics
from thinet.criteria.base import GroupStatistics
from thinet.trace.analyse import analyse


class Residual(nn.Module):
    """Two producers and two consumers share one stream of four channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 2, 1)
        self.back, self.bn2 = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 3, 1)

    def stream(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = F.relu(self.bn1(self.stem(x)))
        return first, F.relu(first + self.bn2(self.back(self.inner(first))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(x)[1])


class Concat(nn.Module):
    """Three channels and two meet in one consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
        self.head = nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(torch.cat([self.left(x), self.right(x)], 1)))


class Flat(nn.Module):
    """Each of two channels is four columns of the consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


class Depthwise(nn.Module):
    """The depthwise filter of a channel goes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.depth, self.head = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depth(F.relu(self.bn(self.expand(x))))))


def measured(model: nn.Module, name: str, x: Tensor) -> GroupStatistics:
    analysis = analyse(model, x[:1])
    group = analysis.group(name)
    assert group.locked is None, group.locked
    seen = collect(model, [x], program=analysis.program, groups=[group], zeros=True)
    return group_statistics(model, group, seen, seed=5)


def prepared(cls: type[nn.Module], size: int = 5) -> tuple[Any, Tensor]:
    return randomise(cls()).eval(), torch.randn(6, 3, size, size)


def rows(maps: Tensor) -> Tensor:
    return maps.movedim(1, -1).flatten(0, -2).double()


def gram(phi: Tensor, weight: Tensor) -> Tensor:
    """E[x_c x_c'] over the energy that varies, from the samples themselves."""
    x = phi[:, None] * weight.detach().double().flatten(1)  # (rows, outputs, channels)
    energy = x.sum(2).var(0, correction=0).sum()
    return torch.einsum("roc,rod->cd", x, x) / len(x) / energy


@torch.no_grad()
def test_a_residual_stream_adds_its_consumers_and_has_both_producers() -> None:
    model, x = prepared(Residual)
    stats = measured(model, "stem", x)
    first, second = model.stream(x)
    assert [tuple(f.shape) for f in stats.filters] == [(4, 3), (4, 2)]
    assert torch.equal(stats.filters[0], model.stem.weight.flatten(1))
    assert torch.equal(stats.filters[1], model.back.weight.flatten(1))
    expected = gram(rows(first), model.inner.weight) + gram(rows(second), model.head.weight)
    assert stats.gram is not None and stats.zeros is not None and stats.bn_scale is not None
    torch.testing.assert_close(stats.gram, expected, rtol=1e-4, atol=1e-5)
    dead = torch.stack([(m == 0).double().mean((0, 2, 3)) for m in (first, second)]).mean(0)
    torch.testing.assert_close(stats.zeros, dead)
    scales = torch.maximum(model.bn1.weight.abs(), model.bn2.weight.abs())
    torch.testing.assert_close(stats.bn_scale, scales)
    assert (stats.name, stats.channels, stats.seed) == ("stem", 4, 5)


@torch.no_grad()
def test_a_part_of_a_concatenation_has_its_own_columns_only() -> None:
    model, x = prepared(Concat)
    phi = rows(F.relu(torch.cat([model.left(x), model.right(x)], 1)))
    whole = gram(phi, model.head.weight)
    for name, columns in (("left", slice(0, 3)), ("right", slice(3, 5))):
        stats = measured(model, name, x)
        assert stats.gram is not None and stats.zeros is not None
        torch.testing.assert_close(stats.gram, whole[columns, columns], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.zeros, (phi == 0).double().mean(0)[columns])
        assert stats.bn_scale is None and not stats.has("bn_scale")
        (consumer,) = stats.consumers
        assert consumer.units.tolist() == (
            [0, 1, 2, -1, -1] if name == "left" else [-1] * 3 + [0, 1]
        )


@torch.no_grad()
def test_a_flattened_channel_is_all_its_columns() -> None:
    model, x = prepared(Flat, size=2)
    stats = measured(model, "conv", x)
    phi = F.relu(model.conv(x)).flatten(1)
    z = torch.einsum(
        "rup,oup->rou", phi.view(-1, 2, 4).double(), model.fc.weight.view(3, 2, 4).double()
    )
    expected = torch.einsum("rou,rov->uv", z, z) / len(z) / z.sum(2).var(0, correction=0).sum()
    assert stats.gram is not None and stats.zeros is not None
    torch.testing.assert_close(stats.gram, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.zeros, (phi == 0).double().mean(0).view(2, 4).mean(1))
    assert [tuple(f.shape) for f in stats.filters] == [(2, 3)]


@torch.no_grad()
def test_a_depthwise_filter_is_no_consumer_of_its_group() -> None:
    model, x = prepared(Depthwise)
    stats = measured(model, "expand", x)
    phi = rows(F.relu(model.depth(F.relu(model.bn(model.expand(x))))))
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram, gram(phi, model.head.weight), rtol=1e-4, atol=1e-5)
    assert tuple(stats.filters[0].shape) == (4, 3)
    torch.testing.assert_close(stats.bn_scale, model.bn.weight.abs())


@torch.no_grad()
def test_a_consumer_that_gives_nothing_counts_nothing() -> None:
    model, x = prepared(Residual)
    model.inner.weight.zero_()
    stats = measured(model, "stem", x)
    second = model.stream(x)[1]
    assert stats.gram is not None
    torch.testing.assert_close(
        stats.gram, gram(rows(second), model.head.weight), rtol=1e-4, atol=1e-5
    )


def test_entries_are_sorted_by_unit_only_where_every_unit_has_as_many() -> None:
    weight = torch.arange(12.0).view(4, 3)
    found = _by_unit(weight, 0, (1, 0, 1, 0))
    assert found is not None
    assert found.tolist() == [[3, 4, 5, 9, 10, 11], [0, 1, 2, 6, 7, 8]]
    vector = _by_unit(torch.tensor([5.0, 6.0, 7.0]), 0, (-1, 1, 0))
    assert vector is not None and vector.tolist() == [[7], [6]]
    assert _by_unit(weight, 0, (0, 1, 1, -1)) is None
    assert _by_unit(weight, 0, (1, 1, 2, -1)) is None  # unit 0 has nothing here


@pytest.mark.parametrize("count", [2, 3, 5, 7])
@pytest.mark.parametrize("criterion", ["thinet", "block-obs"])
def test_inputs_that_never_vary_are_constant_in_double_precision_too(
    criterion: str, count: int
) -> None:
    """Their covariance is rounding, which no system can be made of."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4),
    ).double().eval()  # fmt: skip
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    again = x.repeat(count, 1, 1, 1)
    found = thinet.prune(model, x, [again], budget=thinet.Budget(macs=0.5), criterion=criterion)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-6, atol=1e-6)
    covariance = measured(model, "6", again).consumers[0].second
    assert covariance is not None and not covariance.any()
