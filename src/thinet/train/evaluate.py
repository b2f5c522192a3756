"""Accuracy and loss on labelled data, in one process or many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from thinet.errors import DataError, ModelError
from thinet.observe import evaluating
from thinet.trace.record import check_model
from thinet.trace.replica import copied
from thinet.train.feed import Feed
from thinet.train.outputs import check_targets, logits_of, output_of
from thinet.train.processes import Processes, current, is_on
from thinet.types import Progress


@dataclass(frozen=True)
class Evaluation:
    """What a model scores.

    Attributes:
        top1: fraction (0 .. 1) of the images whose label has the largest logit.
        top5: fraction whose label is among the five largest (all of them in fewer classes).
        loss: mean cross-entropy, in nats.
        images: number of images, each counted once however many processes there are.
    """

    top1: float
    top5: float
    loss: float
    images: int


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Top-1, top-5 and loss of a model, run in evaluation mode without gradients.

    The model's modes, weights and device are afterwards as they were. Under `accelerate launch` the
    processes share the batches and all get the same answer.

    Args:
        model: gives logits (images, classes): a tensor, a tuple that begins with it, or an output
            with a field `logits`.
        data: a `thinet.data` loader, a `DataLoader` or an iterable of (images, labels); labels are
            whole numbers in 0 .. classes - 1, of shape (images,).
        device: where to run; None takes a GPU if there is one, otherwise the CPU.

    Raises:
        DataError: no images, batches that are not pairs, or labels out of range.
        ModelError: the model does not run on the images, gives something else than logits, or
            logits that are not finite.
        OptionError: it is no module.
    """
    check_model(model)
    processes = current(device)
    feed = Feed(data, seed=0, rank=processes.rank, world=processes.world)
    placed = model if is_on(model, processes.device) else copied(model)
    placed = placed.to(processes.device)
    return evaluate_feed(placed, feed, processes, progress)


def evaluate_feed(
    model: nn.Module, feed: Feed, processes: Processes, progress: Progress | None = None
) -> Evaluation:
    """`evaluate` on prepared data, with a model that is on the device already."""
    totals = torch.zeros(4, dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for number, images, labels in feed.epoch(0):
            if len(images):
                images = images.to(processes.device, non_blocking=True)
                where = f"batch {number}"
                totals += _scores(output_of(model, images, where), labels, where)
            if progress is not None and processes.main:
                progress("evaluating", number + 1, feed.batches)
    totals = processes.summed(totals.to(_sum_device(processes))).tolist()
    top1, top5, loss, count = totals
    if count == 0:
        raise DataError("there is no image to evaluate on")
    return Evaluation(top1 / count, top5 / count, loss / count, int(count))


def _scores(output: Any, labels: torch.Tensor, where: str) -> torch.Tensor:
    """Right at the first guess, among the first five, summed loss, and number of images."""
    logits = logits_of(output).float()
    check_targets(labels, logits.shape[1], len(logits), where)
    if not bool(logits.isfinite().all()):
        raise ModelError(
            f"{where}: the model gives logits that are not finite; check its weights and the "
            "data's mean and std"
        )
    labels = labels.to(logits.device, torch.int64)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    parts = [best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels))]
    return torch.stack([part.double().cpu() for part in parts])


def _sum_device(processes: Processes) -> torch.device:
    """Where sums over processes are exchanged: NCCL works on GPU memory only."""
    return processes.device if processes.world > 1 else torch.device("cpu")
