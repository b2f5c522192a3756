"""Sizes where no operation shows them: in tensors, in shapes of others, in what is not written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise
from thinet.errors import TraceError

torch.set_num_threads(1)


class Middle(nn.Module):
    """Something done to eight channels that nothing but the forward code knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.last = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(x, F.relu(self.first(x))))


class NewLikeTheInput(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[:, 2:4] = 1.0
        return h * made.gather(0, torch.zeros_like(h, dtype=torch.long))


class NewOfASize(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        made = x.new_ones(2, 8)
        made[1:, :4] = 3
        return h + made.gather(0, (h > 0.5).long())


class Scattered(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        made = torch.zeros_like(x)
        made[:, 2:4] = 1.0
        return h.scatter_add(0, torch.zeros_like(h).long(), made)


class SizeInATensor(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        return h / torch.tensor(float(h.shape[1]), dtype=h.dtype)


class SizeInANewTensor(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        return h / x.new_tensor([1.0, h.shape[1]]).sum()


class SizeInAComplexNumber(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        return (h * complex(h.shape[1], 0)).real


class SizeBoundsAWholeNumber(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        most = torch.tensor(float(h.shape[1]), dtype=h.dtype)
        count = (self.score(h).abs() * 1000 + 1000).ceil().clamp(max=most)
        return h / count.flatten()[0].item()


class WholeNumberWrittenOver(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        whole = (self.score(h).abs() * 10).ceil().flatten()
        one = whole[0]
        whole.mul_(h.sum(1))
        return h / one.item()


class AlikeUntilWritten(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        alike = x.new_ones(5).repeat(8, 1)
        alike[2:4] = 0.0
        return h * alike.gather(1, torch.zeros_like(h.t(), dtype=torch.long)).t()


class OnlyInTraining(Middle):
    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(8, 2)

    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        made = torch.zeros_like(x)
        made[:, 2:4] = 1
        gathered = made.gather(0, torch.zeros_like(h, dtype=torch.long))
        return (self.last(h), self.aside(h * gathered)) if self.training else self.last(h)  # type: ignore[return-value]


HIDING: tuple[Callable[[], Middle], ...] = (
    NewLikeTheInput,
    NewOfASize,
    Scattered,
    SizeInATensor,
    SizeInANewTensor,
    SizeInAComplexNumber,
    SizeBoundsAWholeNumber,
    WholeNumberWrittenOver,
    AlikeUntilWritten,
    OnlyInTraining,
)


@pytest.mark.parametrize("cls", HIDING, ids=lambda c: c.__name__)
def test_a_hidden_size_locks_its_channels(cls: Callable[[], Middle]) -> None:
    model = randomise(cls()).double().eval()
    groups = thinet.find_groups(model, torch.randn(5, 8).double())
    assert "first" not in {g.name for g in groups if g.locked is None}
    assert next(g.locked for g in groups if g.name == "first")


class OneStageOfAList(nn.Module):
    """All layers of a list are alike, and one is treated in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if place == 1:
                x = x * torch.cat([x.new_ones(4), x.new_full((4,), 2.0)])
        return x


def test_what_is_done_at_one_place_of_a_list_locks_only_that() -> None:
    body = OneStageOfAList()
    model = randomise(nn.Sequential(body, nn.Linear(8, 3))).double().eval()
    x = torch.randn(5, 8).double()
    groups = thinet.find_groups(model, x)
    free = [g.name for g in groups if g.locked is None]
    assert free == ["0.layers.0", "0.layers.2", "0.layers.3", "0.layers.4"]
    for name in free:
        check(model, x, groups, {name: [1, 4]}, thinet.cut)


class ReturnsConstants(nn.Module):
    """A loss that is none, as heads return in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.last(self.first(x).relu()), torch.tensor(0.0)


def test_a_constant_that_is_returned_locks_nothing() -> None:
    model, x = ReturnsConstants(), torch.randn(2, 4)
    groups = thinet.find_groups(model, x)
    assert [g.name for g in groups if g.locked is None] == ["first"]
    check(model, x, groups, {"first": [0, 3]}, thinet.cut)


class Marked(Tensor):
    """A class of tensors."""


class Subclassed(Middle):
    def middle(self, x: Tensor, h: Tensor) -> Tensor:
        return h.as_subclass(Marked) * 2


def test_tensors_of_other_classes_are_refused_by_name() -> None:
    with pytest.raises(TraceError, match="makes a Marked of a tensor"):
        thinet.find_groups(Subclassed(), torch.randn(5, 8))
