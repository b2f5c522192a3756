"""From what the user named to models, pictures and example inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from thinet.checkpoint import KEY, load, load_plan
from thinet.cli import console
from thinet.cli.options import triple
from thinet.errors import ModelError, OptionError
from thinet.images import Preprocess
from thinet.models import resolve
from thinet.plan import Plan

NUMBERS = ("mean", "std")


@dataclass(frozen=True)
class Named:
    """A model as the user named it; `plan` says how it was cut, None if it is dense."""

    name: str
    model: nn.Module
    plan: Plan | None


def network(
    spec: str, weights: Path | None, *, classes: int | None = None, device: str | None = None
) -> Named:
    """The model, with its weights, cut as its file says, on the device, in evaluation mode.

    Raises:
        ModelError, CheckpointError, OptionError: see `thinet.models.resolve` and `thinet.load`.
    """
    where = chosen_device(device)
    try:
        if weights is not None and holds_plan(weights):
            model = load(weights, resolve(spec, num_classes=classes))
            return Named(spec, model.to(where).eval(), load_plan(weights))
        return Named(spec, resolve(spec, weights=weights, num_classes=classes, device=where), None)
    except SystemExit as error:
        raise ModelError(
            f"{spec} ended the program while it was made: sys.exit({error.code!r}); let it return "
            "the network or raise an error"
        ) from error


def trained(
    spec: str, weights: Path | None, *, classes: int | None = None, device: str | None = None
) -> Named:
    """`network`, for commands whose result hangs on the weights: says it where none are given."""
    named = network(spec, weights, classes=classes, device=device)
    if weights is None:
        console.warn(_unweighted(spec))
    return named


def _unweighted(spec: str) -> str:
    if spec.startswith(("torchvision:", "timm:")):
        return (
            f"no --weights: those of {spec} are random numbers; --weights FILE gives trained ones"
        )
    return (
        f"no --weights: those that {spec} makes are used, random ones if it loads none; "
        "--weights FILE gives others"
    )


def weights_as(weights: Path | None) -> str:
    """For a report: where the weights are from."""
    return "as the model is made" if weights is None else str(weights)


def holds_plan(path: Path) -> bool:
    """Whether a file was written by `thinet.save`; False for one that cannot be read, too."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def chosen_device(device: str | None) -> torch.device:
    """The named device; without a name the first GPU, or the CPU where there is none.

    Raises:
        OptionError: torch knows no such device, or cannot use it here.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(f"--device {name!r} cannot be used: {reason}") from error


def pictures(model: nn.Module, size: int | None, mean: str | None, std: str | None) -> Preprocess:
    """How images are prepared: as the user says, else as the model says, else as for ImageNet.

    A model says it as timm's do: `default_cfg` with `input_size` (3, height, width), `mean`, `std`.

    Raises:
        OptionError: a number is out of its range.
    """
    own, usual = _own(model), Preprocess()
    try:
        _, height, side = map(int, own.get("input_size", (3, usual.size, usual.size)))
        says = {name: tuple(map(float, own.get(name, getattr(usual, name)))) for name in NUMBERS}
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"the model's default_cfg says {own!r}; `input_size` is (3, height, width), `mean` and "
            f"`std` are three numbers each ({error})"
        ) from error
    if size is None and height != side:
        raise OptionError(
            f"the model's default_cfg asks for images of {height} x {side}; images are made "
            "square here: say how large with --size"
        )
    return Preprocess(
        size=side if size is None else size,
        mean=triple("mean", mean) or says["mean"],  # pyright: ignore[reportArgumentType]
        std=triple("std", std) or says["std"],  # pyright: ignore[reportArgumentType]
    )


def prepared_as(
    model: nn.Module, prepared: Preprocess, size: int | None, mean: str | None, std: str | None
) -> str:
    """For a report: what `pictures` made of these arguments, and where each number is from."""

    def source(option: str, given: object, key: str) -> str:
        if given is not None:
            return f"--{option}"
        return "the model's default_cfg" if key in _own(model) else "ImageNet's"

    def numbers(values: tuple[float, float, float]) -> str:
        return ",".join(f"{value:g}" for value in values)

    return (
        f"{prepared.size} x {prepared.size} ({source('size', size, 'input_size')}), "
        f"mean {numbers(prepared.mean)} ({source('mean', mean, 'mean')}), "
        f"std {numbers(prepared.std)} ({source('std', std, 'std')})"
    )


def _own(model: nn.Module) -> dict[str, Any]:
    own = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return own if isinstance(own, dict) else {}


def example(model: nn.Module, size: int, *, batch: int = 1) -> torch.Tensor:
    """A batch (batch, 3, size, size) of noise, the same each time, on the model's device."""
    try:
        noise = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:
        raise OptionError(
            f"images of {size} x {size} do not fit into memory, {batch} at a time: {error}"
        ) from error
    first = next(model.parameters(), noise)
    return noise.to(first.device)
