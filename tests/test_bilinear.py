"""`nn.Bilinear`: both inputs and the outputs can be cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import check, randomise

torch.set_num_threads(1)


class Pairs(nn.Module):
    """All products of two hidden vectors, or of one with itself."""

    def __init__(self, itself: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), None if itself else nn.Linear(3, 5)
        self.pairs = nn.Bilinear(6, 6 if itself else 5, 7, bias=bias)
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.a(x))
        b = a if self.b is None else torch.relu(self.b(x))
        return self.out(torch.relu(self.pairs(a, b)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)], ids=str)
def test_inputs_and_outputs_go(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    model, x = randomise(Pairs(bias=bias)).double().eval(), torch.randn(*shape).double()
    groups = thinet.find_groups(model, x)
    free = {g.name: (g.channels, g.consumers) for g in groups if g.locked is None}
    assert free == {"a": (6, ("pairs",)), "b": (5, ("pairs",)), "pairs": (7, ("out",))}
    check(model, x, groups, {"a": [0, 2], "b": [1], "pairs": [3, 4, 6]}, thinet.cut)


def test_a_vector_with_itself() -> None:
    torch.manual_seed(0)
    model, x = randomise(Pairs(itself=True)).double().eval(), torch.randn(4, 3).double()
    groups = thinet.find_groups(model, x)
    check(model, x, groups, {"a": [1, 5], "pairs": [0]}, thinet.cut)


def test_every_weight_is_one_multiply_add() -> None:
    model, x = Pairs().eval(), torch.randn(4, 3)
    assert thinet.count(model, x).by_module["pairs"].macs == 4 * 7 * 6 * 5
    small = thinet.cut(model, x, {"a": [0, 2], "b": [1, 3, 4], "pairs": [3, 4, 6]})
    assert thinet.count(small, x).by_module["pairs"].macs == 4 * 3 * 2 * 3
    assert str(small.pairs) == "Bilinear(in1_features=2, in2_features=3, out_features=3, bias=True)"


@pytest.mark.parametrize("repair", ["none", "scale", "full"])
def test_a_prune_passes_it(repair: str) -> None:
    torch.manual_seed(0)
    model = Pairs().eval()
    batches = [torch.randn(32, 3) for _ in range(4)]
    result = thinet.prune(model, batches[0], batches, budget=thinet.Budget(keep=0.5), repair=repair)
    assert {name: len(units) for name, units in result.plan.keep.items()} == {
        "a": 3, "b": 2, "pairs": 3,
    }  # fmt: skip
    assert bool(result.model(batches[0]).isfinite().all())
