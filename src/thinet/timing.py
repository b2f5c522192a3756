"""Measured milliseconds of a forward pass, several models side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from thinet.errors import ModelError, OptionError
from thinet.observe import evaluating, running
from thinet.trace.record import check_model, describe
from thinet.types import ExampleInputs, call, cloned

SCATTER = 1.5
"""Slow runs (`high_ms`) for each fast one (`low_ms`): above it, timings are no quiet machine's."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass, over several timed runs.

    Attributes:
        best_ms: the fastest run. What else the machine does only adds, so this is what repeats,
            and what networks are compared by.
        median_ms: the middle run: what to expect with what else the machine does.
        low_ms: the run that only a tenth of the others beat.
        high_ms: the run that only a tenth of the others exceed.
        runs: how many were timed.
        threads: that torch used on the CPU.
        device: where the model was.
    """

    best_ms: float
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    threads: int
    device: str

    @property
    def scattered(self) -> bool:
        """Whether the runs differ so much that other work must have disturbed them."""
        return self.high_ms > SCATTER * self.low_ms


def latency(model: nn.Module, inputs: ExampleInputs, *, seconds: float = 1.0) -> Latency:
    """Time one model; see `latencies`."""
    return latencies({"model": model}, inputs, seconds=seconds)["model"]


def latencies(
    models: Mapping[str, nn.Module], inputs: ExampleInputs, *, seconds: float = 1.0
) -> dict[str, Latency]:
    """Time models on the same inputs, one run of each in turn, so that a busy machine is busy for
    all alike.

    Args:
        models: on the device of the inputs; timed in evaluation mode, their own mode comes back.
        inputs: what each is called with.
        seconds: of timed runs for each model; at least 10 runs, after 3 that are not counted.

    Raises:
        OptionError: `seconds` is not above zero, or a model is no module.
        ModelError: a model does not run on the inputs.
    """
    if not isinstance(models, Mapping):
        raise OptionError(f"models are a dict of names and modules; got {type(models).__name__}")
    for model in models.values():
        check_model(model)
    if not seconds > 0:
        raise OptionError(f"seconds of timed runs must be above zero, got {seconds}")
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():  # what a forward keeps for later has to bear gradients then
        for name, model in models.items():
            for _ in range(3):
                _tried(name, model, inputs)
        end = time.perf_counter() + seconds * len(models)
        while time.perf_counter() < end or any(len(runs) < 10 for runs in times.values()):
            for name, model in models.items():
                times[name].append(_timed(model, inputs))
    return {name: _summary(runs, _device(models[name])) for name, runs in times.items()}


def _tried(name: str, model: nn.Module, inputs: ExampleInputs) -> None:
    what = f"{type(model).__name__} does not run on the inputs ({describe(inputs)})"
    with running(ModelError, f"{name}: {what}"):
        _timed(model, inputs)


def _timed(model: nn.Module, inputs: ExampleInputs) -> float:
    inputs = cloned(inputs)  # forward code may work in place
    with evaluating(model):
        _wait(model)
        start = time.perf_counter()
        call(model, inputs)
        _wait(model)
        return 1000 * (time.perf_counter() - start)


def _wait(model: nn.Module) -> None:
    device = _device(model)
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _summary(runs: list[float], device: torch.device) -> Latency:
    ordered = sorted(runs)
    tenth = len(ordered) // 10
    return Latency(
        best_ms=ordered[0],
        median_ms=median(ordered),
        low_ms=ordered[tenth],
        high_ms=ordered[-1 - tenth],
        runs=len(ordered),
        threads=torch.get_num_threads(),
        device=str(device),
    )
