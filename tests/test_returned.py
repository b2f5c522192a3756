"""What a forward pass gives away may not be cut, in whatever it is wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thinet
from thinet.errors import LockedGroupError, VerificationError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Hidden units `h` between two layers; what is returned is made of them and of `y`."""

    def __init__(self, wrap: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.c, self.wrap = nn.Linear(4, 8), nn.Linear(8, 10), wrap

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return self.wrap(self, h, self.c(h))


class Slots:
    __slots__ = ("__hidden", "shown")

    def __init__(self, hidden: Tensor) -> None:
        self.__hidden, self.shown = hidden, None


@dataclass
class Data:
    y: Tensor


class WithMore(dict[str, Tensor]):
    more: Any


class PairWithMore(tuple[Tensor, ...]):
    more: Any


def with_more(kind: Callable[[], Any], value: Any) -> Any:
    wrapped = kind()
    wrapped.more = value
    return wrapped


def circle(y: Tensor) -> Any:
    first = SimpleNamespace()
    first.next = SimpleNamespace(back=first, y=y)
    return first


def left_in_the_model(net: Any, y: Tensor) -> None:
    net.out = y


Y_ONLY: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "namespace": lambda net, h, y: SimpleNamespace(y=y),
    "slots": lambda net, h, y: Slots(y),
    "dataclass": lambda net, h, y: Data(y),
    "distribution": lambda net, h, y: torch.distributions.Normal(y, 1.0, validate_args=False),
    "nested": lambda net, h, y: {"loss": y.mean(), "out": [SimpleNamespace(y=(y,))]},
    "attribute of a dict": lambda net, h, y: with_more(WithMore, y),
    "attribute of a tuple": lambda net, h, y: with_more(PairWithMore, y),
    "circle": lambda net, h, y: circle(y),
    "array": lambda net, h, y: y.detach().numpy(),
    "array by numpy": lambda net, h, y: np.asarray(y),
    "arrays": lambda net, h, y: [row.numpy() for row in y],
    "beside constants": lambda net, h, y: (y, None, "name", 0.5, Data, np.float32(1)),
}  # fmt: skip

BOTH: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "namespace": lambda net, h, y: SimpleNamespace(y=y, h=h),
    "array": lambda net, h, y: (y, h.numpy() * 2),
    "list": lambda net, h, y: {"y": y, "h": h.tolist()},
    "itself": lambda net, h, y: SimpleNamespace(net=net, y=y),
}

HIDDEN: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "set": (lambda net, h, y: {y}, "set"),
    "iterator": (lambda net, h, y: iter([y]), "list_iterator"),
    "map": (lambda net, h, y: map(abs, [y]), "map"),
    "generator": (lambda net, h, y: (row for row in y), "generator"),
    "closure": (lambda net, h, y: {"y": y, "h": lambda: h}, "function"),
    "partial": (lambda net, h, y: functools.partial(print, y), "partial"),
    "memory": (lambda net, h, y: (y, h.untyped_storage()), "UntypedStorage"),
    "array of objects": (lambda net, h, y: np.array([y, None], dtype=object), "ndarray"),
    "list": (lambda net, h, y: y.argmax(1).tolist(), ""),
    "nothing": (lambda net, h, y: left_in_the_model(net, y), ""),
    "constant": (lambda net, h, y: 0, ""),
}


def locks(wrap: Callable[[Any, Tensor, Tensor], Any]) -> dict[str, str | None]:
    return {g.name: g.locked for g in thinet.find_groups(Net(wrap).eval(), X)}


@pytest.mark.parametrize("kind", Y_ONLY)
def test_outputs_are_locked_in_whatever_wraps_them(kind: str) -> None:
    found = locks(Y_ONLY[kind])
    assert found["a"] is None
    assert found["c"] in (
        "it is an output of the model",
        "the forward code takes its numbers out, as an array or a list",
    )
    model = Net(Y_ONLY[kind]).eval()
    small: Any = thinet.cut(model, X, {"a": [0, 2, 5]})
    assert small.a.out_features == 3
    with pytest.raises(LockedGroupError, match="group 'c' may not be cut"):
        thinet.cut(model, X, {"c": [0]})


@pytest.mark.parametrize("kind", BOTH)
def test_what_later_layers_read_is_an_output_all_the_same(kind: str) -> None:
    assert None not in locks(BOTH[kind]).values()


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_cannot_be_looked_into_locks_all(kind: str) -> None:
    wrap, seen = HIDDEN[kind]
    found = locks(wrap)
    assert None not in found.values()
    wanted = f"an object of class {seen}, into" if seen else "no tensor on the example inputs"
    assert str(found["a"]).startswith(f"the model returns {wanted}")


@pytest.mark.parametrize("kind", ["namespace", "slots", "nested", "array", "attribute of a dict"])
def test_what_is_wrapped_is_compared(kind: str) -> None:
    """A copy that computes something else is not called verified."""

    class Spoilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(Y_ONLY[kind])
            self.width = 8

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                return self.net(x + (self.net.a.out_features < self.width))

    with pytest.raises(VerificationError, match="the cut model differs"):
        thinet.cut(Spoilt().eval(), X, {"net.a": [0, 2, 5]})


def test_numbers_that_are_returned_are_compared() -> None:
    model = Net(lambda net, h, y: (y, h.shape[1])).eval()
    with pytest.raises(VerificationError, match="the cut model differs"):
        thinet.cut(model, X, {"a": [0, 2, 5]})


def test_where_nothing_is_found_there_is_nothing_to_verify() -> None:
    """A detector that finds no box."""
    model = Net(lambda net, h, y: y[:0]).eval()
    with pytest.raises(VerificationError, match="gives no finite number to compare"):
        thinet.cut(model, X, {"a": [0, 2, 5]})
    small: Any = thinet.cut(model, X, {"a": [0, 2, 5]}, verify=False)
    assert small.a.out_features == 3


def test_a_cache_that_goes_back_into_the_model_is_no_output() -> None:
    cache = type("Cache", (), {"__module__": "transformers.cache_utils"})
    keys = type("DynamicCache", (cache,), {})

    def cached(_: Net, h: Tensor, y: Tensor) -> dict[str, Any]:
        kept = keys()
        kept.layers = [h]
        return {"logits": y, "past_key_values": kept}

    net = Net(cached).eval()
    free = {g.name: g.locked for g in thinet.find_groups(net, X)}
    assert free["a"] is None and free["c"] is not None
    small = thinet.cut(net, X, {"a": [0, 5, 7]})
    assert small(X)["past_key_values"].layers[0].shape == (3, 3)
