"""Decisions that a forward pass takes by its data, taken again in later passes.

Detectors keep the boxes whose scores are high enough: how many depends on the numbers. A cut model
has other numbers, and its trace could not be compared with the original's. What is decided by data
(which entries are not zero, which boxes overlap, a whole number or a truth taken out of a tensor)
is remembered when the original runs, and holds when a cut copy runs. What the forward code computes
from sizes alone is left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from thinet.surgery.apply import memory_format
from thinet.types import cloned, tensors_in

RESULTS: Final = frozenset(
    (
        *"aten.nonzero aten._unique2 aten.unique_dim aten.unique_consecutive aten.equal".split(),
        *"aten.bincount aten.repeat_interleave aten._local_scalar_dense torchvision.nms".split(),
    )
)
"""Operations whose result is a decision."""

MASKED: Final = frozenset(
    ("aten.index", "aten.index_put", "aten.index_put_", "aten.masked_select", "aten._unsafe_index")
)
"""Operations among whose arguments a mask decides."""

ROUNDED: Final = frozenset(
    f"aten.{name}{place}" for name in "ceil floor round trunc".split() for place in ("", "_")
)
"""Operations whose results are whole numbers, also as floats; those of no others are decisions."""

PARTS: Final = frozenset(
    f"aten.{name}"
    for name in "select slice unbind view squeeze unsqueeze clone detach alias clamp".split()
)
"""Operations that hand whole numbers on."""

HEAVY: Final = frozenset(
    f"aten.{name}"
    for name in "convolution addmm mm bmm baddbmm scaled_dot_product_attention".split()
)
"""Operations that take long; where decisions are known, any numbers will do for their results."""

NUMBER: Final = "a number"
"""A float taken out of a tensor: no decision, it is taken anew in later passes."""

FRESH: Final = frozenset(("aten.lift_fresh", "aten.lift_fresh_copy"))

Decision = tuple[str, tuple[torch.Size, ...], Any]
"""Operation (or `NUMBER`), shapes of the tensors that it was given, and what was decided."""


def only_decide(decisions: Sequence[Decision]) -> bool:
    """Whether there are decisions and no numbers that go on as they are."""
    names = {name for name, _, _ in decisions}
    return bool(names) and NUMBER not in names


class Decisions(TorchDispatchMode):
    """Remembers decisions, or where `known` ones are given and fit, takes these.

    With `light`, convolutions and products of data are not computed: any numbers stand for them.
    """

    def __init__(self, known: Sequence[Decision] | None = None, *, light: bool = False) -> None:
        super().__init__()
        self.made: list[Decision] = []
        self._known = known
        self._light = light
        self._numbers = torch.Generator().manual_seed(0)
        self._constant: dict[int, torch.Tensor] = {}  # made of no data; alive, so that ids hold
        self._whole: dict[int, torch.Tensor] = {}  # made by rounding data, alive as well

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = f"{func.namespace}.{func._opname}"
        given = tensors_in((args, kwargs))
        by_data = name not in FRESH and any(id(x) not in self._constant for x in given)
        shapes = tuple(x.shape for x in given)
        if by_data and name in MASKED:
            args = tree_map(lambda x: self._mask(name, x), args)
        if by_data and self._light and name in HEAVY and given[0].is_floating_point():
            result = self._any_numbers(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        whole = bool(given) and id(given[0]) in self._whole
        if by_data and name in RESULTS:
            if whole or not isinstance(result, float):
                result = self._decide(name, shapes, result)
            else:
                self.made.append((NUMBER, shapes, result))
        made = {id(x): x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)}
        if not by_data:
            self._constant.update(made)
            return result
        if func._schema.is_mutable:  # what was whole or constant before, as its views were
            written = {x.untyped_storage()._cdata for x in made.values()}
            self._whole, self._constant = (
                {k: x for k, x in kept.items() if x.untyped_storage()._cdata not in written}
                for kept in (self._whole, self._constant)
            )
        if (name in ROUNDED and func._overloadname != "decimals") or (
            whole and name in PARTS and len(given) == 1
        ):
            self._whole.update(made)
        return result

    def _any_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Results of the operation's shapes and types, of numbers that nothing else has."""

        def on_meta(x: Any) -> Any:
            return x.to("meta") if isinstance(x, torch.Tensor) else x

        def drawn(x: torch.Tensor) -> torch.Tensor:
            forms = [memory_format(y) for y in given if y.ndim == x.ndim]
            plain = torch.contiguous_format
            form = next((form for form in forms if form is not plain), plain)
            numbers = torch.empty(x.shape, dtype=x.dtype, device="cpu", memory_format=form)
            return numbers.uniform_(-1, 1, generator=self._numbers).to(given[0].device)

        given = tensors_in((args, kwargs))
        return tree_map(drawn, func(*tree_map(on_meta, args), **tree_map(on_meta, kwargs)))

    def _mask(self, name: str, value: Any) -> Any:
        mask = isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)
        if not mask or id(value) in self._constant:
            return value
        return self._decide(name, (value.shape,), value)

    def _decide(self, name: str, shapes: tuple[torch.Size, ...], found: Any) -> Any:
        """What was decided at this place, if the original came by it with the same shapes."""
        place = len(self.made)
        if self._known is not None and place < len(self._known):
            known = self._known[place]
            if known[:2] == (name, shapes):
                found = known[2]
        self.made.append((name, shapes, cloned(found)))
        return cloned(found)
