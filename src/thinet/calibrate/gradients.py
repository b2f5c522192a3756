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
from thinet.errors import CalibrationError
from thinet.logits import find_logits
from thinet.observe import evaluating, preserved_rng, running
from thinet.trace.program import plain
from thinet.trace.record import describe
from thinet.trace.replica import copied
from thinet.types import ChannelGroup, ExampleInputs, Site, call, cloned


@dataclass
class Gradients:
    """By group name, (units,) importances of the feature maps (2017) and of the weights (2019)."""

    taylor: dict[str, Tensor] = field(default_factory=dict)
    taylor_fo: dict[str, Tensor] = field(default_factory=dict)


def collect_gradients(
    model: nn.Module,
    batches: Sequence[tuple[ExampleInputs, Tensor | None]],
    groups: Sequence[ChannelGroup],
) -> Gradients:
    """Run the model forwards and backwards over the batches, on a copy.

    `taylor` is the mean over images of |mean over positions of gradient x activation| at the
    consumers' inputs (Molchanov et al. 2017, eq. 8); `taylor_fo` the mean over batches of
    (sum over a unit's filter weights of gradient x weight)^2 (Molchanov et al. 2019, eq. 8).

    Raises:
        CalibrationError: the model does not return logits, or gradients are not finite.
    """
    replica = copied(model).requires_grad_(True)
    named = dict(replica.named_parameters())
    found = Gradients()
    seen: dict[str, Tensor] = {}
    handles = []
    wanted = {site.module for group in groups for site in group.sites if site.parameter}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].requires_grad:
                args[0].retain_grad()
                seen[path] = args[0]

        return hook

    images = sum(images_in(inputs) for inputs, _ in batches)
    what = f"{type(model).__name__} does not run on a calibration batch"
    try:
        for path in wanted:
            module = replica.get_submodule(path)
            handles.append(module.register_forward_pre_hook(watch(path)))
        for inputs, targets in batches:
            seen.clear()
            replica.zero_grad(set_to_none=True)
            with torch.enable_grad(), preserved_rng(), evaluating(replica):
                with running(CalibrationError, f"{what} ({describe(inputs)})"):
                    output = call(replica, cloned(inputs))  # forward code may work in place
                loss_of(output, targets).backward()
            for group in groups:
                _add_maps(found, group, seen, images)
                _add_weights(found, group, named, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    for values in (*found.taylor.values(), *found.taylor_fo.values()):
        if not bool(torch.isfinite(values).all()):
            raise CalibrationError("the gradients on the calibration data are not finite")
    return found


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
    found: Gradients, group: ChannelGroup, seen: Mapping[str, Tensor], images: int
) -> None:
    parts = [
        _site_importance(site, group.channels, seen[site.module])
        for site in group.sites
        if site.module in seen and seen[site.module].grad is not None
    ]
    parts = [part for part in parts if part is not None]
    if parts:
        part = torch.stack(parts).mean(0) / images
        found.taylor[group.name] = found.taylor.get(group.name, 0) + part


def _site_importance(site: Site, channels: int, maps: Tensor) -> Tensor | None:
    assert maps.grad is not None
    products = (maps.detach() * maps.grad).double()
    place = 1 if maps.ndim > 2 and maps.shape[1] == len(site.units) else maps.ndim - 1
    if products.shape[place] != len(site.units):
        return None
    per_image = products.movedim(place, 1).flatten(2).mean(2) if maps.ndim > 2 else products
    units = torch.tensor(site.units, device=maps.device)
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
