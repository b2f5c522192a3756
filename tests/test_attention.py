"""Heads can go: attention of torch, torchvision-like and hand-written modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import thinet
from tests.oracle import as_double, check, randomise
from thinet.checkpoint import load, save
from thinet.surgery.apply import apply_plan
from thinet.surgery.explicit import all_explicit, explicit_class
from thinet.trace.analyse import analyse
from thinet.trace.planning import make_plan
from thinet.vision import torchvision

torch.set_num_threads(1)
WIDTH, HEADS = 24, 4


class Encoder(nn.Module):
    """Two layers of torch's own, whose fused path would ignore what was cut."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True, dropout=0.0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


class Attended(nn.Module):
    """`nn.MultiheadAttention` whose averaged weights nobody reads."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.attn(x, memory, memory)[0])


class Stacked(nn.Module):
    """Fused queries, keys and values; the inner width is an attribute beside the heads."""

    def __init__(self, heads: int = 3, width: int = 8) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, width, heads * width
        self.scale = width**-0.5
        self.qkv = nn.Linear(WIDTH, 3 * self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, self.attn_dim))


class Grouped(nn.Module):
    """Four query heads share two keys and values; nothing but the width of a head is written."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.o = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5)
        return self.o(out.transpose(1, 2).flatten(2))


class Derived(nn.Module):
    """The width of a head is computed from the residual stream: no attribute can say it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, length, c))


def tokens(*, length: int = 5) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(3))


CASES = {
    "encoder": (
        Encoder,
        tokens(),
        {"layers.layers.0.self_attn": HEADS, "layers.layers.0.linear1": 20},
    ),
    "cross": (Attended, (tokens(), tokens(length=7)), {"attn": HEADS}),
    "extra keys": (lambda: Attended(add_bias_kv=True), (tokens(), tokens()), {"attn": HEADS}),
    "stacked": (Stacked, tokens(), {"qkv": 3}),
    "grouped": (Grouped, tokens(), {"q": 2}),
}


def prepared(case: str) -> tuple[nn.Module, Any, dict[str, int]]:
    build, inputs, expected = CASES[case]
    torch.manual_seed(0)
    return randomise(build()).double().eval(), as_double(inputs), expected


@pytest.mark.parametrize("case", CASES)
def test_whole_heads_go_and_the_rest_is_exact(case: str) -> None:
    model, inputs, expected = prepared(case)
    groups = thinet.find_groups(model, inputs)
    free = {g.name: g.channels for g in groups if g.locked is None}
    assert expected.items() <= free.items(), (free, [g.locked for g in groups])
    for name, heads in expected.items():
        for units in ([0], [heads - 1], list(range(1, heads))):
            check(model, inputs, groups, {name: units}, thinet.cut)


def test_a_derived_width_is_refused_with_its_place() -> None:
    model = randomise(Derived()).double().eval()
    group = thinet.find_groups(model, tokens().double())[0]
    assert group.locked is not None
    assert "channels are gone" in group.locked


def test_the_width_of_a_head_can_be_chosen_instead() -> None:
    model, inputs, _ = prepared("stacked")
    groups = thinet.find_groups(model, inputs, choices={":layout": "inner"})
    (group,) = [g for g in groups if g.locked is None]
    assert group.channels == 8
    small = thinet.cut(model, inputs, {group.name: [0, 1, 5]}, choices={":layout": "inner"})
    assert (small.num_heads, small.head_dim, small.attn_dim) == (3, 3, 9)
    assert small.scale == 8**-0.5


def test_attributes_follow_and_the_scale_stays() -> None:
    model, inputs, _ = prepared("stacked")
    small = thinet.cut(model, inputs, {"qkv": [0, 2]})
    assert (small.num_heads, small.head_dim, small.attn_dim) == (2, 8, 16)
    assert small.scale == model.scale
    assert model.num_heads == 3


def test_slices_name_the_original_parameters() -> None:
    model, inputs, _ = prepared("encoder")
    group = next(g for g in thinet.find_groups(model, inputs) if g.name.endswith("0.self_attn"))
    found = {(s.parameter.rpartition("self_attn.")[2], s.dim): s.indices for s in group.slices([1])}
    head = tuple(range(6, 12))
    rows = tuple(i + 24 * part for part in range(3) for i in head)
    assert found == {
        ("in_proj_weight", 0): rows,
        ("in_proj_bias", 0): rows,
        ("out_proj.weight", 1): head,
    }


def test_an_untouched_attention_keeps_its_class() -> None:
    model, inputs, _ = prepared("encoder")
    small = thinet.cut(model, inputs, {"layers.layers.0.self_attn": [0, 1]})
    kinds = [type(layer.self_attn) for layer in small.layers.layers]
    assert kinds[0] is not nn.MultiheadAttention
    assert issubclass(kinds[0], nn.MultiheadAttention)
    assert kinds[1] is nn.MultiheadAttention
    assert type(model.layers.layers[0].self_attn) is nn.MultiheadAttention


def test_a_cut_attention_is_saved_loaded_pickled_and_trained(tmp_path: Any) -> None:
    model, inputs, _ = prepared("encoder")
    analysis = analyse(model, inputs)
    plan = make_plan(analysis, model, {"layers.layers.0.self_attn": [1, 3]})
    small = copy.deepcopy(model)
    apply_plan(small, plan)
    expected = small(inputs)
    save(tmp_path / "small.safetensors", small, plan)
    loaded = load(tmp_path / "small.safetensors", Encoder().double().eval())
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(inputs), expected)  # noqa: S301
    assert torch.equal(copy.deepcopy(small)(inputs), expected)
    small.train()(inputs).sum().backward()
    assert small.layers.layers[0].self_attn.in_proj_weight.grad.shape == (36, WIDTH)


def test_the_residual_stream_goes_on_request() -> None:
    model, inputs, _ = prepared("encoder")
    groups = thinet.find_groups(model, inputs)
    stream = next(g for g in groups if g.normalised_over)
    assert stream.locked is not None and "normalised over" in stream.locked
    groups = thinet.find_groups(model, inputs, normalised=True)
    stream = next(g for g in groups if g.normalised_over)
    assert stream.locked is None
    keep = {stream.name: range(5, WIDTH), "layers.layers.0.self_attn": [0, 3]}
    small = thinet.cut(model, inputs, keep, normalised=True)
    first = small.layers.layers[0]
    assert first.norm1.normalized_shape == (WIDTH - 5,)
    assert first.self_attn.in_proj_weight.shape == (2 * 3 * WIDTH // HEADS, WIDTH - 5)
    assert small(inputs).shape == model(inputs).shape


def options() -> list[dict[str, Any]]:
    return [
        {},
        {"batch_first": True},
        {"kdim": 8, "vdim": 10},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"bias": False},
    ]


@pytest.mark.parametrize("option", options(), ids=str)
@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("mask", ["none", "shared", "each head", "padding"])
def test_the_explicit_form_computes_the_same(option: dict[str, Any], need: bool, mask: str) -> None:
    torch.manual_seed(0)
    plain = randomise(nn.MultiheadAttention(16, 4, **option)).double().eval()
    explicit = copy.deepcopy(plain)
    all_explicit(explicit)
    assert type(explicit) is explicit_class(plain)
    q, k, v = (
        torch.randn(2, n, option.get(width, 16)).double()
        for n, width in ((5, "none"), (7, "kdim"), (7, "vdim"))
    )
    if not option.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    given: dict[str, Any] = {"need_weights": need}
    if mask == "shared":
        given["attn_mask"] = torch.randn(5, 7).double()
    elif mask == "each head":
        given["attn_mask"] = torch.randn(8, 5, 7).double()
    elif mask == "padding":
        given["key_padding_mask"] = torch.arange(14).view(2, 7) % 7 > 3
    expected, found = plain(q, k, v, **given), explicit(q, k, v, **given)
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1])


def test_one_sequence_and_a_causal_hint() -> None:
    plain = randomise(nn.MultiheadAttention(16, 4)).double().eval()
    explicit = copy.deepcopy(plain)
    all_explicit(explicit)
    x = torch.randn(5, 16).double()
    torch.testing.assert_close(explicit(x, x, x), plain(x, x, x))
    causal = nn.Transformer.generate_square_subsequent_mask(5).double()
    given: dict[str, Any] = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(explicit(x, x, x, **given), plain(x, x, x, **given))
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        explicit(x, x, x, is_causal=True)


def windows(kind: str, shift: int) -> nn.Module:
    from torchvision.models import swin_transformer

    torch.manual_seed(0)
    return randomise(getattr(swin_transformer, kind)(24, [4, 5], [shift, shift], 3)).double().eval()


@pytest.mark.parametrize("kind", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(9, 11), (4, 5), (8, 10)], ids=str)
def test_explicit_windows_compute_the_same(kind: str, shift: int, size: tuple[int, int]) -> None:
    torchvision()
    plain = windows(kind, shift)
    explicit = copy.deepcopy(plain)
    all_explicit(explicit)
    assert type(explicit) is explicit_class(plain)
    x = torch.randn(2, *size, 24).double()
    torch.testing.assert_close(explicit(x), plain(x))


def volumes(shift: tuple[int, int, int]) -> nn.Module:
    from torchvision.models.video import swin_transformer

    torch.manual_seed(0)
    kind = swin_transformer.ShiftedWindowAttention3d
    return randomise(kind(24, [2, 3, 4], list(shift), 3)).double().eval()


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("size", [(4, 6, 8), (3, 7, 9), (1, 3, 9), (2, 3, 4), (5, 2, 3)], ids=str)
def test_explicit_volumes_compute_the_same(
    shift: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    torchvision()
    plain = volumes(shift)
    explicit = copy.deepcopy(plain)
    all_explicit(explicit)
    assert type(explicit) is explicit_class(plain)
    x = torch.randn(2, *size, 24).double()
    torch.testing.assert_close(explicit(x), plain(x))


class Windowed(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x))


@pytest.mark.parametrize("kind", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
def test_heads_of_windows_go_with_their_tables(kind: str) -> None:
    torchvision()
    model = Windowed(windows(kind, 2)).double().eval()
    x = torch.randn(1, 9, 11, 24).double()
    groups = thinet.find_groups(model, x)
    (heads,) = (g for g in groups if "attention.qkv" in g.producers and g.locked is None)
    assert heads.channels == 3
    check(model, x, groups, {heads.name: [1]}, thinet.cut)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)], ids=str)
def test_heads_of_volumes_go_with_their_tables(shift: tuple[int, int, int]) -> None:
    torchvision()
    model = Windowed(volumes(shift)).double().eval()
    x = torch.randn(1, 3, 7, 9, 24).double()
    groups = thinet.find_groups(model, x)
    (heads,) = (g for g in groups if "attention.qkv" in g.producers and g.locked is None)
    assert heads.channels == 3
    check(model, x, groups, {heads.name: [1]}, thinet.cut)


def test_maxvit_heads_go() -> None:
    torchvision()
    from torchvision.models import maxvit

    torch.manual_seed(0)
    module = maxvit.RelativePositionalMultiHeadAttention(24, 8, 16)
    model = randomise(Windowed(module)).double().eval()
    x = torch.randn(2, 2, 16, 24).double()
    plain = model(x)
    explicit = copy.deepcopy(model)
    all_explicit(explicit)
    torch.testing.assert_close(explicit(x), plain)
    groups = thinet.find_groups(model, x)
    heads = next(g for g in groups if g.name == "attention.to_qkv")
    assert (heads.locked, heads.channels) == (None, 3)
    check(model, x, groups, {heads.name: [0, 2]}, thinet.cut)
