"""Layers whose weights or shapes are not a plain layer's own: counted, cut, verified or locked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import thinet
from thinet.errors import NothingLeftError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def groups_of(model: nn.Module, x: Tensor) -> dict[str, Any]:
    return {group.name: group for group in thinet.find_groups(model, x)}


@pytest.mark.parametrize(("ins", "outs", "groups"), [(4, 8, 2), (12, 6, 6), (8, 4, 2), (8, 16, 8)])
def test_grouped_transposed_convolutions_are_counted(ins: int, outs: int, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, ins, 1), nn.ConvTranspose2d(ins, outs, 3, groups=groups))
    # Each of the 8 x 8 places of the input reaches 3 x 3 places of out / groups channels.
    macs = 64 * 3 * ins + 64 * ins * (outs // groups) * 9
    assert thinet.count(model, X[:1]).macs == macs


class FewGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4)
        self.o = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.up(self.a(x).relu()).relu())


def test_predicted_costs_of_transposed_groups_are_those_of_the_cut_model() -> None:
    model = FewGroups()
    result = thinet.prune(
        model, X, [X], budget=thinet.Budget(keep=0.5), criterion="weight-sum", repair="none"
    )
    assert result.report.macs_after == thinet.count(result.model, X).macs
    assert result.report.params_after == thinet.count(result.model, X).params


class OneFilterForAll(nn.Module):
    """Channels are merged with the batch, as a blur of each channel is written."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.blur = nn.Conv2d(1, 1, 3, padding=1)
        self.o = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        n, c, h, w = y.shape
        return self.o(self.blur(y.view(n * c, 1, h, w)).view(n, c, h, w))


@pytest.mark.parametrize("images", [1, 2])
def test_channels_merged_with_the_batch_come_back(images: int) -> None:
    model, x = OneFilterForAll().double(), X[:images].double()
    assert groups_of(model, x)["a"].locked is None
    keep = [0, 3, 4, 11]
    small: Any = thinet.cut(model, x, {"a": keep})
    y = model.a(x).relu()
    z = model.blur(y.view(-1, 1, 8, 8)).view(images, 12, 8, 8)
    answer = F.conv2d(z[:, keep], model.o.weight[:, keep], model.o.bias)
    assert torch.allclose(small(x), answer, rtol=0, atol=1e-12)


class WeightForEachImage(nn.Module):
    """Convolutions with weights mixed from several, one mixture an image (CondConv)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.weights = nn.Parameter(torch.randn(4, 12, 12, 3, 3))
        self.route = nn.Linear(12, 4)
        self.o = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        n, c, h, w = y.shape
        share = self.route(y.mean((2, 3))).softmax(1)
        weight = (share @ self.weights.flatten(1)).view(n * 12, c, 3, 3)
        return self.o(
            F.conv2d(y.reshape(1, n * c, h, w), weight, padding=1, groups=n).view(n, -1, h, w)
        )


@pytest.mark.parametrize("images", [1, 2])
def test_a_weight_for_each_image_locks_and_does_not_crash(images: int) -> None:
    assert groups_of(WeightForEachImage(), X[:images])["a"].locked is not None


class Branches(nn.Module):
    """The kernel of one convolution is the sum of two (RepVGG while it trains)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.wide = nn.Conv2d(12, 6, 3, padding=1)
        self.point = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.wide.weight + F.pad(self.point.weight, (1, 1, 1, 1))
        return F.conv2d(self.a(x).relu(), weight, self.wide.bias, padding=1)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.wide = nn.Linear(16, 10)
        self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x).relu(), self.wide.weight + self.up @ self.down)


@pytest.mark.parametrize("make", [Branches, LowRank])
def test_a_weight_of_two_parameters_is_cut_and_verified(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model: Any = make().double()
    x = X.double()
    keep = list(range(0, groups_of(model, x)["a"].channels, 2))
    small: Any = thinet.cut(model, x, {"a": keep})
    with torch.no_grad():  # ReLU hands a zero on: silent where it is read
        gone = [i for i in range(len(model.a.weight)) if i not in keep]
        model.a.weight[gone], model.a.bias[gone] = 0, 0
    assert torch.allclose(small(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("normed", [weight_norm, nn.utils.weight_norm])
def test_weights_normed_for_each_input_are_cut_and_verified(normed: Any) -> None:
    torch.manual_seed(0)
    up = normed(nn.ConvTranspose1d(8, 6, 4, 2, 1))  # its first dimension is that of the inputs
    model = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), up).eval().double()
    x = torch.randn(2, 2, 16, dtype=torch.float64)
    keep = [0, 2, 3, 5]
    small: Any = thinet.cut(model, x, {"0": keep})
    model(x)  # the older form computes its weight when it runs
    y = model[1](model[0](x))
    answer = F.conv_transpose1d(y[:, keep], up.weight[keep], up.bias, stride=2, padding=1)
    assert torch.allclose(small(x), answer, rtol=0, atol=1e-12)


def test_what_is_no_module_or_has_no_sizes_or_no_data_is_named() -> None:
    with pytest.raises(thinet.OptionError, match=r"is a torch.nn.Module; got function"):
        thinet.find_groups(lambda x: x, X)  # type: ignore[arg-type]
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 2, 1))
    with pytest.raises(thinet.OptionError, match=r"0.weight has no size yet"):
        thinet.find_groups(lazy, X)
    empty = FewGroups().to("meta")
    with pytest.raises(thinet.OptionError, match=r"a.weight has no data .* verify=False"):
        thinet.cut(empty, X.to("meta"), {"a": [0, 1]})
    small: Any = thinet.cut(empty, X.to("meta"), {"a": [0, 1]}, verify=False)
    assert small.a.weight.shape == (4, 3, 3, 3)


@pytest.mark.parametrize("keep", [[0, 1], None, "a"])
def test_keep_is_a_mapping(keep: Any) -> None:
    with pytest.raises(thinet.OptionError, match="keep maps names of groups"):
        thinet.cut(FewGroups(), X, keep)


def test_indices_may_come_from_anything_that_gives_integers() -> None:
    small: Any = thinet.cut(FewGroups(), X, {"a": (i for i in (1, 2))})  # type: ignore[dict-item]
    assert small.a.out_channels == 4
    with pytest.raises(thinet.IndicesError, match="must be integers"):
        thinet.cut(FewGroups(), X, {"a": [float("inf")]})  # type: ignore[list-item]
    with pytest.raises(thinet.UnknownGroupError):
        thinet.cut(FewGroups(), X, {0: [1]})  # type: ignore[dict-item]


class PickedFromPairs(nn.Module):
    """Pairs go together, and every third entry takes one of each pair: which one depends."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.a, self.step = nn.Conv2d(3, 8, 1), step
        self.o = nn.Conv2d(len(range(0, 8, step)), 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        pairs = y.view(len(y), -1, 2, 8, 8) * torch.tensor([1.0, 2.0]).view(1, 1, 2, 1, 1)
        return self.o(pairs.flatten(1, 2)[:, :: self.step])


def test_entries_that_go_together_are_not_picked_apart() -> None:
    group = groups_of(PickedFromPairs(3), X)["a"]
    assert group.locked is not None and "takes apart what goes together" in group.locked


def test_the_same_of_each_pair_may_be_taken() -> None:
    model, x = PickedFromPairs(2).double(), X.double()
    small: Any = thinet.cut(model, x, {"a": [1, 2]})
    y = model.a(x)[:, [2, 4]]
    answer = F.conv2d(y, model.o.weight[:, [1, 2]], model.o.bias)
    assert torch.allclose(small(x), answer, rtol=0, atol=1e-12)


class RolledPairs(nn.Module):
    """Two of a unit lie two apart; moved by one, they come in the other order once one is left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.a(x).view(len(x), 2, -1, 8, 8) * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)
        return self.o(pairs.flatten(1, 2).roll(1, 1))


def test_pairs_that_are_moved_past_each_other_are_locked() -> None:
    assert groups_of(RolledPairs(), X)["a"].locked is not None


class EverySecond(nn.Module):
    """What lies between those that are taken may not go: the others would move up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.p = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 5, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.o(y[:, ::2]) + self.p(y)


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_between_those_taken_is_locked(seed: int) -> None:
    torch.manual_seed(seed)
    assert all(g.locked for g in groups_of(EverySecond(), X).values() if "a" in g.producers)


class Sampled(nn.Module):
    """Noise as in a variational autoencoder, drawn in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.b(self.a(x).relu())
        return self.o(mean + torch.randn_like(mean))


def test_channels_that_random_numbers_are_drawn_for_are_locked() -> None:
    groups = groups_of(Sampled(), X)
    assert (
        groups["b"].locked == "aten.randn_like in the model itself draws random numbers of its size"
    )
    assert groups["a"].locked is None
    small: Any = thinet.cut(Sampled(), X, {"a": [0, 1]})
    assert small.a.out_channels == 2


class LastTwo(nn.Module):
    """`-0:` would take all."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 2
        self.a, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.o(torch.cat([y[:, -self.count :], y], 1))


@pytest.mark.parametrize("verify", [True, False])
def test_a_slice_may_not_lose_all_that_it_takes(verify: bool) -> None:
    model = LastTwo().eval()
    small: Any = thinet.cut(model, X, {"a": [0, 7]}, verify=verify)
    assert small.count == 1 and small.o.in_channels == 3
    text = r"left of the channels that the model.count counts; .*: a \[6, 7\]"
    with pytest.raises(NothingLeftError, match=text):
        thinet.cut(model, X, {"a": [0, 1]}, verify=verify)
    assert model.count == 2


class Pieces(nn.Module):
    """Two pieces of unlike size; a pooling cannot run on no channel."""

    def __init__(self) -> None:
        super().__init__()
        self.few = 2
        self.a, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        few, rest = y.split([self.few, y.shape[1] - self.few], 1)
        return self.o(torch.cat([F.max_pool2d(few, 2), F.max_pool2d(rest, 2)], 1))


@pytest.mark.parametrize("verify", [True, False])
def test_a_piece_of_a_split_may_not_lose_all(verify: bool) -> None:
    model = Pieces().eval()
    group = groups_of(model, X)["a"]
    assert group.channels == 8 and group.locked is None
    small: Any = thinet.cut(model, X, {"a": [1, 5]}, verify=verify)
    assert small.few == 1 and small(X).shape[1] == 5
    for keep in ([0, 1], [2, 3, 4, 5, 6, 7]):
        with pytest.raises(NothingLeftError, match="nothing would be left of the channels that"):
            thinet.cut(model, X, {"a": keep}, verify=verify)


class Gates(nn.Module):
    """Each of the gates is taken by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates, y = self.g(x), self.a(x)
        return self.o(sum(y * gates[:, i : i + 1] for i in range(2)))


def test_channels_that_are_taken_one_by_one_are_locked() -> None:
    groups = groups_of(Gates(), X)
    assert groups["g"].locked is not None
    assert "aten.slice in the model itself takes one of it alone" in groups["g"].locked
    assert groups["a"].locked is None
