"""One row an operation: its channels are cut exactly, or refused with the operation's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import as_double, check, outputs, randomise

torch.set_num_threads(1)
Between = Callable[[Tensor], Tensor]
PLACES = torch.tensor([5, 0, 3, 3])


class Chain(nn.Module):
    """conv1 (3 -> c1), one operation, conv2 (c2 -> 5), mean, fc."""

    def __init__(self, between: Between, c1: int, c2: int) -> None:
        super().__init__()
        self.conv1, self.between = nn.Conv2d(3, c1, 3, padding=1), between
        self.conv2, self.fc = nn.Conv2d(c2, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.conv1(x)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


@dataclass(frozen=True)
class Row:
    """`units` of conv1, or None where they are locked for a reason that holds `reason`."""

    between: Between
    units: int | None = 6
    reason: str = ""
    c1: int = 6
    c2: int = 6
    more: dict[str, int] = field(default_factory=dict)


def locked(between: Between, reason: str, c2: int = 6) -> Row:
    return Row(between, None, reason, c2=c2)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def maps(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unsqueeze(-1)


def places(x: Tensor) -> Tensor:
    """The numbers of some tokens, for each of their channels."""
    return PLACES.view(1, 4, 1).expand(x.shape[0], 4, x.shape[-1])


def sampled(x: Tensor) -> Tensor:
    theta = torch.tensor([[1.0, 0.2, 0.1], [0.1, 0.9, 0.0]]).to(x).expand(x.shape[0], 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), align_corners=False)


def unpooled(x: Tensor) -> Tensor:
    pooled, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(pooled, where, [2, 2])


def written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, PLACES] = x[:, :, :4] * 2
    return x


def masked(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1).clone()
    x[torch.arange(64).view(8, 8).fmod(3).eq(0).expand(x.shape[0], 8, 8)] = 0.5
    return x.permute(0, 3, 1, 2)


def picked_by_mask(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)[torch.ones(x.shape[0], 8, 8, dtype=torch.bool)]
    return x.t().reshape(1, x.shape[1], -1, 8)


def written_by_number(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.tensor([0, 2])] = 1.0
    return x


def written_along(x: Tensor) -> Tensor:
    return maps(tokens(x).index_add(1, PLACES, tokens(x)[:, :4]))


def scattered(x: Tensor) -> Tensor:
    y = tokens(x)
    return maps(torch.zeros_like(y).scatter_add(1, places(y), y[:, :4]))


def filtered(x: Tensor) -> Tensor:
    y = torch.fft.rfft2(x)
    return torch.fft.irfft2(0.5 * y, s=(8, 8))


def counted(x: Tensor) -> Tensor:
    return x * torch.histc(x.detach().amax((0, 2, 3)), bins=6, min=0.0, max=1.0).view(1, 6, 1, 1)


class Unfolded(nn.Module):
    """A convolution as im2col and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(54, 7)

    def forward(self, x: Tensor) -> Tensor:
        return maps(self.product(F.unfold(x, 3, padding=1).transpose(1, 2)))


class Mixed(nn.Module):
    """Einsum of weights with an activation, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("dck,bchw->bdkhw", self.weight, x).flatten(1, 2)


class Outer(nn.Module):
    """Two activations: every channel of one with every channel of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return maps(torch.einsum("bchw,bdhw->bcd", x, self.other(x)))


def conv_transpose(groups: int) -> nn.Module:
    return nn.ConvTranspose2d(6, 6, 3, stride=2, output_padding=1, groups=groups)


ROWS: dict[str, Row] = {
    "unfold, product": Row(Unfolded(), c2=7, more={"between.product": 7}),
    "unfold, fold": Row(lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1)),
    "windows": Row(lambda x: x.unfold(2, 3, 2).amax(-1)),
    "grid_sample": Row(sampled),
    "pixel_shuffle": Row(lambda x: F.pixel_shuffle(x, 2), units=2, c1=8, c2=2),
    "pixel_unshuffle": Row(lambda x: F.pixel_unshuffle(x, 2), units=2, c1=2, c2=8),
    "channel_shuffle": Row(nn.ChannelShuffle(2), units=3),
    "max_unpool": Row(unpooled),
    "transposed": Row(conv_transpose(1), more={"between": 6}),
    "transposed, by groups": Row(conv_transpose(3), units=3),
    "einsum": Row(Mixed(), c2=8, more={"between": 4}),
    "put at numbers of space": Row(written),
    "put where a mask is": Row(masked),
    "picked where a mask is": Row(picked_by_mask),
    "put at numbers of channels": locked(written_by_number, "aten.index_put_"),
    "index_select of space": Row(lambda x: x.index_select(2, PLACES)),
    "index_select of channels": locked(
        lambda x: x.index_select(1, torch.arange(6).flip(0)), "aten.index_select"
    ),
    "index_add": Row(written_along),
    "index_fill": Row(lambda x: x.index_fill(3, PLACES, 0.5)),
    "gather of tokens": Row(lambda x: maps(tokens(x).gather(1, places(tokens(x))))),
    "gather of channels": locked(lambda x: x.gather(1, x.argsort(1).detach()), "aten."),
    "scatter_add": Row(scattered),
    "histc": locked(counted, "aten.histc"),
    "cumsum of space": Row(lambda x: x.cumsum(2)),
    "topk of space": Row(lambda x: x.topk(3, 2)[0]),
    "topk of channels": locked(lambda x: x.topk(6, 1)[0], "aten.topk"),
    "fourier of space": Row(filtered),
    "fourier of channels": locked(lambda x: torch.fft.fft(x, dim=1).real, "aten._fft_"),
    "circular padding": Row(lambda x: F.pad(x, (1, 1, 1, 1), "circular")),
    "reflected padding": Row(lambda x: F.pad(x, (1, 1, 1, 1), "reflect")),
    "lp_pool": Row(lambda x: F.lp_pool2d(x, 2, 2)),
    "cdist of channels": locked(
        lambda x: maps(torch.cdist(tokens(x), tokens(x)[:, :6])), "aten._euclidean_dist"
    ),
    "cdist by another norm": locked(
        lambda x: maps(torch.cdist(tokens(x), tokens(x)[:, :6], p=1.0)), "aten._cdist_forward"
    ),
    "kthvalue of channels": locked(lambda x: x + x.kthvalue(2, 1, True)[0], "aten.kthvalue"),
    **{
        f"upsample {mode}": Row(lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode))
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    "upsample antialias": Row(
        lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True)
    ),
    "upsample linear": Row(
        lambda x: maps(F.interpolate(x.flatten(2), 9, mode="linear")).permute(0, 2, 1, 3)
    ),
    "upsample trilinear": Row(
        lambda x: F.interpolate(x.unsqueeze(2), size=(1, 9, 9), mode="trilinear").squeeze(2)
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_an_operation_is_exact_or_refused(name: str) -> None:
    row = ROWS[name]
    torch.manual_seed(0)
    model = randomise(Chain(row.between, row.c1, row.c2)).double().eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7)).double()
    before = outputs(model, x)
    groups = thinet.find_groups(model, x)
    free = {g.name: g.channels for g in groups if g.locked is None and g.channels > 1}
    expected = {"conv1": row.units, "conv2": 5} | row.more
    assert free == {k: v for k, v in expected.items() if v is not None}, [
        (g.name, g.locked) for g in groups
    ]
    if row.units is None:
        reasons = [g.locked for g in groups if g.name == "conv1"]
        assert any(row.reason in str(reason) for reason in reasons), reasons
        with pytest.raises(thinet.LockedGroupError, match="conv1"):
            thinet.cut(model, x, {"conv1": [0]})
    for group, units in free.items():
        assert (
            check(model, x, groups, {group: [0, *range(2, units)][: units // 2]}, thinet.cut).effect
            > 0
        )
    check(model, x, groups, {group: [1] for group in free}, thinet.cut)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model, x), strict=True))


def test_every_channel_with_every_other() -> None:
    """conv1 feeds both sides of the product; the merged result keeps one of them."""
    model = randomise(Chain(lambda x: x, 6, 4)).double().eval()
    model.between = Outer().double()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7)).double()
    groups = thinet.find_groups(model, x)
    for g in groups:
        if g.locked is None and g.channels > 1:
            check(model, x, groups, {g.name: [1]}, thinet.cut)
        else:
            assert g.locked


# --- sequences ------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(3, 6), kind(6, 5, batch_first=True, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.tanh(self.embed(x)))[0].mean(1))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda k: k.__name__)
def test_recurrent_layers_are_exact_or_refused(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    model = randomise(Recurrent(kind, **options)).double().eval()
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(7)).double()
    groups = thinet.find_groups(model, x)
    free = [g for g in groups if g.locked is None and g.channels > 1]
    for g in groups:
        assert g.locked is None or "rnn" in g.locked or "output of the model" in g.locked, g.locked
    for g in free:
        check(model, x, groups, {g.name: [0]}, thinet.cut)


class Experts(nn.Module):
    """Tokens sent to one of two experts, as one product by groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(2, 16, 32))
        self.down = nn.Parameter(torch.randn(2, 32, 8))

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([6, 10], dtype=torch.int32, device=x.device)
        x = F.relu(torch._grouped_mm(self.embed(x), self.up, offs=ends))
        return self.head(torch._grouped_mm(x, self.down, offs=ends))


@pytest.mark.parametrize(("dtype", "together"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_experts_keep_strides_of_16_bytes(dtype: torch.dtype, together: int) -> None:
    model = randomise(Experts()).eval().to(dtype)
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(7)).to(dtype)
    groups = thinet.find_groups(model, x)
    units = [g for g in groups if g.name != "head"]
    assert [g.channels * together for g in units] == [16, 32, 8]
    assert all(g.locked is None for g in units)
    for g in units:
        keep = {g.name: [g.channels - 1]}
        small = thinet.cut(model, x, keep)  # verified
        assert small(x).shape == (10, 4)
        if dtype == torch.float32:
            check(model, x, groups, keep, thinet.cut)
    assert thinet.cut(model, x, {units[1].name: [0]}).up.shape == (2, 16, together)


# --- an operator of torchvision -------------------------------------------------------------


class Boxes(nn.Module):
    """Features of boxes, pooled to 2 x 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fc1, self.head = nn.Conv2d(3, 6, 3), nn.Linear(24, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        x = torch.ops.torchvision.roi_align(F.relu(self.conv1(x)), boxes, 1.0, 2, 2, 2, False)
        return self.head(F.relu(self.fc1(x.flatten(1))))


@pytest.fixture
def roi_align() -> Any:
    """torchvision's own, or a mean over each box where its library does not fit this torch."""
    from thinet.vision import torchvision

    torchvision()
    if hasattr(torch.ops.torchvision, "roi_align"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
        "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
    )

    def pooled(x: Tensor, rois: Tensor, scale: float, h: int, w: int, *_: Any) -> Tensor:
        found = [
            F.adaptive_avg_pool2d(x[int(n)], (h, w)) * (a + b + c + d) for n, a, b, c, d in rois
        ]
        return torch.stack(found)

    def shape(x: Tensor, rois: Tensor, scale: float, h: int, w: int, *_: Any) -> Tensor:
        return x.new_empty(rois.shape[0], x.shape[1], h, w)

    library.impl("roi_align", pooled, "CompositeExplicitAutograd")
    library.impl("roi_align", shape, "Meta")
    return library


def test_features_of_boxes_are_cut(roi_align: Any) -> None:
    model = randomise(Boxes()).double().eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    inputs = as_double(
        (x, torch.tensor([[0, 1, 1, 4, 4], [1, 0, 2, 5, 5], [1, 2, 0, 3, 5]]).float())
    )
    groups = thinet.find_groups(model, inputs)
    assert {g.name: g.channels for g in groups if g.locked is None} == {"conv1": 6, "fc1": 5}
    for name in ("conv1", "fc1"):
        small = thinet.cut(model, inputs, {name: [0, 3]}, verify=True)
        assert small(*inputs).shape == (3, 2)


# --- axes that move in place ----------------------------------------------------------------


class Turned(nn.Module):
    """Places before channels, without a new tensor."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 5), nn.Linear(5, 4)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).clone()
        if self.way == "unsqueeze_":
            x.unsqueeze_(1).transpose_(2, 3).squeeze_(1)
        elif self.way == "t_":
            x = x[0].clone()
            x.t_()
        else:
            getattr(x, self.way)(1, 2)
        return self.head(F.relu(self.fc(x)))


@pytest.mark.parametrize("places", [4, 6], ids=["places", "as many places as channels"])
@pytest.mark.parametrize("way", ["transpose_", "swapaxes_", "unsqueeze_", "t_"])
def test_axes_that_move_in_place_keep_their_channels(way: str, places: int) -> None:
    model = randomise(Turned(way)).eval()
    x = torch.randn(8, 3, places // 2, 2, generator=torch.Generator().manual_seed(7))
    groups = thinet.find_groups(model, x)
    assert [g.locked is None for g in groups] == [True, True, False]
    for name in ("conv", "fc"):
        check(model, x, groups, {name: [0, 3]}, thinet.cut)
    result = thinet.prune(model, x, [x], budget=thinet.Budget(keep=0.5))
    assert result.model.conv.out_channels == 3
    assert result.model(x).isfinite().all()
