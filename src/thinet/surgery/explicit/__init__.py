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
from typing import Any

from torch import nn

from thinet.surgery.explicit.between_channels import (
    ExplicitChannelAttention,
    ExplicitCrossCovariance,
    ExplicitFactorised,
    ExplicitScaledChannelAttention,
)
from thinet.surgery.explicit.class_token import ExplicitClassAttention, ExplicitCrossAttention
from thinet.surgery.explicit.cosine import ExplicitContinuousBias, ExplicitMetaBias
from thinet.surgery.explicit.fewer_keys import (
    ExplicitPooledKeys,
    ExplicitPyramid,
    ExplicitSubSampled,
)
from thinet.surgery.explicit.multihead import ExplicitMultiheadAttention
from thinet.surgery.explicit.pooled import (
    ExplicitMaskUnits,
    ExplicitOutlook,
    ExplicitPooledQueries,
)
from thinet.surgery.explicit.positions import (
    ExplicitRelPosBias,
    ExplicitRelPosLookup,
    ExplicitRelPosMlp,
)
from thinet.surgery.explicit.tokens import (
    ExplicitAttention,
    ExplicitBlockAttention,
    ExplicitDecomposedAttention,
    ExplicitGatedPositions,
    ExplicitGlobalQueries,
    ExplicitGridAttention,
    ExplicitLatentPool,
    ExplicitLocalAttention,
    ExplicitMapAttention,
    ExplicitRelPosAttention,
    ExplicitRotaryAttention,
    ExplicitSharedBiasAttention,
    ExplicitTalkingHeads,
)
from thinet.surgery.explicit.windows import (
    ExplicitRelativeAttention,
    ExplicitShiftedWindowAttention,
)

EXPLICIT: Mapping[str, Any] = {
    "torch.nn.modules.activation.MultiheadAttention": ExplicitMultiheadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ExplicitShiftedWindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ExplicitShiftedWindowAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": ExplicitRelativeAttention,
    "timm.layers.attention_pool.AttentionPoolLatent": ExplicitLatentPool,
    "timm.layers.pos_embed_rel.RelPosBias": ExplicitRelPosBias,
    "timm.layers.pos_embed_rel.RelPosBiasTf": ExplicitRelPosLookup,
    "timm.layers.pos_embed_rel.RelPosMlp": ExplicitRelPosMlp,
    "timm.models.beit.Attention": ExplicitSharedBiasAttention,
    "timm.models.cait.ClassAttn": ExplicitClassAttention,
    "timm.models.cait.TalkingHeadAttn": ExplicitTalkingHeads,
    "timm.models.coat.FactorAttnConvRelPosEnc": ExplicitFactorised,
    "timm.models.convit.GPSA": ExplicitGatedPositions,
    "timm.models.convit.MHSA": ExplicitAttention,
    "timm.models.crossvit.CrossAttention": ExplicitCrossAttention,
    "timm.models.davit.ChannelAttention": ExplicitChannelAttention,
    "timm.models.davit.ChannelAttentionV2": ExplicitScaledChannelAttention,
    "timm.models.davit.WindowAttention": ExplicitAttention,
    "timm.models.edgenext.CrossCovarianceAttn": ExplicitCrossCovariance,
    "timm.models.eva.EvaAttention": ExplicitRotaryAttention,
    "timm.models.fastvit.Attention": ExplicitMapAttention,
    "timm.models.gcvit.WindowAttentionGlobal": ExplicitGlobalQueries,
    "timm.models.hiera.MaskUnitAttention": ExplicitMaskUnits,
    "timm.models.hieradet_sam2.MultiScaleAttention": ExplicitPooledQueries,
    "timm.models.metaformer.Attention": ExplicitAttention,
    "timm.models.nest.Attention": ExplicitBlockAttention,
    "timm.models.nextvit.EfficientAttention": ExplicitPooledKeys,
    "timm.models.pvt_v2.Attention": ExplicitPyramid,
    "timm.models.swin_transformer_v2.WindowAttention": ExplicitContinuousBias,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": ExplicitMetaBias,
    "timm.models.twins.GlobalSubSampleAttn": ExplicitSubSampled,
    "timm.models.twins.LocallyGroupedAttn": ExplicitLocalAttention,
    "timm.models.vision_transformer_relpos.RelPosAttention": ExplicitRelPosAttention,
    "timm.models.vision_transformer_sam.Attention": ExplicitDecomposedAttention,
    "timm.models.volo.Attention": ExplicitGridAttention,
    "timm.models.volo.OutlookAttention": ExplicitOutlook,
    "timm.models.xcit.XCA": ExplicitCrossCovariance,
}
"""Class by its full name to the form that takes its place. Subclasses are not touched."""


def explicit_class(module: nn.Module) -> Any:
    """The class that can take the place of this module's own, or None.

    A class of that name in another version of its package, which is called otherwise or lacks an
    attribute that the form reads, has none.
    """
    kind = type(module)
    form = EXPLICIT.get(f"{kind.__module__}.{kind.__qualname__}")
    return _on(form, kind) if form is not None and _fits(form, module) else None


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
