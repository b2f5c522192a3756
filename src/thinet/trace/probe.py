"""Cut a copy without weights, trace it again, and compare with what the labels say."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from thinet.paths import named_modules
from thinet.plan import AttributeChange
from thinet.surgery.apply import named_tensors, resized, set_attributes, sliced
from thinet.trace.comparison import Comparison, Mismatch
from thinet.trace.decisions import Decisions, only_decide
from thinet.trace.groups import Analysis
from thinet.trace.labels import Labeller, Mask
from thinet.trace.planning import (
    kept_slices,
    removed_classes,
    shapes_left,
    told_attributes,
    with_learned,
)
from thinet.trace.record import StoppedError, record_replica
from thinet.trace.replica import Call, meta_twin
from thinet.types import cloned


@dataclass(frozen=True, eq=False)
class Trial:
    """A model to be cut to `keep` and traced: which labels are gone from it.

    Attributes:
        keep: for each group that loses some, the units that stay.
        pristine: the uncut model, a copy.
        tensors: the cut tensor for each place that holds one: (module, store of it, name).
        told: attributes that the new shapes tell; those that are only learned are still old.
        gone: for each class, whether it is gone.
        left: for each label, whether it is not.
        cut: names of the parameters and buffers that lose something.
    """

    keep: Mapping[str, Sequence[int]]
    pristine: nn.Module
    tensors: Mapping[tuple[str, str, str], torch.Tensor]
    told: tuple[AttributeChange, ...]
    gone: Mask
    left: Mask
    cut: frozenset[str]


def trial(analysis: Analysis, pristine: nn.Module, keep: Mapping[str, Sequence[int]]) -> Trial:
    """What cutting a copy of the model to `keep` puts into it, but for what is learned later."""
    gone, classes = removed_classes(analysis, keep), analysis.labeller.classes
    named = dict(named_tensors(pristine))
    shapes = shapes_left(analysis, named, gone)
    if analysis.program.on_meta:
        small = {name: resized(named[name], shape) for name, shape in shapes.items()}
    else:
        small = sliced(named, kept_slices(analysis, gone))
    new = {id(named[name]): tensor for name, tensor in small.items()}
    return Trial(
        keep=keep,
        pristine=pristine,
        tensors={
            (path, store, name): new[id(tensor)]
            for path, module in named_modules(pristine).items()
            for store in ("_parameters", "_buffers")
            for name, tensor in getattr(module, store).items()
            if id(tensor) in new
        },
        told=told_attributes(analysis, pristine, shapes),
        gone=gone,
        left=~gone[classes.find(np.arange(classes.count, dtype=np.int64))],
        cut=frozenset(shapes),
    )


def _cut_copy(analysis: Analysis, cut: Trial) -> nn.Module:
    """A copy of the model that is cut as the trial says, with the attributes learned so far."""
    model, memo = meta_twin(cut.pristine), {}
    modules = named_modules(model)
    for (path, store, name), tensor in cut.tensors.items():
        new = tensor if tensor.is_meta else copy.deepcopy(tensor, memo)
        getattr(modules[path], store)[name] = new
    set_attributes(model, with_learned(cut.told, analysis, cut.pristine, cut.gone))
    return model


def probe(
    analysis: Analysis, cut: Trial, inputs: Call, *, until: int | None = None
) -> Mismatch | None:
    """Trace a cut copy with the attributes learned so far; None where all agrees with the labels.

    The trace stops at the first operation that does not follow, or after number `until`.
    """
    before = 0
    for walk in (analysis.labeller, analysis.training):
        if walk is None or (until is not None and until < before):
            continue
        last = None if until is None else until - before
        light = only_decide(walk.program.decisions)
        mismatch = _mismatch(analysis, cut, inputs, walk, last, light)
        if mismatch is not None and light:
            # The data may also lead where no decision is seen, and any numbers astray.
            mismatch = _mismatch(analysis, cut, inputs, walk, last, light=False)
        if mismatch is not None:
            index = before + mismatch.index
            # It may also stop on the way to the one after.
            return replace(mismatch, index=index) if until is None or index <= until else None
        before = len(analysis.program.ops)
    return None


def _mismatch(
    analysis: Analysis, cut: Trial, inputs: Call, walk: Labeller, until: int | None, light: bool
) -> Mismatch | None:
    """The first operation of the evaluation or the training forward that does not follow."""
    replica, told = _cut_copy(analysis, cut), walk.program
    args = cloned(inputs)
    comparison = Comparison(walk, cut.left, cut.cut, until)
    try:
        with nullcontext() if told.on_meta else Decisions(told.decisions, light=light):
            record_replica(replica, args, training=walk is analysis.training, watch=comparison)
        return comparison.finish(None)
    except StoppedError as error:
        return comparison.finish(error)
