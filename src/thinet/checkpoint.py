"""Pruned models on disk: one safetensors file that holds the weights and the plan. No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from thinet.errors import CheckpointError, OptionError
from thinet.paths import named_modules
from thinet.plan import Plan
from thinet.surgery.apply import allocate, apply_plan, named_tensors
from thinet.trace.record import check_model
from thinet.trace.replica import copied
from thinet.whole_file import whole_file

KEY = "thinet_plan"
"""Name of the metadata entry that holds the plan as JSON."""

EXTRA = "_extra_state"
"""Last part of the names under which a `state_dict` holds what `get_extra_state` gives."""


def save(path: str | os.PathLike[str], model: nn.Module, plan: Plan) -> Path:
    """Write a cut model's weights and its plan to a safetensors file.

    The file appears complete or not at all. Tied tensors are written once.

    Args:
        path: where to; an existing file is replaced.
        model: the cut (and perhaps fine-tuned) model.
        plan: how it was cut from the dense model.

    Raises:
        CheckpointError: the plan is not this model's, or the file cannot be written.
    """
    target = _path(path)
    if not isinstance(plan, Plan):
        raise CheckpointError(
            f"save needs the plan that made the model, such as result.plan; got {plan!r}"
        )
    if not isinstance(model, nn.Module):
        advice = "give result.model" if hasattr(model, "model") else "give the cut model"
        raise CheckpointError(
            f"save needs the model, a module; got {type(model).__name__}: {advice}"
        )
    if hasattr(model, "_orig_mod"):
        raise CheckpointError("the model is compiled; save model._orig_mod")
    tensors = {name: _whole(tensor) for name, tensor in named_tensors(model)}
    for piece in plan.kept:
        shape = tensors[piece.parameter].shape if piece.parameter in tensors else ()
        size = shape[piece.dim] if 0 <= piece.dim < len(shape) else None
        if size != len(piece.indices):
            wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
            raise CheckpointError(
                f"the plan keeps {len(piece.indices)} entries of {piece.parameter} along dimension "
                f"{piece.dim}, the model has {size}; "
                f"save {'model.module' if wrapped else 'a model'} with the plan that made it"
            )
    metadata = {"format": "pt", KEY: _written(plan)}
    extra = [name for name in model.state_dict() if name.rpartition(".")[2] == EXTRA]
    if extra:
        raise CheckpointError(
            f"{', '.join(extra)} of the model is state beside its tensors, which the file does not "
            "hold; remove get_extra_state from these modules, or keep it in a buffer"
        )
    begun = False
    try:
        with whole_file(target) as unfinished:
            begun = True
            save_file(tensors, unfinished, metadata=metadata)
    except KeyError as error:  # of safetensors' table of types
        which = [name for name, tensor in tensors.items() if tensor.dtype == error.args[0]]
        raise CheckpointError(
            f"{', '.join(which[:3])} of the model is {error.args[0]}, which a safetensors file "
            "does not know; convert it first"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and not begun:
            raise CheckpointError(
                f"cannot write into the folder {target.parent} ({error.strerror}); make it, or "
                "choose another"
            ) from error
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target


def load(path: str | os.PathLike[str], dense_model: nn.Module) -> nn.Module:
    """Rebuild a cut model from its file and the dense model's class.

    Buffers that are not persistent are a forward's own notes: they may have other shapes than the
    dense model's, or be None in one of the two; the file's are taken.

    Args:
        path: a file that `save` wrote.
        dense_model: the model before any cut; its weights do not matter and it is left as it was.

    Returns:
        A new model with the shapes of the plan and the weights of the file, in the file's types.

    Raises:
        CheckpointError: the file cannot be read, is not of thinet, or is of another model.
    """
    if not isinstance(dense_model, nn.Module):
        raise CheckpointError(
            f"load needs the dense model that was cut, a module; got {type(dense_model).__name__}"
        )
    plan, tensors = read(path)
    try:
        check_model(dense_model)
    except OptionError as error:
        raise CheckpointError(str(error)) from error
    small = copied(dense_model)
    apply_plan(small, plan)
    allocate(small)
    notes = _notes(small, plan)
    noted = {name: tensors.pop(name) for name in notes.keys() & tensors.keys()}
    named = {name: t for name, t in named_tensors(small) if name not in notes}
    missing, extra = sorted(named.keys() - tensors.keys()), sorted(tensors.keys() - named.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit this {type(dense_model).__name__}: it lacks "
            f"{_some(missing)} and has {_some(extra)} too many; give the dense model it was made of"
        )
    wrong = [n for n in named if named[n].shape != tensors[n].shape]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{path} does not fit this {type(dense_model).__name__}: {name} is "
            f"{tuple(tensors[name].shape)} in the file and {tuple(named[name].shape)} in the cut "
            f"model ({len(wrong)} such tensors); give the dense model it was made of"
        )
    for name, tensor in named.items():
        if isinstance(tensor, nn.Parameter) and _kind(tensor) != _kind(tensors[name]):
            raise CheckpointError(
                f"{path} holds {name} as {tensors[name].dtype}, the model has it as "
                f"{tensor.dtype}; the file is damaged, or of another model"
            )
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.data = tensor.data.to(tensors[name].dtype)
            if 0 in tensor.stride():  # expanded: many entries in one place
                tensor.data = tensor.data.contiguous()
            tensor.copy_(tensors[name])
        device = next((tensor.device for tensor in named.values()), torch.device("cpu"))
        for name, tensor in noted.items():
            module, leaf = notes[name]
            module._buffers[leaf] = tensor.to(device)
    return small


def _notes(model: nn.Module, plan: Plan) -> dict[str, tuple[nn.Module, str]]:
    """Buffers that are not persistent and not cut, None among them: module and name of each."""
    cut = {piece.parameter for piece in plan.kept}
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in named_modules(model).items():
        for leaf in module._non_persistent_buffers_set:
            name = f"{path}.{leaf}" if path else leaf
            if name not in cut:
                found[name] = module, leaf
    return found


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that `save` wrote; errors as `load`."""
    return read(path)[0]


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a file is named by a text or a path; got {path!r}")
    if "\0" in os.fsdecode(path):
        raise CheckpointError(f"{path!r} is no name of a file")
    return Path(os.fsdecode(path))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradient, contiguous, and alone in its memory."""
    tensor = tensor.detach().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    """What a change of precision leaves as it is."""
    return tensor.is_floating_point(), tensor.is_complex()


def _written(plan: Plan) -> str:
    try:
        return json.dumps(plan.to_json())
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the plan's settings cannot be written as JSON ({error}); use plain numbers and texts"
        ) from error


def read(path: str | os.PathLike[str]) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan and the tensors of a file; errors as `load`."""
    path = _path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise CheckpointError(f"{path} holds no plan; it was not written by thinet.save")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); thinet reads nothing else"
        ) from error
    try:
        data: Any = json.loads(metadata[KEY])
    except ValueError as error:
        raise CheckpointError(f"the plan in {path} is not JSON ({error})") from error
    try:
        return Plan.from_json(data), tensors
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
