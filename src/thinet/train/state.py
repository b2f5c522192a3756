"""The state of a training run on disk: one safetensors file, replaced whole or not at all.

Tensors (weights, momentum, averages) are the file's tensors; everything else (how far the run is,
what it was given, its history) is JSON in the file's metadata. There is no pickle, and there is no
moment at which the folder holds no complete state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from thinet.errors import CheckpointError
from thinet.paths import named_modules
from thinet.surgery.apply import named_tensors
from thinet.whole_file import whole_file

NAME = "training.safetensors"
FORMAT = "1"


def write(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Replace the state in `folder`; the old one stays until the new one is on the disk.

    Raises:
        CheckpointError: the file cannot be written; the old one is as it was.
    """
    target = folder / NAME
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {"thinet_training": FORMAT, "facts": json.dumps(facts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as unfinished:
            save_file(plain, unfinished, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the training state cannot be written to {target}: {error}"
        ) from error


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The tensors and facts of the state in `folder`, None if there is none.

    Raises:
        CheckpointError: the file is not one that `write` wrote.
    """
    path = folder / NAME
    if folder.is_file():
        raise CheckpointError(f"checkpoint {folder} is a file; give a folder")
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("thinet_training") != FORMAT:
            raise CheckpointError(f"{path} is not a training state of this version of thinet")
        return tensors, json.loads(metadata["facts"])
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(
            f"the training state {path} cannot be read ({error}); delete it, or start over with "
            "resume=False"
        ) from error


def forget(folder: Path) -> None:
    """Remove the state in a folder, and the folder if nothing else is in it."""
    (folder / NAME).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def pack_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model by name, those that its `state_dict` leaves out too.

    Raises:
        CheckpointError: a module keeps more than tensors.
    """
    for path, module in named_modules(model).items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or 'the model'} ({type(module).__name__}) keeps a state that is no tensor "
                "(get_extra_state), which a training state does not hold; train without a "
                "checkpoint"
            )
    return dict(named_tensors(model))


@torch.no_grad()
def unpack_model(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a model of the same tensors those of `pack_model`.

    Raises:
        CheckpointError: they are of another model.
    """
    own = dict(named_tensors(model))
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CheckpointError(
            "the training state holds other tensors than the model has; start over with "
            "resume=False"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Any]:
    """An optimizer's state as named tensors and plain data."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = value
    groups = [{k: v for k, v in group.items() if _plain(v)} for group in state["param_groups"]]
    return tensors, {"state": values, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> None:
    """Give an optimizer of the same kind and parameters the state of `pack_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for index, entries in plain["state"].items():
        state.setdefault(int(index), {}).update(entries)
    for name, tensor in tensors.items():
        index, _, entry = name.partition(".")
        state.setdefault(int(index), {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, plain["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) and k != "params" else v
                      for k, v in saved.items()})  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))
