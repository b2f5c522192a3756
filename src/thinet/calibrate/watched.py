"""What a model's layers are given while it runs by itself, its own derivatives and all.

The traced program is recorded below autograd: what forward code does to gradients (an
`autograd.Function`, a `no_grad` block) is not in it. So the model runs itself here, and its
products of weights and activations are told by the weight, and by its n-th use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from thinet.calibrate.batches import images_in
from thinet.errors import CalibrationError
from thinet.observe import evaluating, plain_attention, preserved_rng, running
from thinet.surgery.apply import named_tensors
from thinet.trace.program import Program
from thinet.trace.record import describe
from thinet.types import ExampleInputs, call, cloned

PRODUCTS = {"aten.convolution": 0, "aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1}
"""Which argument is the activation; the weight is the next."""

VIEWS = frozenset({"aten.view", "aten._unsafe_view"})


Key = tuple[int, int]
"""Where a weight begins in memory, and the how-manieth product with it."""


def product_keys(program: Program, model: nn.Module) -> dict[int, Key]:
    """By operation, the products of a traced program with weights of this (copy of the) model."""
    tensors = dict(named_tensors(model))
    owners = {
        value.storage: _memory(tensors[program.names[value.id]])
        for value in program.parameters.values()
        if value.id in program.names
    }
    met: Counter[int] = Counter()
    found: dict[int, Key] = {}
    for op in program.ops:
        if op.name in PRODUCTS:
            weight = op.args[PRODUCTS[op.name] + 1]
            if weight.storage in owners:
                memory = owners[weight.storage]
                found[op.index] = memory, met[memory]
                met[memory] += 1
    return found


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Given:
    """What a product is given.

    Attributes:
        x: the activation, before its axes became rows of a matrix.
        channels: which axis of x is mixed.
        saved: whether autograd keeps x, so that nothing may write over it.
    """

    x: Tensor
    channels: int
    saved: bool


class _Watch(TorchDispatchMode):
    def __init__(self, wanted: Collection[Key], seen: Callable[[Key, Given], None]) -> None:
        super().__init__()
        self.met: Counter[int] = Counter()
        self._wanted, self._seen = wanted, seen
        self._before: Any = WeakTensorKeyDictionary()  # of a view, what it is a view of

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().partition(".")[0].replace("::", ".")
        if name in PRODUCTS:
            memory = _memory(args[PRODUCTS[name] + 1])
            if (memory, self.met[memory]) in self._wanted:
                self._seen((memory, self.met[memory]), self._given(name, args))
            self.met[memory] += 1
        made = func(*args, **(kwargs or {}))
        if name in VIEWS and made.ndim and args[0].ndim and made.shape[-1] == args[0].shape[-1]:
            self._before[made] = args[0]
        return made

    def _given(self, name: str, args: tuple[Any, ...]) -> Given:
        x, weight = args[PRODUCTS[name] :][:2]
        if name == "aten.convolution":
            return Given(x, x.ndim + 1 - weight.ndim, weight.requires_grad)
        while x in self._before:
            x = self._before[x]
        return Given(x, x.ndim - 1, weight.requires_grad)


def run_watched(
    model: nn.Module,
    inputs: ExampleInputs,
    wanted: Collection[Key],
    seen: Callable[[Key, Given], None],
) -> Any:
    """What the model returns; on the way `seen` is told of the wanted products.

    Raises:
        CalibrationError: the model does not run.
    """
    what = f"{type(model).__name__} does not run on a calibration batch ({describe(inputs)})"
    with preserved_rng(), evaluating(model), plain_attention():
        torch.manual_seed(0)
        with running(CalibrationError, what), _Watch(wanted, seen):
            return call(model, cloned(inputs))  # forward code may work in place


@dataclass(frozen=True)
class Layout:
    """Where the images are in an activation.

    Attributes:
        axis: the one that they lie along.
        inner: whether what else lies along it goes through all images first.
    """

    axis: int = 0
    inner: bool = False

    def per_image(self, values: Tensor, channels: int, images: int) -> Tensor:
        """(images, C) means over positions; of what does not go by images, over those of each."""
        if self.axis == channels:  # one image without an axis of its own
            values, channels = values[None], channels + 1
        last = values.movedim((self.axis, channels), (0, -1))
        size = len(last)
        if size % images:
            images = size
        parts = (size // images, images) if self.inner else (images, size // images)
        last = last.unflatten(0, parts)
        last = last.transpose(0, 1) if self.inner else last
        return last.reshape(images, -1, last.shape[-1]).mean(1, dtype=torch.float64)


@torch.no_grad()
def image_layouts(
    model: nn.Module, inputs: ExampleInputs, wanted: Collection[Key]
) -> Mapping[Key, Layout]:
    """Where the images are in what each wanted product is given.

    Seen by two images of the batch: what is another where one of them is another is that image's.
    Products are left out in which images cannot be told from each other; where the model does not
    run on two images, they are taken to come first.
    """
    size = images_in(inputs)

    def pair(changed: bool) -> ExampleInputs:
        def taken(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != size:
                return leaf
            two = leaf[[0, 1 % size]]
            if changed and leaf.numel() and leaf.dtype != torch.bool and not leaf.is_complex():
                two[0] = two.max() + two.min() - two[0]
            return two

        return tree_map(taken, inputs)

    runs: list[dict[Key, Given]] = [{}, {}]
    try:
        for found, changed in zip(runs, (False, True), strict=True):
            run_watched(model, pair(changed), wanted, found.__setitem__)
    except CalibrationError:
        return dict.fromkeys(wanted, Layout())
    layouts = {key: _layout(runs[0][key], runs[1][key]) for key in runs[0].keys() & runs[1].keys()}
    return {key: layout for key, layout in layouts.items() if layout is not None}


def _layout(one: Given, other: Given) -> Layout | None:
    if one.x.shape != other.x.shape:
        return None
    if one.x.ndim == 1:
        return Layout()
    differs = (one.x != other.x).any(one.channels)
    if not bool(differs.any()):
        return Layout()
    for axis, size in enumerate(differs.shape):
        at = torch.arange(size, device=differs.device)
        for inner, first in ((False, at < size // 2), (True, at % 2 == 0)):
            others = differs.index_select(axis, at[~first])
            if size % 2 == 0 and not bool(others.any()):
                return Layout(axis + (axis >= one.channels), inner)
    return None
