"""timm's attention classes: the explicit form computes the same, and heads can go."""

from __future__ import annotations

import copy
import importlib
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.checkpoint import load, save
from thinet.cut import apply_to_copy
from thinet.surgery.explicit import EXPLICIT, all_explicit, explicit_class, make_explicit
from thinet.trace.analyse import analyse
from thinet.trace.planning import make_plan
from thinet.vision import torchvision

torchvision()  # timm needs it, and it may have to be helped
torch.set_num_threads(1)
C, HEADS = 12, 3
NORM = partial(nn.LayerNorm, eps=1e-6)


class Tokens(nn.Module):
    """An attention module between two layers; `extra` are its further arguments."""

    def __init__(self, attn: nn.Module, *extra: Any, wide: int = C) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(C, C), attn
        self.head = nn.Linear(wide, 3)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(self.embed(x), *self.extra))


class Maps(nn.Module):
    """Attention over (n, c, h, w) made one over (n, h, w, c)."""

    def __init__(self, maps: nn.Module) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def timm(path: str, *args: Any, **options: Any) -> nn.Module:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"timm.{module}"), name)(*args, **options)


def rope(length: int, width: int) -> Tensor:
    return torch.randn(length, 2 * width, generator=torch.Generator().manual_seed(2)).double()


def biased(kind: str, **options: Any) -> nn.Module:
    maker = importlib.import_module("timm.layers.pos_embed_rel")
    options["rel_pos_cls"] = partial(getattr(maker, kind), window_size=(2, 3))
    return timm("models.vision_transformer_relpos.RelPosAttention", C, HEADS, **options)


def relpos(mode: str) -> nn.Module:
    maker = importlib.import_module("timm.layers.pos_embed_rel").RelPosMlp
    kind = partial(maker, window_size=(2, 3), mode=mode)
    return timm("models.maxxvit.AttentionCl", C, dim_head=4, rel_pos_cls=kind)


def lookup() -> nn.Module:
    maker = importlib.import_module("timm.layers.pos_embed_rel").RelPosBiasTf
    kind = partial(maker, window_size=(2, 3))
    return timm("models.maxxvit.AttentionCl", C, dim_head=4, rel_pos_cls=kind)


def coat() -> nn.Module:
    places = timm("models.coat.ConvRelPosEnc", 4, HEADS, {3: 1, 5: 2})
    return timm("models.coat.FactorAttnConvRelPosEnc", C, HEADS, True, shared_crpe=places)


def hiera(stride: int, windows: bool) -> nn.Module:
    size = 3 if windows else 0
    return timm("models.hiera.MaskUnitAttention", C, C, HEADS, stride, size, windows)


def eva(**options: Any) -> nn.Module:
    options = {"norm_layer": NORM, "scale_norm": False} | options
    return timm("models.eva.EvaAttention", C, HEADS, **options)


def sam(**options: Any) -> nn.Module:
    return timm("models.vision_transformer_sam.Attention", C, HEADS, **options)


def latents() -> nn.Module:
    options = {"qk_norm": True, "latent_len": 2, "pool_type": "avg", "pos_embed": "abs"}
    return timm(
        "layers.attention_pool.AttentionPoolLatent", C, num_heads=HEADS, feat_size=6, **options
    )


def twins(ws: int) -> nn.Module:
    return timm("models.twins.LocallyGroupedAttn", C, HEADS, ws=ws)


LINE, IMAGE = (2, 6, C), (2, 4, 5, C)
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[Any, ...]]] = {
    "beit": (partial(timm, "models.beit.Attention", C, HEADS, True), LINE, ()),
    "beit places": (
        partial(timm, "models.beit.Attention", C, HEADS, True, True, window_size=(1, 5)),
        LINE,
        (torch.ones(1, 1, 6, 6).double(),),
    ),
    "cait class": (partial(timm, "models.cait.ClassAttn", C, HEADS, True), LINE, ()),
    "cait": (partial(timm, "models.cait.TalkingHeadAttn", C, HEADS, True), LINE, ()),
    "coat": (coat, (2, 13, C), ((3, 4),)),
    "latent pool": (
        partial(timm, "layers.attention_pool.AttentionPoolLatent", C, num_heads=HEADS),
        LINE,
        (),
    ),
    "latent pool of all": (latents, LINE, ()),
    "convit": (partial(timm, "models.convit.MHSA", C, HEADS), LINE, ()),
    "convit gated": (partial(timm, "models.convit.GPSA", C, HEADS), (2, 9, C), ()),
    "crossvit": (partial(timm, "models.crossvit.CrossAttention", C, HEADS, True), LINE, ()),
    "davit": (partial(timm, "models.davit.ChannelAttention", C, HEADS), LINE, ()),
    "davit 2": (partial(timm, "models.davit.ChannelAttentionV2", C, HEADS), LINE, ()),
    "davit 2 still": (
        partial(timm, "models.davit.ChannelAttentionV2", C, HEADS, dynamic_scale=False),
        LINE,
        (),
    ),
    "davit window": (partial(timm, "models.davit.WindowAttention", C, (2, 3), HEADS), LINE, ()),
    "edgenext": (partial(timm, "models.edgenext.CrossCovarianceAttn", C, HEADS), LINE, ()),
    "eva": (eva, LINE, (rope(5, 4),)),
    "eva apart": (partial(eva, qkv_fused=False, rotate_half=True), LINE, (rope(5, 4),)),
    "eva norms": (partial(eva, qk_norm=True, gated=True), LINE, ()),
    "eva causal": (eva, LINE, (None, None, True)),
    "eva mask": (eva, LINE, (None, torch.arange(36).view(6, 6) % 5 > 0)),
    "fastvit": (lambda: Maps(timm("models.fastvit.Attention", C, 4)), IMAGE, ()),
    "gcvit": (
        partial(timm, "models.gcvit.WindowAttentionGlobal", C, HEADS, (2, 3), False),
        LINE,
        (),
    ),
    "hiera": (partial(hiera, 1, False), LINE, ()),
    "hiera pooled": (partial(hiera, 2, False), (2, 12, C), ()),
    "hiera windows": (partial(hiera, 2, True), (2, 12, C), ()),
    "hieradet": (partial(timm, "models.hieradet_sam2.MultiScaleAttention", C, C, HEADS), IMAGE, ()),
    "hieradet pooled": (
        lambda: timm(
            "models.hieradet_sam2.MultiScaleAttention", C, C, HEADS, q_pool=nn.MaxPool2d(2)
        ),
        IMAGE,
        (),
    ),
    "metaformer": (partial(timm, "models.metaformer.Attention", C, 4), LINE, ()),
    "nest": (partial(timm, "models.nest.Attention", C, HEADS), (2, 4, 5, C), ()),
    "nextvit": (
        partial(timm, "models.nextvit.EfficientAttention", C, head_dim=4, sr_ratio=2),
        (2, 8, C),
        (),
    ),
    "pvt": (partial(timm, "models.pvt_v2.Attention", C, HEADS, 2), (2, 16, C), ((4, 4),)),
    "pvt whole": (partial(timm, "models.pvt_v2.Attention", C, HEADS), (2, 16, C), ((4, 4),)),
    "pvt linear": (
        partial(timm, "models.pvt_v2.Attention", C, HEADS, linear_attn=True),
        (2, 64, C),
        ((8, 8),),
    ),
    "relative table": (partial(biased, "RelPosBias"), LINE, ()),
    "relative network": (partial(biased, "RelPosMlp", qk_norm=True), LINE, ()),
    "maxvit": (lookup, LINE, ()),
    "maxxvit": (partial(relpos, "cr"), LINE, ()),
    "maxxvit squashed": (partial(relpos, "swin"), LINE, ()),
    "sam": (partial(sam, use_rel_pos=True, input_size=(4, 5)), IMAGE, ()),
    "sam plain": (partial(sam, qk_norm=True), IMAGE, ()),
    "swin 2": (
        partial(timm, "models.swin_transformer_v2.WindowAttention", C, (2, 3), HEADS),
        LINE,
        (),
    ),
    "swin 2 shifted": (
        partial(timm, "models.swin_transformer_v2.WindowAttention", C, (2, 3), HEADS),
        (4, 6, C),
        (torch.randn(2, 6, 6).double(),),
    ),
    "swin 2 cr": (
        partial(timm, "models.swin_transformer_v2_cr.WindowMultiHeadAttention", C, HEADS, (2, 3)),
        (4, 6, C),
        (torch.randn(2, 6, 6).double(),),
    ),
    "twins": (partial(twins, 2), (2, 20, C), ((4, 5),)),
    "twins fewer": (
        partial(timm, "models.twins.GlobalSubSampleAttn", C, HEADS, sr_ratio=2),
        (2, 16, C),
        ((4, 4),),
    ),
    "volo": (partial(timm, "models.volo.Attention", C, HEADS), IMAGE, ()),
    "volo outlook": (partial(timm, "models.volo.OutlookAttention", C, HEADS, 3, 1, 2), IMAGE, ()),
    "xcit": (partial(timm, "models.xcit.XCA", C, HEADS), LINE, ()),
}


def prepared(case: str) -> tuple[nn.Module, Tensor]:
    build, shape, extra = CASES[case]
    torch.manual_seed(0)
    model = randomise(Tokens(build(), *extra)).double().eval()
    return model, torch.randn(*shape, generator=torch.Generator().manual_seed(3)).double()


def test_every_class_of_timm_has_a_case() -> None:
    modules = [m for case in CASES for m in prepared(case)[0].modules()]
    built = {f"{type(m).__module__}.{type(m).__qualname__}" for m in modules}
    built.add("timm.models.efficientvit_msra.CascadedGroupAttention")  # tests/test_cascaded.py
    assert {name for name in EXPLICIT if name.startswith("timm.")} <= built


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_explicit_form_computes_the_same(case: str, fused: bool, training: bool) -> None:
    model, x = prepared(case)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.__dict__["fused_attn"] = fused
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(training)
    explicit = copy.deepcopy(model)
    all_explicit(explicit)
    assert {type(m) for m in explicit.modules()} != {type(m) for m in model.modules()}
    assert list(explicit.state_dict()) == list(model.state_dict())
    assert isinstance(explicit.attn, type(model.attn))
    torch.testing.assert_close(explicit(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_heads_go_and_the_rest_is_exact(case: str) -> None:
    model, x = prepared(case)
    groups = thinet.find_groups(model, x)
    heads = [
        g
        for g in groups
        if g.locked is None and any(c in ("attn.proj", "attn.maps.proj") for c in g.consumers)
    ]
    assert sum(g.channels for g in heads) == HEADS, [(g.name, g.channels, g.locked) for g in groups]
    for group in heads:
        if group.channels > 1:
            check(model, x, groups, {group.name: [group.channels // 2]}, thinet.cut)


def test_a_cut_attention_is_saved_loaded_pickled_and_copied(tmp_path: Path) -> None:
    model, x = prepared("swin 2")
    analysis = analyse(model, x)
    heads = next(g.name for g in analysis.groups if "attn.proj" in g.consumers)
    plan = make_plan(analysis, model, {heads: [0, 2]})
    assert [(r.module, r.builder) for r in plan.replaced] == [("attn", "explicit")]
    small = apply_to_copy(model, plan)
    expected = small(x)
    save(tmp_path / "small.safetensors", small, plan)
    loaded = load(tmp_path / "small.safetensors", prepared("swin 2")[0])
    assert type(loaded.attn) is type(small.attn)
    for again in (loaded, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301
        assert torch.equal(again(x), expected)


def test_other_methods_of_the_class_stay() -> None:
    model, x = prepared("swin 2")
    heads = next(g.name for g in thinet.find_groups(model, x) if "attn.proj" in g.consumers)
    small: Any = thinet.cut(model, x, {heads: [0, 2]})
    small.attn.set_window_size((3, 4))
    assert small(torch.randn(2, 12, C).double()).shape == (2, 12, 3)


def test_a_class_that_lacks_what_the_form_reads_is_left_alone() -> None:
    attn: Any = prepared("cait")[0].attn
    assert explicit_class(attn) is not None
    del attn.proj_w
    assert explicit_class(attn) is None
    with pytest.raises(ValueError, match="no explicit form of TalkingHeadAttn"):
        make_explicit(attn)


def test_a_class_that_is_called_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    attn: Any = prepared("convit")[0].attn
    assert explicit_class(attn) is not None
    monkeypatch.setattr(type(attn), "forward", lambda self, x, mask: x)
    assert explicit_class(attn) is None


def test_one_of_two_heads_with_looked_up_positions_goes() -> None:
    maker = importlib.import_module("timm.layers.pos_embed_rel").RelPosBiasTf
    kind = partial(maker, window_size=(2, 3))
    attn = timm("models.maxxvit.AttentionCl", C, dim_head=6, rel_pos_cls=kind)
    model, x = randomise(Tokens(attn)).double().eval(), torch.randn(*LINE).double()
    groups = thinet.find_groups(model, x)
    check(model, x, groups, {"attn.qkv": [0]}, thinet.cut)
