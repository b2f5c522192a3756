"""Operations without data, worked out once.

On the meta device an operation computes shapes, strides and types from shapes, strides and types,
most of it in slow Python. What came out once comes out again wherever the same goes in. Where an
operation hands sizes on and does not compute with them, it also comes out for other sizes: those
are renamed, worked out, and renamed back.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch

META = torch.device("meta")


class _Like(NamedTuple):
    """All that an operation without data can see of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)


class _Nest(NamedTuple):
    """A list or tuple of arguments."""

    kind: type
    items: tuple[Hashable, ...]


class _Scalar(NamedTuple):
    """1, 1.0 and True are equal, but they do not give results of the same type."""

    kind: type
    value: Hashable


class _Call(NamedTuple):
    """All that the results of an operation depend on."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    default: torch.dtype


class _Unseen(Exception):
    """An argument whose description does not say everything."""


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What `func(*args, **kwargs)` returns, from memory where that is known to be the same."""
    if not _pure(func):
        return func(*args, **kwargs)
    try:
        described = tuple([_described(x) for x in args])
        named = tuple([(name, _described(x)) for name, x in kwargs.items()])
    except _Unseen:
        return func(*args, **kwargs)
    made = _remembered(_Call(func, described, named, torch.get_default_dtype()))
    if made is None:
        return func(*args, **kwargs)
    if made is SAME:
        return args[0]
    return made[0].made() if type(made) is _One else tuple([like.made() for like in made])


class _One(tuple[_Like, ...]):
    """A single result, not in a tuple."""


SAME = (_Like((), (), torch.bool), None)
"""The first argument itself comes back as it was."""


@lru_cache(maxsize=1 << 14)
def _remembered(call: _Call) -> tuple[Any, ...] | None:
    """`_results`, by way of other sizes where that will do."""
    return _renamed(call) or _results(call)


@lru_cache(maxsize=1 << 14)
def _results(call: _Call) -> tuple[Any, ...] | None:
    """What the results look like, or `SAME`.

    None where a result shares memory with an argument, or is not told by its description.
    """
    given = [_made(x) for x in call.args]
    named = {name: _made(x) for name, x in call.kwargs}
    found = call.func(*given, **named)
    if given and found is given[0]:
        return SAME if _described(found) == call.args[0] else None
    results = (found,) if isinstance(found, torch.Tensor) else found
    if type(results) is not tuple or not results or call.func._schema.is_mutable:
        return None
    try:
        likes = [_described(x) for x in results]
    except _Unseen:
        return None
    seen = {_memory(x) for x in _tensors([*given, *named.values()])}
    for like, result in zip(likes, results, strict=True):
        if not isinstance(like, _Like) or _memory(result) in seen or result.storage_offset():
            return None
        if like.made().untyped_storage().nbytes() != result.untyped_storage().nbytes():
            return None
        seen.add(_memory(result))
    return _One(likes) if isinstance(found, torch.Tensor) else tuple(likes)  # type: ignore[arg-type]


@lru_cache(maxsize=1 << 10)
def _pure(func: Any) -> bool:
    """Operations of PyTorch itself that make new tensors, or write into their first argument."""
    if getattr(func, "namespace", None) != "aten":
        return False
    arguments: list[Any] = list(func._schema.arguments)
    first, *others = arguments or [None]
    written = first is not None and first.alias_info is not None and first.alias_info.is_write
    shared = [a for a in (*others, *func._schema.returns) if a.alias_info is not None]
    return not shared or (written and shared == list(func._schema.returns) and len(shared) == 1)


def _described(x: Any) -> Hashable:
    kind = type(x)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        if x.is_meta and x.layout is torch.strided and not x.is_complex() and not x.is_quantized:
            return _Like(x.shape, x.stride(), x.dtype)
        raise _Unseen
    if kind in (int, float, bool):
        return _Scalar(kind, x)
    if kind in (list, tuple):
        return _Nest(kind, tuple([_described(item) for item in x]))
    if kind in PLAIN:
        return x
    raise _Unseen


PLAIN = (type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _made(x: Any) -> Any:
    if type(x) is _Like:
        return x.made()
    if type(x) is _Nest:
        return x.kind([_made(item) for item in x.items])
    return x.value if type(x) is _Scalar else x


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, (list, tuple)) else []


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _named(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}{place}" for name in names.split() for place in ("", "_"))


ANY_SIZE = _named("""
relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid elu leaky_relu exp neg pow sqrt rsqrt
clamp add sub mul div native_batch_norm native_layer_norm addmm mm bmm _softmax
""")
"""Operations that only compare sizes and hand them on."""

LEADING = _named("""
convolution max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d mean
""")
"""Operations that do so with the first two sizes of each tensor, and compute with the others."""

SMALL = (5, 7, 11, 13, 17, 19, 23, 29)
LITERAL = 2048  # largest size that is left as it is
LARGE = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)  # no size of an image


def _renamed(call: _Call) -> tuple[Any, ...] | None:
    """The results by way of other sizes, None where they might depend on the sizes themselves."""
    name = f"aten.{call.func._opname}"
    if name not in ANY_SIZE and name not in LEADING:
        return None
    names = _Names(SMALL, None) if name in ANY_SIZE else _Names(LARGE, 2)
    try:
        given: tuple[Any, ...] = tuple([names.of(x) for x in call.args])
    except _Unseen:
        return None
    if name == "aten.convolution":
        channels, transposed, groups = call.args[0].shape[1], call.args[6].value, call.args[8].value
        if transposed or (groups != 1 and not channels == groups == call.args[1].shape[0]):
            return None
        given = (*given[:8], _Scalar(int, names.size(groups)))
    try:
        made = _results(call._replace(args=given))
    except RuntimeError:  # to be said of the sizes that the user has
        return None
    return made if made is None or made is SAME else names.back(made)


class _Names:
    """Sizes above one under other names, the same for the same size."""

    def __init__(self, spare: tuple[int, ...], leading: int | None) -> None:
        self.spare = spare
        self.leading = leading  # how many sizes of a tensor are renamed, None for all
        self.given: dict[int, int] = {}

    def size(self, n: int) -> int:
        if n > 1 and n not in self.given:
            if len(self.given) == len(self.spare):
                raise _Unseen
            self.given[n] = self.spare[len(self.given)]
        return self.given.get(n, n)

    def of(self, x: Any) -> Any:
        if type(x) is _Like:
            free, others = x.shape[: self.leading], x.shape[len(x.shape[: self.leading]) :]
            if x.stride != _contiguous(x.shape) or 0 in x.shape or max(others, default=0) > LITERAL:
                raise _Unseen
            shape = (*[self.size(n) for n in free], *others)
            return _Like(shape, _contiguous(shape), x.dtype)
        if type(x) is _Nest:
            sizes: list[int] = [item.value for item in cast("tuple[Any, ...]", x.items)]
            if self.leading is None:  # as of a LayerNorm
                return _Nest(x.kind, tuple([_Scalar(int, self.size(n)) for n in sizes]))
            if any(abs(n) > LITERAL for n in sizes):
                raise _Unseen
        return x

    def back(self, made: tuple[Any, ...]) -> tuple[Any, ...] | None:
        old: dict[Any, int] = {new: n for n, new in self.given.items()}
        likes = []
        for like in made:
            known = all(
                n in old or n < (2 if self.leading is None else LARGE[0]) for n in like.shape
            )
            if not known or like.stride != _contiguous(like.shape):
                return None
            shape: Any = tuple([old.get(n, n) for n in like.shape])
            likes.append(_Like(shape, _contiguous(shape), like.dtype))
        return type(made)(likes)


@lru_cache(maxsize=1 << 12)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
