"""Modules that state their sizes, in place of those that derive them from the residual stream.

`C // num_heads` in forward code ties the attention's inner width to the width of its input. Such a
module takes another class, with the same parameters, buffers, hooks and names, and with its sizes
as attributes. It computes the same, and its heads can be cut. The new class comes before the old
one in the method resolution order, so all other methods stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

EXPLICIT: Mapping[str, str] = {
    "torch.nn.modules.activation.MultiheadAttention": "multihead.MultiheadAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention": "windows.ShiftedWindows",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": "windows.ShiftedWindows",
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": "windows.ShiftedVolumes",
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": "windows.RelativeAttention",
    "timm.layers.attention_pool.AttentionPoolLatent": "tokens.LatentPool",
    "timm.layers.pos_embed_rel.RelPosBias": "positions.RelPosBias",
    "timm.layers.pos_embed_rel.RelPosBiasTf": "positions.RelPosLookup",
    "timm.layers.pos_embed_rel.RelPosMlp": "positions.RelPosMlp",
    "timm.models.beit.Attention": "tokens.SharedBiasAttention",
    "timm.models.cait.ClassAttn": "class_token.ClassAttention",
    "timm.models.cait.TalkingHeadAttn": "tokens.TalkingHeads",
    "timm.models.coat.FactorAttnConvRelPosEnc": "between_channels.Factorised",
    "timm.models.convit.GPSA": "tokens.GatedPositions",
    "timm.models.convit.MHSA": "tokens.Attention",
    "timm.models.crossvit.CrossAttention": "class_token.CrossAttention",
    "timm.models.davit.ChannelAttention": "between_channels.ChannelAttention",
    "timm.models.davit.ChannelAttentionV2": "between_channels.ScaledChannelAttention",
    "timm.models.davit.WindowAttention": "tokens.Attention",
    "timm.models.edgenext.CrossCovarianceAttn": "between_channels.CrossCovariance",
    "timm.models.efficientvit_msra.CascadedGroupAttention": "cascaded.Cascade",
    "timm.models.eva.EvaAttention": "tokens.RotaryAttention",
    "timm.models.fastvit.Attention": "tokens.MapAttention",
    "timm.models.gcvit.WindowAttentionGlobal": "tokens.GlobalQueries",
    "timm.models.hiera.MaskUnitAttention": "pooled.MaskUnits",
    "timm.models.hieradet_sam2.MultiScaleAttention": "pooled.PooledQueries",
    "timm.models.metaformer.Attention": "tokens.Attention",
    "timm.models.nest.Attention": "tokens.BlockAttention",
    "timm.models.nextvit.EfficientAttention": "fewer_keys.PooledKeys",
    "timm.models.pvt_v2.Attention": "fewer_keys.Pyramid",
    "timm.models.swin_transformer_v2.WindowAttention": "cosine.ContinuousBias",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": "cosine.MetaBias",
    "timm.models.twins.GlobalSubSampleAttn": "fewer_keys.SubSampled",
    "timm.models.twins.LocallyGroupedAttn": "tokens.LocalAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention": "tokens.RelPosAttention",
    "timm.models.vision_transformer_sam.Attention": "tokens.DecomposedAttention",
    "timm.models.volo.Attention": "tokens.GridAttention",
    "timm.models.volo.OutlookAttention": "pooled.Outlook",
    "timm.models.xcit.XCA": "between_channels.CrossCovariance",
}
"""Class by its full name to the form that takes its place: its file and its name after "Explicit".

Subclasses are not touched. A file is loaded when a network has one of its classes.
"""


def explicit_class(module: nn.Module) -> Any:
    """The class that can take the place of this module's own, or None.

    A class of that name in another version of its package, which is called otherwise or lacks an
    attribute that the form reads, has none.
    """
    kind = type(module)
    place = EXPLICIT.get(f"{kind.__module__}.{kind.__qualname__}")
    if place is None:
        return None
    file, _, name = place.rpartition(".")
    form = getattr(import_module(f"{__name__}.{file}"), f"Explicit{name}")
    return _on(form, kind) if _fits(form, module) else None


def make_explicit(module: nn.Module) -> Callable[[], None]:
    """Let one module state its sizes, in place; returns a function that undoes it."""
    new, old, before = explicit_class(module), type(module), dict(module.__dict__)
    if new is None:
        raise ValueError(f"there is no explicit form of {old.__name__}")
    for name, value in new.sizes(module).items():
        module.__dict__[name] = value
    module.__class__ = new

    def undo() -> None:
        module.__class__ = old
        module.__dict__.clear()
        module.__dict__.update(before)

    return undo


def all_explicit(model: nn.Module) -> None:
    """Let every module of a copy state its sizes."""
    for module in model.modules():
        if explicit_class(module) is not None:
            make_explicit(module)


def _fits(form: Any, module: nn.Module) -> bool:
    """Whether the module is called as the form is, and has what the form reads."""
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (form, type(module)))
    if list(ours) != list(theirs):
        return False
    read = {name for kind in form.__mro__ if kind not in nn.Module.__mro__ for name in _names(kind)}
    try:
        return all(hasattr(module, name) for name in read - form.sizes(module).keys())
    except AttributeError:  # what the sizes are taken from is not there
        return False


def _names(kind: type) -> set[str]:
    return set(inspect.get_annotations(kind))


@cache
def _on(form: Any, kind: type[nn.Module]) -> Any:
    """The form as a subclass of the class whose place it takes."""
    if issubclass(form, kind):
        return form
    words = {"__module__": form.__module__, "__doc__": form.__doc__, "__reduce_ex__": _reduce}
    return type(form.__name__, (form, kind), words)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """For pickle, which finds classes by name: the two that this one was made of."""
    return _blank, type(self).__bases__, *object.__reduce_ex__(self, protocol)[2:]  # type: ignore[misc]


def _blank(form: Any, kind: type[nn.Module]) -> nn.Module:
    made = _on(form, kind)
    return made.__new__(made)
