"""Cut a copy without weights, trace it again, and compare with what the labels say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from thinet.plan import AttributeChange
from thinet.surgery.apply import apply_plan, set_attributes
from thinet.trace.comparison import Comparison, Mismatch
from thinet.trace.decisions import Decisions
from thinet.trace.groups import Analysis
from thinet.trace.labels import Mask
from thinet.trace.planning import followed_changes, make_plan, removed_classes
from thinet.trace.record import StoppedError, record_replica
from thinet.trace.replica import Call, meta_twin


@dataclass(frozen=True, eq=False)
class Trial:
    """A copy without data, cut to `keep`, to be traced: which labels are gone from it.

    `gone` says it of classes, `left` of every label which are not gone. `told` are the attributes
    that the new shapes tell; those that are only learned are still old. `cut` are the parameters
    and buffers that lose something.
    """

    keep: Mapping[str, Sequence[int]]
    model: nn.Module
    gone: Mask
    left: Mask
    told: frozenset[tuple[str, str]]
    cut: frozenset[str]


def trial(analysis: Analysis, pristine: nn.Module, keep: Mapping[str, Sequence[int]]) -> Trial:
    """Cut a copy of the meta model to `keep`; attributes that the analysis has learned stay."""
    plan = make_plan(replace(analysis, followed=()), pristine, keep)
    model = meta_twin(pristine)
    apply_plan(model, plan)
    classes, gone = analysis.labeller.classes, removed_classes(analysis, keep)
    return Trial(
        keep=keep,
        model=model,
        gone=gone,
        left=~gone[classes.find(np.arange(classes.count, dtype=np.int64))],
        told=frozenset((change.module, change.attribute) for change in plan.attributes),
        cut=frozenset(piece.parameter for piece in plan.kept),
    )


def probe(
    analysis: Analysis, cut: Trial, inputs: Call, *, until: int | None = None
) -> Mismatch | None:
    """Trace a cut copy with the attributes learned so far; None where all agrees with the labels.

    The trace stops at the first operation that does not follow, or after number `until`.
    """
    learned = [
        AttributeChange(*change)
        for change in followed_changes(analysis, cut.model, cut.gone)
        if change[:2] not in cut.told
    ]
    before = 0
    for walk in (analysis.labeller, analysis.training):
        if walk is None or (until is not None and until < before):
            continue
        replica = meta_twin(cut.model)
        set_attributes(replica, learned)
        args = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, inputs)
        comparison = Comparison(walk, cut.left, cut.cut, None if until is None else until - before)
        told = walk.program
        try:
            with nullcontext() if told.on_meta else Decisions(told.decisions):
                record_replica(replica, args, training=walk is analysis.training, watch=comparison)
            mismatch = comparison.finish(None)
        except StoppedError as error:
            mismatch = comparison.finish(error)
        if mismatch is not None:
            index = before + mismatch.index
            # It may also stop on the way to the one after.
            return replace(mismatch, index=index) if until is None or index <= until else None
        before = len(analysis.program.ops)
    return None
