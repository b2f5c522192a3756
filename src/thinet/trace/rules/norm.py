"""Normalisations: per channel they follow, over channels they couple."""

from __future__ import annotations

import numpy as np

from thinet.trace.labels import FIXED, Axis, Labeller
from thinet.trace.program import Op, Value


def per_channel(labels: Labeller, op: Op) -> None:
    """BatchNorm: every one-dimensional operand goes with dimension 1 of the input."""
    x = op.args[0]
    axes = list(labels.of(x))
    for value in op.inputs()[1:]:
        if len(value.shape) == 1 and value.shape[0] == x.shape[1]:
            axes[1] = labels.join(axes[1], labels.of(value)[0], op.where)
    if _counts_itself(op):  # over all else, such as the inputs of a weight that is standardised
        _over(labels, op, [axes[0], *axes[2:]])
    for out in op.outputs():
        if out.shape == x.shape:
            labels.set(out, axes)
        else:
            labels.set(out, [axes[1] if n == x.shape[1] else FIXED for n in out.shape])


def _counts_itself(op: Op) -> bool:
    """Whether mean and variance are of the input, not running ones."""
    if op.name == "aten._batch_norm_with_update":
        return True
    arguments = [argument.name for argument in op.func._schema.arguments]
    place = arguments.index("training") if "training" in arguments else len(op.args)
    return place < len(op.args) and bool(op.args[place])


def layer_norm(labels: Labeller, op: Op) -> None:
    x, shape = op.args[0], op.args[1]
    axes = list(labels.of(x))
    lead = len(axes) - len(shape)
    for affine in op.inputs()[1:]:
        for dim, axis in enumerate(labels.of(affine)):
            axes[lead + dim] = labels.join(axes[lead + dim], axis, op.where)
    _over(labels, op, axes[lead:])
    first, *others = op.outputs()
    labels.set(first, axes)
    for out in others:
        labels.set(out, [a if n > 1 else FIXED for a, n in zip(axes, out.shape, strict=False)])


def group_norm(labels: Labeller, op: Op) -> None:
    """Whole groups of channels can go, since each is normalised by itself."""
    x, groups = op.args[0], op.args[6]
    axes = list(labels.of(x))
    axes[1] = labels.vector(axes[1], x.shape[1], f"{op.where} normalises a fixed axis")
    for value in op.inputs()[1:]:
        axes[1] = labels.join(axes[1], labels.of(value)[0], op.where)
    channels = axes[1]
    assert isinstance(channels, np.ndarray)
    of_groups: Axis = FIXED  # of the mean and the deviation of each group
    if groups == 1:
        _over(labels, op, [channels])
    elif labels.choose(op, "groups", "whole") == "whole":
        labels.tie(channels.reshape(groups, -1))
        of_groups = np.ascontiguousarray(channels.reshape(groups, -1)[:, 0])
    else:
        labels.tie(np.ascontiguousarray(channels.reshape(groups, -1).T))
        _over(labels, op, [channels])
    first, *others = op.outputs()
    labels.set(first, axes)
    for out in others:
        labels.set(out, (*(FIXED,) * (len(out.shape) - 1), of_groups))


def softmax(labels: Labeller, op: Op) -> None:
    x: Value = op.args[0]
    _over(labels, op, [labels.of(x)[op.args[1]]])
    for out in op.outputs():
        labels.set(out, labels.of(x))


def _over(labels: Labeller, op: Op, axes: list[Axis], advice: str = "") -> None:
    for axis in axes:
        if isinstance(axis, np.ndarray):
            labels.classes.normalise(axis, f"it is normalised over by {op.where}{advice}")


FOLDED = (
    " (torch.nn.utils.parametrize.remove_parametrizations, or remove_weight_norm, makes it a plain "
    "weight that can be cut exactly)"
)


def weight_norm(labels: Labeller, op: Op) -> None:
    """w = g v / |v|: the norm runs over every dimension but one."""
    v, g, dim = op.args[0], op.args[1], (op.args[2] if len(op.args) > 2 else 0)
    axes = list(labels.of(v))
    for other, axis in enumerate(axes):
        if other != dim:
            _over(labels, op, [axis], FOLDED)
    axes[dim] = labels.join(axes[dim], labels.of(g)[dim], op.where)
    first, *others = op.outputs()
    labels.set(first, axes)
    for out in others:
        labels.set(out, [a if n > 1 else FIXED for a, n in zip(axes, out.shape, strict=True)])


RULES = {
    **{
        f"aten.{name}": per_channel
        for name in (
            "native_batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "batch_norm",
            "_batch_norm_no_update",
            "_batch_norm_with_update",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
        )
    },
    "aten.native_layer_norm": layer_norm,
    "aten._fused_rms_norm": layer_norm,
    "aten.native_group_norm": group_norm,
    "aten._softmax": softmax,
    "aten._safe_softmax": softmax,
    "aten._log_softmax": softmax,
    "aten._weight_norm_interface": weight_norm,
    "aten._weight_norm": weight_norm,
}
