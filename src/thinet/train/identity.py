"""What a training run was started with, as plain data, to tell whether another is the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from thinet.surgery.apply import named_tensors
from thinet.train.config import FinetuneConfig
from thinet.train.state import pack_optimizer


def identity_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    teacher: nn.Module | None,
    data: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
    config: FinetuneConfig,
    epochs: int,
    processes: int,
) -> dict[str, Any]:
    """Everything that decides a run's result, in a form that JSON gives back unchanged.

    `data` and `validation` are what `Feed.describe` says; `optimizer` the one that was given, None
    for fresh SGD. Its learning rates are the schedule's.
    """
    options = asdict(config)
    del options["log_dir"]
    state, plain = pack_optimizer(optimizer) if optimizer is not None else ({}, {"groups": []})
    set_anew = {"params", "lr", "initial_lr"}
    return _as_json(
        {
            "option": options,
            "epochs": epochs,
            "processes": processes,
            "data": data,
            "validation data": validation,
            "model": fingerprint(model),
            "teacher": fingerprint(teacher) if teacher is not None else None,
            "optimizer": type(optimizer).__name__ if optimizer is not None else None,
            "optimizer state": fingerprint_of(state) if optimizer is not None else None,
            "optimizer group": {
                str(number): {k: v for k, v in group.items() if k not in set_anew}
                for number, group in enumerate(plain["groups"])
            },
        }
    )


def fingerprint(model: nn.Module) -> str:
    """A digest of names, shapes, types, values and `requires_grad` of all tensors of a model."""
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    stored = model.state_dict()
    beside = {name: t for name, t in named_tensors(model) if name not in stored}
    return fingerprint_of({**stored, **beside}, trained)


def fingerprint_of(tensors: Mapping[str, Any], marked: set[str] | None = None) -> str:
    """A digest of named tensors; values that are no tensors count as their text."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        tensor = value if isinstance(value, torch.Tensor) else None
        facts = (tuple(tensor.shape), str(tensor.dtype)) if tensor is not None else repr(value)
        digest.update(repr((name, facts, name in (marked or ()))).encode())
        if tensor is not None and tensor.numel():
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def differences(saved: Any, given: Any, where: str = "") -> list[str]:
    """What differs between two pieces of plain data, one line each."""
    if isinstance(saved, dict) and isinstance(given, dict):
        keys = [*saved, *(key for key in given if key not in saved)]
        return [
            line
            for key in keys
            for line in differences(saved.get(key), given.get(key), f"{where}{key} ")
        ]
    if saved == given:
        return []
    return [f"{where.strip()} was {_shown(saved)} and is now {_shown(given)}"]


def _shown(value: Any) -> str:
    """Of a digest the beginning, which tells two apart."""
    digest = isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2
    return repr(value[:12] if digest else value)


def _as_json(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, (tuple, list)) else value
