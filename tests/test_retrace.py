"""Groups that do not follow a cut are locked, each once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.paths import named_modules
from thinet.trace import retrace
from thinet.trace.probe import probe


class CountsItsChannels(nn.Module):
    """The number of channels scales a tensor that has none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.outer(inner) + x * inner.shape[1]


def test_twins_that_are_both_culprits_are_locked_once() -> None:
    model = nn.Sequential(CountsItsChannels(), CountsItsChannels()).eval()
    groups = thinet.find_groups(model, torch.randn(1, 3, 4, 4))
    locked = {g.name: g.locked for g in groups if g.name.endswith("inner")}
    assert list(locked) == ["0.inner", "1.inner"]
    assert all(reason and "aten.mul in " in reason for reason in locked.values())


class Heads(nn.Module):
    """A list of layers, each cut into pieces of a size that no attribute holds."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(heads))
        self.out = nn.Conv2d(8 * heads, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = [head(x).split([3 + 2, 2 + 1], dim=1) for head in self.heads]
        return self.out(torch.cat([part for half in halves for part in half], 1))


def tries(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """How often the model is traced anew, and its locked groups."""
    calls: list[None] = []

    def counting(*args: object, **options: object) -> object:
        calls.append(None)
        return probe(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(retrace, "probe", counting)
    groups = thinet.find_groups(nn.Sequential(model).eval(), torch.randn(1, 3, 4, 4))
    return len(calls), [g.name for g in groups if g.locked]


def test_what_one_head_of_a_list_fails_at_the_others_need_not_try(monkeypatch) -> None:
    few, locked = tries(Heads(2), monkeypatch)
    assert locked == ["0.heads.0", "0.heads.1", "0.out"]
    many, locked = tries(Heads(6), monkeypatch)
    assert locked == [*(f"0.heads.{n}" for n in range(6)), "0.out"]
    assert many <= few + 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 10, 11, 20, 35, 36])
def test_of_any_two_numbers_each_is_in_a_set_without_the_other(count: int) -> None:
    sets = retrace._one_without_other(count)
    for a, b in permutations(range(count), 2):
        assert any(a in some and b not in some for some in sets)
    # Sperner: m sets tell apart m over m // 2 numbers, and no more.
    assert count <= len(list(combinations(range(len(sets)), len(sets) // 2)))
    if sets:
        fewer = len(sets) - 1
        assert count > len(list(combinations(range(fewer), fewer // 2)))


class Branches(nn.Module):
    """Pieces of equal sizes, which a list holds in some order; each goes its own way."""

    def __init__(self, sizes: list[int], order: Sequence[int]) -> None:
        super().__init__()
        self.sizes = [sizes[order.index(n)] for n in range(len(sizes))]
        self.order = order
        self.stem = nn.Conv2d(3, sum(sizes), 1)
        self.ways = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for n in sizes)
        self.out = nn.Conv2d(sum(sizes), 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.stem(x).split([self.sizes[n] for n in self.order], 1)
        return self.out(torch.cat([way(part) for way, part in zip(self.ways, parts)], 1))


ORDERED = [([8, 4, 4, 4], range(4)), ([5, 5], range(2)), ([4, 6, 4, 6], range(4))]


@pytest.mark.parametrize(
    ("sizes", "order"),
    [*ORDERED, *(([4, 4, 4], order) for order in permutations(range(3)))],
    ids=str,
)
def test_equal_numbers_of_a_list_count_the_axes_in_their_order(
    sizes: list[int], order: Sequence[int]
) -> None:
    model = randomise(Branches(sizes, order)).double().eval()
    x = torch.randn(2, 3, 5, 5).double()
    groups = thinet.find_groups(model, x)
    pieces = [g for g in groups if g.name.startswith("stem")]
    assert [(g.channels, g.locked) for g in pieces] == [(n, None) for n in sizes]
    # Of no two pieces do equally many stay.
    removed = {g.name: list(range(1 + n % (g.channels - 1))) for n, g in enumerate(pieces)}
    check(model, x, groups, removed, thinet.cut)


def test_a_call_that_a_rule_does_not_know_is_refused_by_name() -> None:
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            made = x.new_empty(len(x), 2)
            torch.mm(self.inner(x).relu(), self.out.weight.t(), out=made)
            return made + self.out.bias

    (inner,) = thinet.find_groups(Out().eval(), torch.randn(4, 3))
    assert inner.locked == (
        "aten.mm in the model itself was called in a way that its rule does not know"
    )


def test_a_copy_that_draws_random_numbers_leaves_those_to_come() -> None:
    class Draws(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            torch.rand(3)
            new = nn.Linear(self.in_features, self.out_features)
            new.load_state_dict(self.state_dict())
            return new

    model, x = nn.Sequential(Draws(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.randn(2, 3)
    before = torch.get_rng_state()
    thinet.cut(model, x, {"0": [0, 1]})
    assert torch.equal(torch.get_rng_state(), before)


def test_modules_and_paths_are_those_of_torch() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(2, 2), shared), nn.Identity())
    model.add_module("none", None)
    model[1].add_module("back", model[2])
    assert list(named_modules(model).items()) == list(model.named_modules())
