"""Weights files: read without running code, and matched with a model entry by entry."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from thinet.errors import CheckpointError, ModelError

WRAPPERS = ("state_dict", "model", "model_state")
"""Entries under which training programs keep the weights among other things."""

PREFIXES = ("module.", "_orig_mod.")
"""Of wrapped models."""

SHOWN = 4
"""How many entries of each kind of mismatch an error names."""


def load_weights(model: nn.Module, path: str | Path, what: str = "the model") -> None:
    """Put the weights of a file into a model; it is left as it was if they do not fit.

    Raises:
        CheckpointError: see `read_weights`.
        ModelError: names or shapes differ; some are listed with the shapes of both.
    """
    weights = read_weights(path)
    stored: dict[str, Any] = model.state_dict()  # modules may keep more than tensors
    own = {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}
    there = {_place(own[name]) for name in weights if name in own}
    missing = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name not in weights and _place(tensor) not in there  # of tied ones one is enough
    ]
    unexpected = [f"{n} {tuple(t.shape)}" for n, t in weights.items() if n not in own]
    mismatched = [
        f"{name} ({tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model)"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    other = [
        f"{name} ({_type(tensor)} in the file, {_type(own[name])} in the model)"
        for name, tensor in weights.items()
        if name in own and tensor.is_floating_point() != own[name].is_floating_point()
    ]
    # files of torch before 0.4 have no such counters, and nothing depends on them
    missing = [name for name in missing if not name.startswith(_counters(own))]
    if missing or unexpected or mismatched or other:
        raise ModelError(
            f"the weights in {path} are not those of {what}: "
            + "; ".join(
                _some(kind, entries)
                for kind, entries in (
                    ("missing in the file", missing),
                    ("not in the model", unexpected),
                    ("of another shape", mismatched),
                    ("of another kind of number", other),
                )
                if entries
            )
            + _advice(missing, unexpected, mismatched)
        )
    model.load_state_dict(weights, strict=False)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a .safetensors file or of a file of `torch.save`.

    Entries `state_dict`, `model` or `model_state` are looked into, and `module.` (of a model in
    parallel) and `_orig_mod.` (of a compiled one) are taken off names that all begin with it.

    Raises:
        CheckpointError: the file is missing, truncated, holds code, or holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; give the weights file in it")
        raise CheckpointError(f"there is no weights file {path}")
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(
            f"{path} holds {_kind(found)}; a dict of named tensors is needed (a state_dict)"
        )
    other = [name for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise CheckpointError(
            f"{path} holds other things than tensors: {', '.join(map(str, other[:SHOWN]))}; save "
            "model.state_dict() alone"
        )
    weights = {str(name): tensor for name, tensor in found.items()}
    wrapped: list[str] = list(PREFIXES)
    while prefix := next((p for p in wrapped if all(n.startswith(p) for n in weights)), None):
        wrapped.remove(prefix)  # the model's own names may begin so too
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated, copy or "
            "download it again"
        ) from error


def _torch_file(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is a pickle that would run code when read, or is no weights "
            f"file at all ({_reason(error)}). Save model.state_dict() alone, best with safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_reason(error)}); it may be truncated, copy or download it "
            "again"
        ) from error


def _reason(error: Exception) -> str:
    """The sentence that says what was found, without torch's pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "WeightsUnpickler" in line]
    said = (telling or lines or [""])[0][:160]
    return f"{type(error).__name__}: {said}" if len(said.split()) < 2 else said


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """The same for tensors that are one in memory; where there is none, for none but itself."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _counters(own: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    return tuple(name for name in own if name.endswith("num_batches_tracked"))


def _some(kind: str, entries: list[str]) -> str:
    rest = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:SHOWN])}{rest}"


def _advice(missing: list[str], unexpected: list[str], mismatched: list[str]) -> str:
    if mismatched and not missing and not unexpected:
        if len(mismatched) <= 2:
            return ". If only the classifier differs, give num_classes"
        return ". Weights of a cut model are loaded with thinet.load"
    return ""


def _kind(found: Any) -> str:
    return "nothing" if isinstance(found, Mapping) else f"a {type(found).__name__}"
