"""TensorBoard logs of a training run, only where they are asked for."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from thinet.errors import MissingExtraError


class Logs:
    """Writes each epoch's figures to a folder; without a folder it writes nothing.

    Args:
        folder: None, or where TensorBoard looks.
        step: first step of this run; what a killed run logged beyond it is hidden.
    """

    def __init__(self, folder: str | None, step: int) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "log_dir was given, but tensorboard is not installed: pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(folder, purge_step=step + 1)

    def add(self, record: Any, step: int) -> None:
        """Log an `EpochRecord` at a step."""
        if self._writer is None:
            return
        figures = {"lr": record.lr, "train/loss": record.loss, "train/top1": record.top1}
        if record.validation is not None:
            figures["validation/loss"] = record.validation.loss
            figures["validation/top1"] = record.validation.top1
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
