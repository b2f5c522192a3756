"""What is minimised: labels, the dense network's outputs, auxiliary classifiers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from thinet.errors import DataError, ModelError
from thinet.observe import evaluating
from thinet.trace.replica import copied
from thinet.train.config import FinetuneConfig
from thinet.train.distill import distillation
from thinet.train.outputs import auxiliary_of, check_targets, logits_of, output_of
from thinet.train.processes import is_on

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loss:
    """(1 - w) cross-entropy + w distillation, plus the auxiliary classifiers' cross-entropies."""

    def __init__(
        self, config: FinetuneConfig, teacher: nn.Module | None, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self.teacher = teacher
        if teacher is not None and not is_on(teacher, device):
            self.teacher = copied(teacher).to(device)

    def __call__(
        self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, where: str
    ) -> tuple[torch.Tensor, float]:
        """Mean loss of a batch with its graph, and how many images were right."""
        images = images.to(self.device, non_blocking=True)
        output = self._run(model, images, where)
        logits = logits_of(output)
        check_targets(labels, logits.shape[1], len(logits), where)
        labels = labels.to(self.device, torch.int64, non_blocking=True)
        loss = self._labels(logits, labels)
        if self.teacher is not None:
            with evaluating(self.teacher), torch.no_grad(), self._precision():
                taught = logits_of(output_of(self.teacher, images, f"{where}, the teacher"))
            weight = self.config.distill_weight
            softened = distillation(logits, taught, self.config.temperature)
            loss = (1 - weight) * loss + weight * softened
        for weight, auxiliary in auxiliary_of(output, logits):
            loss = loss + weight * self._labels(auxiliary, labels)
        return loss, float((logits.detach().argmax(dim=1) == labels).sum())

    def _run(self, model: nn.Module, images: torch.Tensor, where: str) -> Any:
        try:
            with self._precision():
                return output_of(model, images, where)
        except ModelError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DataError(
                f"{where} has a single image, which BatchNorm cannot be trained on; leave the last "
                "batch out (drop_last=True) or change the batch size"
            ) from error

    def _labels(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smoothing = self.config.label_smoothing
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return functional.cross_entropy(logits, labels, label_smoothing=smoothing)

    def _precision(self) -> AbstractContextManager[object]:
        dtype = DTYPES.get(self.config.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
