"""`verify_cut` accepts right cuts and refuses wrong ones, and says where they go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from thinet import verify
from thinet.errors import CalibrationError, VerificationError
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.verify import verify_cut

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
KEEP = {"first": [0, 2, 3, 6]}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.second = nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.act(self.norm(self.first(x))))
        return self.head(x.mean((2, 3)))


@dataclass
class Cut:
    """A model, a right cut of it, and what `verify_cut` is told of them."""

    model: nn.Module
    small: Any
    inputs: Any
    analysis: Analysis
    keep: Mapping[str, Sequence[int]]

    def verify(self) -> None:
        verify_cut(self.model, self.small, self.inputs, self.analysis, self.keep)


def right_cut(model: nn.Module, inputs: Any = X, keep: Mapping[str, Sequence[int]] = KEEP) -> Cut:
    analysis = analyse(model, inputs)
    small = thinet.cut(model, inputs, keep, verify=False, analysis=analysis)
    return Cut(model, small, inputs, analysis, keep)


def chain() -> Cut:
    return right_cut(randomise(Chain()).eval())


def refused(cut: Cut, what: str) -> None:
    with pytest.raises(VerificationError, match=f"{what}.*nothing was returned"):
        cut.verify()


@torch.no_grad()
def other_column(cut: Cut) -> None:
    """Channel 1 is kept in the consumer, where channel 2 is."""
    cut.small.second.weight[:, 1] = cut.model.second.weight[:, 1]


@torch.no_grad()
def other_variance(cut: Cut) -> None:
    cut.small.norm.running_var[3] *= 1.1


def other_activation(cut: Cut) -> None:
    cut.small.act = nn.GELU()


@torch.no_grad()
def other_bias(cut: Cut) -> None:
    cut.small.head.bias *= 1.01


@torch.no_grad()
def other_order(cut: Cut) -> None:
    """The producer's filters are in another order than all that goes with them."""
    for tensor in (cut.small.first.weight, cut.small.first.bias):
        tensor.copy_(tensor.flip(0))


SPOILS: list[tuple[Callable[[Cut], None], str]] = [
    (other_column, "second"),
    (other_variance, "norm"),
    (other_activation, "act"),
    (other_bias, "head"),
    (other_order, "first"),
]


@pytest.mark.parametrize(("spoil", "where"), SPOILS, ids=lambda x: getattr(x, "__name__", None))
def test_a_wrong_cut_is_refused_by_the_name_of_the_module(
    spoil: Callable[[Cut], None], where: str
) -> None:
    cut = chain()
    cut.verify()
    spoil(cut)
    refused(
        cut, f"differs from the silenced original by .* of the largest output, first in {where};"
    )


def test_a_cut_that_does_not_run_is_refused() -> None:
    cut = chain()
    cut.small.second = nn.Conv2d(5, 8, 3)
    refused(cut, "does not run on the example inputs: .*channels")


class Wrapped(nn.Module):
    """A model whose outputs are changed on the way out."""

    def __init__(self, net: nn.Module, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "another shape": lambda y: y[:, :4],
    "a shape that could be broadcast": lambda y: y[:1],
    "one more": lambda y: (y, y),
    "none": lambda y: None,
    "no number": lambda y: y * torch.nan,
    "one that is no number": lambda y: y.index_fill(1, torch.tensor([2]), torch.nan),
    "whole numbers": lambda y: y.long(),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_other_outputs_are_refused(kind: str) -> None:
    cut = chain()
    cut.small = Wrapped(cut.small, OUTPUTS[kind]).eval()
    refused(cut, "differs from the silenced original by")


def test_whole_and_complex_numbers_are_compared() -> None:
    for change in (lambda y: y.argsort(1), torch.fft.fft, lambda y: (y > 0, y.isnan())):
        cut = chain()
        silent = verify.silenced(cut.model, cut.analysis, cut.keep)
        expected = change(silent(X))
        right, wrong = Wrapped(cut.small, change).eval(), Wrapped(chain().small, change).eval()
        assert verify._gap(expected, right, X) < 1e-5
        with torch.no_grad():
            wrong.net.head.weight.neg_()  # pyright: ignore
        assert verify._gap(expected, wrong, X) > 1e-2


def coarse_in_float32(y: Tensor) -> Tensor:
    """As where statistics are wild and rounding is amplified."""
    return y if y.dtype == torch.float64 else y.bfloat16().float()


def test_where_float32_is_too_coarse_float64_decides() -> None:
    cut = chain()
    silent = verify.silenced(cut.model, cut.analysis, cut.keep)
    wild = Wrapped(cut.small, coarse_in_float32).eval()
    assert verify._gap(verify._run(silent, X)[0], wild, X) > verify.TOLERANCE
    verify_cut(cut.model, wild, X, cut.analysis, cut.keep)
    other_bias(cut)
    cut.small = wild
    refused(cut, "differs from the silenced original")


class NormedWeights(nn.Module):
    """The second layer's weights are divided by their own norm, which zeros in them change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight * (self.scale * self.scale + 1).rsqrt()
        return nn.functional.linear(self.first(x), weight + 0.1)


def test_where_weights_are_computed_operations_are_silenced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(5, 4)
    cut = right_cut(NormedWeights().eval(), x, {"first": [0, 3, 4]})
    cut.verify()
    with torch.no_grad():
        cut.small.scale[1] += 0.5
    refused(cut, "differs from the silenced original")

    def cannot(*_: Any) -> Any:
        raise CalibrationError("not one by one")

    monkeypatch.setattr(verify, "run_silenced", cannot)
    refused(right_cut(cut.model, x, cut.keep), "differs from the silenced original")


class Counting(Chain):
    """Counts its calls, averages its inputs and keeps what it last saw."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.calls = 0
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.first(x)
        self.average.mul_(0.9).add_(0.1 * self.seen.mean((0, 2, 3)))
        x = self.second(self.act(self.norm(self.seen)) * self.average[:, None, None])
        return self.head(x.mean((2, 3)) * self.calls)


def test_verifying_leaves_no_trace_in_the_cut_model() -> None:
    """And a model that changes at each call is right all the same."""
    model = randomise(Counting()).eval()
    for keep in (KEEP, {**KEEP, "second": [1, 2, 5]}):
        small: Any = thinet.cut(model, X, keep)
        unverified: Any = thinet.cut(model, X, keep, verify=False)
        assert small.calls == unverified.calls == 0
        assert small.seen is None
        assert torch.equal(small.average, model.average[KEEP["first"]])
        assert torch.equal(small(X), unverified(X))


def test_a_wrong_cut_of_a_changing_model_is_refused() -> None:
    cut = right_cut(randomise(Counting()).eval())
    cut.verify()
    other_bias(cut)
    refused(cut, "first in head;")
