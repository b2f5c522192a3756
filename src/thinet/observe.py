"""The only place where modes, flags, hooks and random state are switched, and put back."""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from thinet.errors import ThinetError
from thinet.paths import named_modules


@contextmanager
def evaluating(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Every module in evaluation (or training) mode; each one's own mode comes back after."""
    modes = [(module, module.training) for module in named_modules(model).values()]

    def switch(wanted: Iterable[tuple[nn.Module, bool]]) -> None:
        for module, mode in wanted:
            if module.training != mode:  # to set an attribute of a module takes long
                module.training = mode

    try:
        switch((module, training) for module, _ in modes)
        yield
    finally:
        switch(modes)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """The global random state after is the one before: torch's, on the CPU and any initialised GPU,
    Python's and numpy's."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def running(kind: type[ThinetError], what: str) -> Iterator[None]:
    """A model's own errors become one of this kind that begins with `what` did not run."""
    try:
        yield
    except (torch.OutOfMemoryError, ThinetError):
        raise
    except Exception as error:  # forward code may assert, look up, divide
        raise kind(f"{what}: {str(error) or type(error).__name__}") from error


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Collections of garbage do not go through what was there before, and are few.

    Many traces make many objects and little garbage. Where another has frozen objects
    (`gc.freeze`), nothing is done, so that theirs stay so.
    """
    if gc.get_freeze_count():
        yield
        return
    often = gc.get_threshold()
    gc.set_threshold(SELDOM, *often[1:])
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*often)


SELDOM = 50_000
"""New objects, tens of megabytes, after which garbage is looked for."""


@contextmanager
def full_products() -> Iterator[None]:
    """Matrix products of float32 in float32, where the user allows the GPU to take fewer bits.

    Moments of 1e-3 relative error would be at the level of the ridge of a repair.
    """
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention runs as the operations it is made of, not as one fused kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def module_calls(model: nn.Module) -> Iterator[tuple[list[str], list[tuple[str, Any]]]]:
    """Which module is running, and what each returned.

    Yields a stack whose last entry is the dotted path of the module that is running ("" the root),
    and a list that grows by (path, output) at each call. A module registered under several names
    runs under the first.
    """
    stack = [""]
    calls: list[tuple[str, Any]] = []
    paths = {id(module): path for path, module in named_modules(model).items()}

    def entering(module: nn.Module, _: Any) -> None:
        path = paths.get(id(module))
        if path is not None:
            stack.append(path)

    def leaving(module: nn.Module, _: Any, output: Any) -> None:
        path = paths.get(id(module))
        if path is not None:
            stack.pop()
            calls.append((path, output))

    # For all modules at once: a pair of handles for each of a thousand takes longer than a trace.
    handles = [
        register_module_forward_pre_hook(entering),
        register_module_forward_hook(leaving, always_call=True),
    ]
    try:
        yield stack, calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forward_derivatives() -> Iterator[None]:
    """Tensors can carry a tangent. What torch itself loads for it warns of its own deprecation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
        with forward_ad.dual_level():
            yield
