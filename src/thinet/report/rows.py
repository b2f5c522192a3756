"""From what the library's verbs return to the rows of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from thinet.outcome import PruneReport
from thinet.report.data import Group
from thinet.report.text import counted
from thinet.surgery.apply import named_tensors
from thinet.timing import Latency
from thinet.trace.groups import layer_name
from thinet.train.config import FinetuneConfig
from thinet.types import ChannelGroup, Counts


def found_groups(
    model: nn.Module, groups: Sequence[ChannelGroup], counts: Counts
) -> tuple[Group, ...]:
    """A row a group, with the parameters and multiply-adds that its channels take part in."""
    tensors = dict(named_tensors(model))
    matrices: dict[str, int] = {}
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            layer = layer_name(name)
            matrices[layer] = matrices.get(layer, 0) + tensor.numel()
    return tuple(_row(group, tensors, matrices, counts) for group in groups)


def _row(
    group: ChannelGroup,
    tensors: Mapping[str, Tensor],
    matrices: Mapping[str, int],
    counts: Counts,
) -> Group:
    held: dict[str, dict[int, int]] = {}
    for member in group.members:
        inside = sum(unit >= 0 for unit in member.units)
        held.setdefault(member.parameter, {})[member.dim] = inside
    params, touched = 0, dict[str, int]()
    for name, dims in held.items():
        tensor = tensors[name]
        rest = prod(size - dims.get(dim, 0) for dim, size in enumerate(tensor.shape))
        if isinstance(tensor, nn.Parameter):
            params += tensor.numel() - rest
        if tensor.ndim > 1:
            layer = layer_name(name)
            touched[layer] = touched.get(layer, 0) + tensor.numel() - rest
    macs = {
        layer: counts.by_module[layer].macs * elements / matrices[layer]
        for layer, elements in touched.items()
        if layer in counts.by_module
    }
    for site in group.sites:  # products of two activations have no weights to count by
        if site.parameter is None and site.module in counts.by_module:
            share = sum(unit >= 0 for unit in site.units) / len(site.units)
            macs.setdefault(site.module, counts.by_module[site.module].macs * share)
    return Group(
        group.name,
        group.channels,
        locked=group.locked,
        producers=group.producers,
        consumers=group.consumers,
        macs=round(sum(macs.values())),
        params=params,
    )


def pruned_groups(report: PruneReport) -> tuple[Group, ...]:
    """A row for each group that `prune` looked at, cut or not."""
    return tuple(
        Group(
            group.name,
            group.channels,
            kept=group.kept,
            locked=group.locked,
            producers=group.producers,
            consumers=group.consumers,
        )
        for group in report.groups
    )


def pruned_notes(report: PruneReport) -> tuple[str, ...]:
    """What a user must know about how it went: the budget first."""
    reached = f"{report.budget}: asked {report.target:.4g}, reached {report.reached:.4g}"
    skipped = [f"{layer} was not refitted: {why}" for layer, why in report.not_refitted.items()]
    alone = [
        f"{pair} were not refitted together: {why}" for pair, why in report.not_refined.items()
    ]
    if len(alone) > SHOWN:
        alone[SHOWN:] = [f"{counted(len(alone) - SHOWN, 'more pair')} were not, for such reasons"]
    return (reached, *skipped, *alone, *report.notes)


SHOWN = 3
"""Pairs named that were not refitted together; all are in `PruneReport.not_refined`."""


def pruned_facts(report: PruneReport) -> tuple[tuple[str, str], ...]:
    """How it was made, name and value."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    repair = report.repair
    if report.refined:
        repair += f", {len(report.refined)} pairs of layers refitted together"
    return (("criterion", report.criterion), ("repair", repair), ("seconds", seconds))


def timed_where(inputs: Tensor) -> str:
    """What decides a timing besides the network."""
    threads = counted(torch.get_num_threads(), "thread")
    return f"batch {len(inputs)}, {threads}, on {inputs.device}"


def timing_notes(timed: Mapping[str, Latency]) -> tuple[str, ...]:
    """How far the runs of each network lie apart, and a warning where that is far."""
    spreads = [
        f"{name}: {t.best_ms:.3g} ms at best, median {t.median_ms:.3g}, {counted(t.runs, 'run')}, "
        f"most of them {t.low_ms:.3g} to {t.high_ms:.3g} ms"
        for name, t in timed.items()
    ]
    if any(t.scattered for t in timed.values()):
        spreads.append(
            "these timings scatter: the machine does other work; the fastest run of each is shown, "
            "measure again when it is quiet"
        )
    return tuple(spreads)


def sgd_facts(config: FinetuneConfig, batch: int) -> tuple[tuple[str, str], ...]:
    """How it was trained, name and value; the learning rate and its schedule are said elsewhere."""
    several = f", {config.accumulate} of them a step" if config.accumulate > 1 else ""
    mixed = "not mixed" if config.mixed_precision == "no" else f"mixed, {config.mixed_precision}"
    return (
        ("momentum, weight decay", f"{config.momentum:g}, {config.weight_decay:g}"),
        ("batch", f"{batch}{several}"),
        ("precision", mixed),
        *_more_of(config),
    )


def _more_of(config: FinetuneConfig) -> list[tuple[str, str]]:
    """What is said only where it was asked for."""
    taps = config.group_sparsity
    named = {
        "label smoothing": config.label_smoothing or None,
        "average of the weights, decay": config.ema_decay,
        "largest norm of the gradient": config.clip_norm,
        "group sparsity": taps and taps.strength,
        "taps that stay": taps and taps.keep,
        "taps not pulled at from": taps and taps.truncate,
    }
    found = [(name, f"{value:g}") for name, value in named.items() if value is not None]
    if taps is not None and taps.layers is not None:
        found.append(("layers that lose taps", ", ".join(taps.layers)))
    return found
