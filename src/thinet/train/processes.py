"""The processes of a run: one, or several started by `accelerate launch`."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import distributed, nn

from thinet.errors import MissingExtraError, OptionError, TrainingError

PATIENCE = timedelta(hours=24)
"""How long the others wait for the main process, which may measure and cut alone for long."""


@dataclass(frozen=True)
class Processes:
    """Who this process is among those that train together, and the device it works on."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, the same bits in each; `values` itself in a single one."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter], extra: list[float]) -> list[float]:
        """Add up gradients in place, and a few numbers with them, in one exchange.

        A parameter without a gradient in any process keeps none (so that it is not decayed);
        one that has a gradient somewhere counts as zero elsewhere.

        Returns:
            The sums of `extra`.
        """
        if self.world == 1:
            return extra
        trained = [p for p in parameters if p.requires_grad]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in trained) else torch.float32
        here = [float(p.grad is not None) for p in trained]
        numbers = torch.tensor(extra + here, dtype=dtype, device=self.device)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        vector = torch.cat([numbers, *(g.flatten().to(dtype) for g in flat)])
        distributed.all_reduce(vector)
        totals = vector[: len(numbers)].tolist()
        offset = len(numbers)
        for parameter, anywhere in zip(trained, totals[len(extra) :], strict=True):
            part = vector[offset : offset + parameter.numel()]
            offset += parameter.numel()
            if anywhere:
                parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return totals[: len(extra)]

    def average_buffers(self, model: nn.Module) -> None:
        """Running statistics become the mean over the processes; counters are the first's."""
        if self.world == 1:
            return
        buffers = list(model.buffers())
        averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
        counters = [buffer for buffer in buffers if not buffer.is_floating_point()]
        if averaged:
            vector = torch.cat([buffer.flatten().double() for buffer in averaged])
            distributed.all_reduce(vector)
            _spread(vector / self.world, averaged)
        if counters:
            vector = torch.cat([buffer.flatten().long() for buffer in counters])
            distributed.broadcast(vector, 0)
            _spread(vector, counters)

    def same_model(self, model: nn.Module) -> None:
        """Every process gets the first one's weights and buffers."""
        if self.world == 1:
            return
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                distributed.broadcast(tensor.detach(), 0)

    def told(self, number: int) -> int:
        """The main process's number, in every process."""
        if self.world == 1:
            return number
        shared = torch.tensor(number)
        distributed.broadcast(shared, 0, group=_patient())
        return int(shared)

    def agree(self, text: str) -> bool:
        """Whether all processes have the same text; each waits until all have asked."""
        if self.world == 1:
            return True
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        differing = torch.tensor(int(self.told(number) != number))
        distributed.all_reduce(differing, group=_patient())
        return int(differing) == 0

    def main_first(self, work: Callable[[], None]) -> None:
        """Run `work` in the main process; the others wait until it is done.

        Raises:
            TrainingError: in the others, if `work` raised anything in the main process.
        """
        if self.main:
            failed = True
            try:
                work()
                failed = False
            finally:  # whatever it was: the others would wait for a day
                self.told(int(failed))
        elif self.told(0):
            raise TrainingError("the main process failed; its own message says why")
        self.wait()

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.world > 1:
            distributed.barrier(group=_patient())


@cache
def _patient() -> Any:
    """Connections for waiting, beside those for numbers; on the CPU, so that no GPU is held up."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


@cache
def _leave_in_order() -> None:
    """At the end of the program, close the connections before their threads are torn down."""
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def _spread(vector: torch.Tensor, buffers: list[torch.Tensor]) -> None:
    parts = vector.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def current(device: str | torch.device | None = None) -> Processes:
    """The processes that accelerate started, or this one alone.

    Args:
        device: None takes accelerate's choice: a GPU if there is one, otherwise the CPU.

    Raises:
        OptionError: the device does not exist, or one was chosen under `accelerate launch`.
    """
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"training runs on accelerate, which is missing ({error}): pip install accelerate"
        ) from error
    # imported once processes are connected, it keeps hold of the connection for good
    import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]

    wanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=wanted or not torch.accelerator.is_available())
    if state.num_processes > 1:
        _leave_in_order()
    own = torch.device(str(state.device))
    rank, world = int(state.process_index), int(state.num_processes)
    if device is None:
        return Processes(rank, world, own)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    if world == 1:
        return Processes(rank, world, chosen)
    if chosen.type != own.type:
        raise OptionError(
            f"device {device!r} was asked for, but accelerate started {world} processes on "
            f"{own.type}; leave device out"
        )
    return Processes(rank, world, own)


def is_on(model: nn.Module, device: torch.device) -> bool:
    """Whether all of a model lies there; a device without a number is any of its kind."""
    tensors = [*model.parameters(), *model.buffers()]
    return all(
        tensor.device.type == device.type and device.index in (None, tensor.device.index)
        for tensor in tensors
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
