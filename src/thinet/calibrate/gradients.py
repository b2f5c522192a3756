"""First-order loss changes: one backward pass over the calibration data.

Without labels the model's own answers serve as labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten

from thinet.calibrate.batches import images_in
from thinet.calibrate.layers import find_layers
from thinet.calibrate.watched import Given, Key, Layout, image_layouts, product_keys, run_watched
from thinet.errors import CalibrationError, ThinetError
from thinet.logits import find_logits
from thinet.trace.program import Program, plain
from thinet.trace.replica import copied
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
    """Run the model forwards and backwards over the batches, on a copy.

    `taylor` is the mean over images of |mean over positions of gradient x activation| at the
    consumers' inputs (Molchanov et al. 2017, eq. 8); `taylor_fo` the mean over batches of
    (sum over a unit's filter weights of gradient x weight)^2 (Molchanov et al. 2019, eq. 8).

    Args:
        program: the traced program, to whose operations the groups' sites refer.

    Raises:
        CalibrationError: the model does not return logits, cannot be differentiated, or gradients
            are not finite.
    """
    replica = copied(model).requires_grad_(True)
    named = dict(replica.named_parameters())
    layers, keys = find_layers(program), product_keys(program, replica)
    products = {
        keys[site.op]: site.op
        for group in groups
        for site in group.sites
        if site.op in layers and site.op in keys
    }
    layouts = image_layouts(replica, batches[0][0], products)
    found = Gradients()
    images = sum(images_in(inputs) for inputs, _ in batches)
    for inputs, targets in batches:
        replica.zero_grad(set_to_none=True)
        with torch.enable_grad():
            maps = Maps(images_in(inputs), layouts)
            output = run_watched(replica, inputs, layouts, maps.watch)
            with differentiating():
                loss_of(output, targets).backward()
        at = {products[key]: per_image for key, per_image in maps.found.items()}
        for group in groups:
            _add_maps(found, group, at, images)
            _add_weights(found, group, named, len(batches))
    for values in (*found.taylor.values(), *found.taylor_fo.values()):
        if not bool(torch.isfinite(values).all()):
            raise CalibrationError("the gradients on the calibration data are not finite")
    return found


class Maps:
    """For each product (images, C): gradient x activation of what it is given, once sent back.

    Its hooks hold nothing of the graph that they hang on, which would outlive its batch.
    """

    def __init__(self, images: int, layouts: Mapping[Key, Layout]) -> None:
        self.found: dict[Key, Tensor] = {}
        self._images, self._layouts = images, layouts

    def watch(self, key: Key, given: Given) -> None:
        if given.x.requires_grad:
            value = given.x.detach() if given.saved else given.x.detach().clone()
            given.x.register_hook(partial(self._keep, key, value, given.channels))

    def _keep(self, key: Key, value: Tensor, channels: int, gradient: Tensor) -> None:
        layout = self._layouts[key]
        self.found[key] = layout.per_image(value * gradient, channels, self._images)


@contextmanager
def differentiating() -> Iterator[None]:
    """What autograd cannot do becomes a CalibrationError."""
    try:
        yield
    except (torch.OutOfMemoryError, ThinetError):
        raise
    except RuntimeError as error:
        raise CalibrationError(
            "criteria from gradients and the weighting by the loss need a model that can be "
            f"differentiated: {str(error).splitlines()[0]}; choose another criterion, without "
            "loss_aware"
        ) from error


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
    found: Gradients, group: ChannelGroup, named: Mapping[str, nn.Parameter], batches: int
) -> None:
    for member in group.members:
        weight = named.get(member.parameter)
        if member.role != "produces" or weight is None or weight.grad is None:
            continue
        products = (weight.detach() * weight.grad).double().movedim(member.dim, 0)
        per_index = products.reshape(len(products), -1).sum(1).cpu()
        units = torch.tensor(member.units)
        owned = units >= 0
        sums = torch.zeros(group.channels, dtype=torch.float64)
        sums.index_add_(0, units[owned], per_index[owned])
        part = sums.square() / batches
        found.taylor_fo[group.name] = found.taylor_fo.get(group.name, 0) + part
