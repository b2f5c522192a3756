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

from thinet.types import tensors_in

RESULTS: Final = frozenset(
    (
        *"aten.nonzero aten._unique2 aten.unique_dim aten.unique_consecutive aten.equal".split(),
        *"aten.bincount aten._local_scalar_dense torchvision.nms".split(),
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

FRESH: Final = frozenset(("aten.lift_fresh", "aten.lift_fresh_copy"))

Decision = tuple[str, tuple[torch.Size, ...], Any]
"""Operation, shapes of the tensors that it was given, and what was decided."""


class Decisions(TorchDispatchMode):
    """Remembers decisions, or where `known` ones are given and fit, takes these."""

    def __init__(self, known: Sequence[Decision] | None = None) -> None:
        super().__init__()
        self.made: list[Decision] = []
        self._known = known
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
        result = func(*args, **kwargs)
        whole = bool(given) and id(given[0]) in self._whole
        if by_data and name in RESULTS and (whole or not isinstance(result, float)):
            result = self._decide(name, shapes, result)
        made = {id(x): x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)}
        if not by_data:
            self._constant.update(made)
        elif (name in ROUNDED and func._overloadname != "decimals") or (
            whole and name in PARTS and len(given) == 1
        ):
            self._whole.update(made)
        elif func._schema.is_mutable:  # it may have been whole before, and so may its views
            written = {x.untyped_storage()._cdata for x in made.values()}
            self._whole = {
                key: x
                for key, x in self._whole.items()
                if x.untyped_storage()._cdata not in written
            }
        return result

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
        self.made.append((name, shapes, _cloned(found)))
        return _cloned(found)


def _cloned(tree: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)
