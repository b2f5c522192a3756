"""Forwards that decide by their data: the cut is compared as if it decided alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.trace.decisions import Decisions
from thinet.trace.record import record

torch.set_num_threads(1)


class Rows(nn.Module):
    """Features of 12 places, some of which are chosen by their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score = nn.Linear(3, 6), nn.Linear(6, 1)
        self.head, self.out = nn.Linear(6, 5), nn.Linear(5, 2)

    def example(self) -> Tensor:
        return torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        x = self.chosen(x, self.score(x).flatten())
        return self.out(F.relu(self.head(x)))


class NonzeroNet(Rows):
    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x[torch.nonzero(score > score.mean())[:, 0]]


class MaskNet(Rows):
    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x[score > score.mean()]


class BranchNet(Rows):
    """Another number of operations for other numbers."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        for value in score[:6]:
            if value > score.mean():
                x = x + 1
        return x


class CountNet(Rows):
    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x[: int((score > score.mean()).sum()) + 1]


class RoundNet(Rows):
    """A size out of a box, as where a detector scales maps to it."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        width = score.abs().ceil().clamp(min=1)
        x = F.interpolate(x.t()[None], size=int(width[0].item()) + 1, mode="linear")
        return x[0].t() * (score[0] / width[0].item())


NETS: tuple[Callable[[], Rows], ...] = (NonzeroNet, MaskNet, BranchNet, CountNet, RoundNet)


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_what_data_decides_locks_nothing(cls: Callable[[], Rows]) -> None:
    model = randomise(cls()).double().eval()
    x = model.example()
    groups = thinet.find_groups(model, x)
    free = {g.name: g.channels for g in groups if g.locked is None and g.channels > 1}
    assert free == {"embed": 6, "head": 5}, [(g.name, g.locked) for g in groups]
    for name in free:
        check(model, x, groups, {name: [0, 3]}, thinet.cut)
    check(model, x, groups, {"embed": [1], "head": [2]}, thinet.cut)


def test_the_decisions_of_these_nets_do_change_with_a_cut() -> None:
    """Else the test above would show nothing."""
    model = randomise(MaskNet()).double().eval()
    x = model.example()
    sizes = {len(thinet.cut(model, x, {"embed": [i]}, verify=False)(x)) for i in range(6)}
    assert len(sizes) > 1


class SizeNet(Rows):
    """A number out of a tensor, but made from the size: it must follow the cut, and does not."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x * torch.tensor(x.shape[1]).sqrt().item() + x[:, :1] * 0


class SliceNet(Rows):
    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        half = torch.tensor(x.shape[0] // 2).item()
        width = torch.tensor(x.shape[1] - 1).item()
        return torch.cat([x[:half], x[half:] * x[half:, width].unsqueeze(1)])


class ScoreNet(Rows):
    """A number out of data that is not a whole one: nobody knows what sizes are in it."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x * score[0].item()


class ScaledNet(Rows):
    """Rounded, and no whole number any more."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x * score.ceil().mul_(0.1).add_(score)[0].item()


@pytest.mark.parametrize("cls", [SizeNet, SliceNet, ScoreNet, ScaledNet], ids=lambda c: c.__name__)
def test_what_the_size_decides_is_not_taken_for_data(cls: Callable[[], Rows]) -> None:
    model = randomise(cls()).double().eval()
    groups = thinet.find_groups(model, model.example())
    assert {g.name for g in groups if g.locked is None and g.channels > 1} == {"head"}
    reason = next(g.locked for g in groups if g.name == "embed")
    assert "aten." in str(reason)


class ListNet(Rows):
    """Indices read as a list, which no operation shows."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x[score.argsort()[:5].tolist()]


class CountNet(Rows):
    """Each place as often as its score says."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        return x.repeat_interleave(1 + (score > score.mean()).long(), 0)


class PlaceNet(Rows):
    """An average of places, looked up: any other numbers lie outside of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        place = score.softmax(0) @ torch.arange(12.0).to(score)
        return x + self.table(place.long().clamp(max=11))


class WrittenNet(Rows):
    """A tensor made of no data, into which data is written before it decides."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        marks = torch.zeros(12, dtype=torch.bool)
        marks[:] = score > score.mean()
        return x[marks]


@pytest.mark.parametrize("cls", [ListNet, CountNet, PlaceNet, WrittenNet], ids=lambda c: c.__name__)
def test_what_any_numbers_lead_astray_is_traced_with_the_real_ones(cls: Callable[[], Rows]) -> None:
    model = randomise(cls()).double().eval()
    groups = thinet.find_groups(model, model.example())
    free = {g.name for g in groups if g.locked is None and g.channels > 1}
    assert "head" in free
    check(model, model.example(), groups, {"head": [1, 3]}, thinet.cut)
    if cls in (CountNet, WrittenNet):  # what decides is known to
        assert "embed" in free
        check(model, model.example(), groups, {"embed": [2]}, thinet.cut)


class CopiedNet(Rows):
    """A number out of a tensor made of no data, into which data was written."""

    def chosen(self, x: Tensor, score: Tensor) -> Tensor:
        largest = torch.zeros(())
        largest.copy_(score.max())
        return x + largest.item()


def test_a_number_written_into_a_constant_is_of_the_data() -> None:
    model = randomise(CopiedNet()).double().eval()
    with Decisions() as seen, torch.no_grad():
        model(model.example())
    assert "a number" in [name for name, _, _ in seen.made]
    groups = thinet.find_groups(model, model.example())
    assert {g.name for g in groups if g.locked is None and g.channels > 1} == {"head"}


def test_decisions_are_taken_again_where_they_fit() -> None:
    a, b = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])

    def run(x: Tensor) -> tuple[Any, ...]:
        return torch.nonzero(x)[:, 0].tolist(), x[x > 0.5].shape[0], bool(x[0] > 0)

    with Decisions() as first:
        assert run(a) == ([1, 2], 2, False)
    names = [name for name, _, _ in first.made]
    assert names[0] == "aten.nonzero"
    assert names[-1] == "aten._local_scalar_dense"
    with Decisions(first.made):
        assert run(b) == ([1, 2], 2, False)
    with Decisions(first.made):  # another shape is decided anew
        assert run(torch.cat([b, b]))[0] == [0, 3]
    assert run(b) == ([0], 1, True)


def test_where_decisions_are_known_convolutions_are_not_computed() -> None:
    conv, x = nn.Conv2d(3, 4, 3, stride=2).double(), torch.randn(2, 3, 9, 9).double()
    x = x.to(memory_format=torch.channels_last)
    with Decisions() as first, torch.no_grad():
        real = conv(x)
        ints = torch.arange(4).view(2, 2) @ torch.arange(4).view(2, 2)
    torch.testing.assert_close(real, conv(x))
    before = torch.get_rng_state()
    with Decisions(first.made, light=True), torch.no_grad():
        other = conv(x)
        again = torch.arange(4).view(2, 2) @ torch.arange(4).view(2, 2)
        constant = torch.ones(2, 3) @ torch.ones(3, 2)
    assert (other.shape, other.dtype, other.stride()) == (real.shape, real.dtype, real.stride())
    assert bool((other != real).all())
    assert other.unique().numel() == other.numel()
    assert bool((torch.get_rng_state() == before).all())
    assert constant.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert again.tolist() == ints.tolist() == [[2, 3], [6, 11]]


def test_a_program_without_data_has_no_decisions() -> None:
    model = nn.Linear(3, 2)
    assert record(model, torch.zeros(1, 3)).decisions == ()
    assert record(MaskNet().double(), MaskNet().example()).decisions != ()
