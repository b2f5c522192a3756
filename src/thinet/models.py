"""Models by name: torchvision's, timm's, or a function of the user's own file, with weights."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from thinet.errors import MissingExtraError, ModelError, OptionError
from thinet.vision import torchvision
from thinet.weights import load_weights

log = logging.getLogger("thinet")

FORMS = "torchvision:NAME, timm:NAME or path/to/file.py:FUNCTION"


def resolve(
    spec: str,
    *,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model that a short text names, in evaluation mode. Nothing is downloaded.

    Args:
        spec: `torchvision:resnet50`, `timm:NAME`, or `path/file.py:function`, a function that is
            called without arguments, or with `num_classes` if it takes that and it is given.
        weights: None (random weights), a .safetensors file, or a file of `torch.save` that holds
            tensors only.
        num_classes: size of the classifier; None leaves it to the model.
        device: where the model is put.

    Raises:
        ModelError: no such model (close names are given), it cannot be built, or the weights are
            not this model's.
        CheckpointError: the weights file cannot be read, or is refused because it holds code.
        MissingExtraError: torchvision or timm is needed and not installed.
        OptionError: the device cannot be used.
    """
    kind, _, name = spec.partition(":")
    if kind == "torchvision" and name:
        model = _of_torchvision(name, num_classes)
    elif kind == "timm" and name:
        model = _of_timm(name, num_classes)
    elif spec.rpartition(":")[0].endswith(".py"):
        path, _, function = spec.rpartition(":")
        model = _of_file(Path(path), function, num_classes)
    else:
        raise ModelError(f"model {spec!r} is not understood; models are named {FORMS}")
    if weights is not None:
        load_weights(model, weights, f"model {spec}")
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {str(device)!r} cannot be used: {error}") from error


def _of_torchvision(name: str, num_classes: int | None) -> nn.Module:
    library = torchvision().models
    known = library.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    builder = library.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _build(f"torchvision:{name}", builder, options)


def _of_timm(name: str, num_classes: int | None) -> nn.Module:
    torchvision()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"timm is needed for timm:{name} and is not installed: pip install thinet[vision]"
        ) from error
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise _unknown("timm", name, known)
    options: dict[str, Any] = {"pretrained": False}
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _build(f"timm:{name}", lambda **given: timm.create_model(name, **given), options)


def _of_file(path: Path, name: str, num_classes: int | None) -> nn.Module:
    if not path.is_file():
        raise ModelError(f"model {path}:{name}: there is no file {path}")
    module = _module_of(path)
    function = getattr(module, name, None)
    if not callable(function):
        own = [k for k, v in vars(module).items() if callable(v) and k[0] != "_"]
        raise _unknown(str(path), name, own, what="function")
    options: dict[str, Any] = {}
    if num_classes is not None:
        if "num_classes" in inspect.signature(function).parameters:
            options["num_classes"] = num_classes
        else:
            log.warning("%s:%s has no num_classes; %d is not used", path, name, num_classes)
    model = _build(f"{path}:{name}", function, options)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{path}:{name} gives a {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def _module_of(path: Path) -> ModuleType:
    """The user's file as a module, which may import what lies beside it."""
    path = path.resolve()
    unique = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    spec = importlib.util.spec_from_file_location(f"thinet_user_{path.stem}_{unique}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    # the user's file may raise anything; the message says where it did
    except Exception as error:
        del sys.modules[module.__name__]
        raise ModelError(f"{path} cannot be loaded: {_told(error, path)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _build(what: str, builder: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet's old initialisation
            return builder(**options)
    # a builder may raise anything; the message says which model it was
    except Exception as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ModelError(
            f"{what} cannot be built ({given or 'no arguments'}): {type(error).__name__}: {error}"
        ) from error


def _unknown(where: str, name: str, known: Iterable[str], what: str = "model") -> ModelError:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names[:8])}, ..."
    return ModelError(f"{where} has no {what} {name!r}; {hint}")


def _told(error: Exception, path: Path) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{line}: {error}"
