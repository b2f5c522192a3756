"""First-order loss changes: one backward pass over the calibration data.

Without labels the model's own answers serve as labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten

from thinet.calibrate.batches import images_in
from thinet.calibrate.layers import Layer, find_layers, same_layers
from thinet.errors import CalibrationError
from thinet.logits import find_logits
from thinet.trace.interpret import Execution
from thinet.trace.program import Program, Value, plain
from thinet.types import ChannelGroup, ExampleInputs, Site


@dataclass
class Gradients:
    """By group name, (units,) importances of the feature maps (2017) and of the weights (2019)."""

    taylor: dict[str, Tensor] = field(default_factory=dict)
    taylor_fo: dict[str, Tensor] = field(default_factory=dict)


def collect_gradients(
    model: nn.Module,
    batches: Sequence[tuple[ExampleInputs, Tensor | None]],
    groups: Sequence[ChannelGroup],
    *,
    program: Program,
) -> Gradients:
    """Run the model forwards and backwards over the batches.

    `taylor` is the mean over images of |mean over positions of gradient x activation| at the
    consumers' inputs (Molchanov et al. 2017, eq. 8); `taylor_fo` the mean over batches of
    (sum over a unit's filter weights of gradient x weight)^2 (Molchanov et al. 2019, eq. 8).

    Args:
        program: the traced program, to whose operations the groups' sites refer.

    Raises:
        CalibrationError: the model does not return logits, or gradients are not finite.
    """
    execution = Execution(model)
    weights = _leaves(execution, model)
    layers = find_layers(execution.program(batches[0][0]))
    key = same_layers(layers, find_layers(program))
    wanted = {site.op for group in groups for site in group.sites}
    looked_at = {op: layer for op, layer in layers.items() if key.get(op) in wanted}
    found = Gradients()
    images = sum(images_in(inputs) for inputs, _ in batches)
    for inputs, targets in batches:
        maps, gradients = _sent_back(execution, inputs, targets, looked_at, weights)
        at = {key[op]: per_image for op, per_image in maps.items()}
        for group in groups:
            _add_maps(found, group, at, images)
            _add_weights(found, group, weights, gradients, len(batches))
    for values in (*found.taylor.values(), *found.taylor_fo.values()):
        if not bool(torch.isfinite(values).all()):
            raise CalibrationError("the gradients on the calibration data are not finite")
    return found


def _leaves(execution: Execution, model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, as the execution reads them and as leaves of their own; frozen ones
    too, and one leaf for all names of a shared one."""
    leaves: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            if id(parameter) not in leaves:
                leaves[id(parameter)] = parameter.detach().requires_grad_()
            found[name] = execution.tensors[name] = leaves[id(parameter)]
    return found


def _sent_back(
    execution: Execution,
    inputs: ExampleInputs,
    targets: Tensor | None,
    layers: Mapping[int, Layer],
    weights: Mapping[str, Tensor],
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """One batch's summed loss sent back.

    Returns:
        For each layer (images, C) the mean over positions of gradient x activation of its input,
        and by the id of each weight its gradient.
    """
    maps: dict[int, Tensor] = {}
    images = images_in(inputs)

    def watch(op: int, activation: Tensor) -> None:
        value = activation.detach()

        def hook(gradient: Tensor) -> None:
            maps[op] = _per_image(value * gradient, layers[op].geometry.rank, images)

        activation.register_hook(hook)

    with execution.started([inputs]) as lane, torch.enable_grad():
        (env,) = lane.envs
        sources = {op: _whole(lane.program, layer) for op, layer in layers.items()}
        for op in lane.program.ops:
            if op.index in layers and env[sources[op.index].id].requires_grad:
                watch(op.index, env[sources[op.index].id])
            execution.compute(op, env)
        loss = loss_of(lane.outputs()[0], targets)
        leaves = {id(weight): weight for weight in weights.values()}
        gradients = derivatives(loss, list(leaves.values()))
    return maps, {i: g for i, g in zip(leaves, gradients, strict=True) if g is not None}


def derivatives(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradient of each leaf, None for one on which the loss does not depend.

    Raises:
        CalibrationError: the forward code cannot be differentiated.
    """
    try:
        return torch.autograd.grad(loss, leaves, allow_unused=True)
    except RuntimeError as error:
        raise CalibrationError(
            "criteria from gradients and the weighting by the loss need a model that can be "
            f"differentiated: {str(error).splitlines()[0]}; choose another criterion, without "
            "loss_aware"
        ) from error


def _whole(program: Program, layer: Layer) -> Value:
    """The layer's input before its axes became rows, which all its readers share."""
    made = {value.id: op for op in program.ops for value in op.outputs()}
    x = layer.x
    while x.id in made and made[x.id].name in ("aten.view", "aten._unsafe_view"):
        source = made[x.id].inputs()[0]
        if layer.geometry.rank or source.shape[-1] != x.shape[-1]:
            break
        x = source
    return x


def _per_image(products: Tensor, rank: int, images: int) -> Tensor:
    """(images, C) the means over positions; of what does not go by images, over those of each."""
    if products.ndim == rank + 1 and rank:
        products = products[None]
    last = products.movedim(-1 - rank, -1)
    count = images if len(last) % images == 0 else len(last)
    return last.reshape(count, -1, last.shape[-1]).mean(1, dtype=torch.float64)


def loss_of(
    output: Any, targets: Tensor | None, generator: torch.Generator | None = None
) -> Tensor:
    """Cross-entropy summed over images.

    Args:
        targets: None for the model's own answers: the likeliest, or drawn with a generator.

    Raises:
        CalibrationError: there are no logits, or the targets do not fit them.
    """
    logits = find_logits(output)
    if logits is None:
        tensors = [x for x in tree_flatten(plain(output))[0] if isinstance(x, Tensor)]
        logits = tensors[0] if len(tensors) == 1 else None
        seen = f"{len(tensors)} tensors, none of them first or named `logits`"
    else:
        seen = str(tuple(logits.shape))
    if logits is None or logits.ndim != 2:
        raise CalibrationError(
            "criteria from gradients need a model that returns logits of shape (images, classes): "
            "a tensor, a tuple that begins with it, or an output with a field `logits`; it "
            f"returned {seen}"
        )
    labels = _answers(logits.detach(), generator) if targets is None else targets
    if not labels.is_floating_point():
        labels = labels.to(torch.int64)
    try:
        return functional.cross_entropy(logits, labels, reduction="sum")
    except (RuntimeError, ValueError, IndexError) as error:
        raise CalibrationError(
            f"targets of shape {tuple(labels.shape)} ({labels.dtype}) do not fit logits of shape "
            f"{tuple(logits.shape)}: {error}; give one class index for each image, or none"
        ) from error


def _answers(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits.argmax(1)
    likely = logits.float().softmax(1).cpu()
    if not bool(torch.isfinite(likely).all()):
        raise CalibrationError("the model's answers on the calibration data are not finite")
    return torch.multinomial(likely, 1, generator=generator)[:, 0].to(logits.device)


def _add_maps(
    found: Gradients, group: ChannelGroup, maps: Mapping[int, Tensor], images: int
) -> None:
    parts = [_by_unit(maps[s.op], s, group.channels) for s in group.sites if s.op in maps]
    if parts:
        part = torch.stack(parts).mean(0) / images
        found.taylor[group.name] = found.taylor.get(group.name, 0) + part


def _by_unit(per_image: Tensor, site: Site, channels: int) -> Tensor:
    """(units,) sums over images of what the channels of each unit have in the mean."""
    units = torch.tensor(site.units, device=per_image.device)
    member = units >= 0
    sums = per_image.new_zeros(len(per_image), channels)
    sums.index_add_(1, units[member], per_image[:, member])
    count = torch.bincount(units[member], minlength=channels).clamp_min(1)
    return (sums / count).abs().sum(0).cpu()


def _add_weights(
    found: Gradients,
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    gradients: Mapping[int, Tensor],
    batches: int,
) -> None:
    for member in group.members:
        weight = weights.get(member.parameter)
        if member.role != "produces" or weight is None or id(weight) not in gradients:
            continue
        products = (weight.detach() * gradients[id(weight)]).double().movedim(member.dim, 0)
        per_index = products.reshape(len(products), -1).sum(1).cpu()
        units = torch.tensor(member.units)
        owned = units >= 0
        sums = torch.zeros(group.channels, dtype=torch.float64)
        sums.index_add_(0, units[owned], per_index[owned])
        part = sums.square() / batches
        found.taylor_fo[group.name] = found.taylor_fo.get(group.name, 0) + part
