"""Batches that take another way through the model by what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from thinet.calibrate.ways import questions, same_way
from thinet.errors import CalibrationError
from thinet.trace.record import record

HALF = thinet.Budget(keep=0.5)


class Masked(nn.Module):
    """Where all is there no mask is made, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        y = self.first(x).relu()
        if not there.all():
            y = y * there[..., None]
        return self.second(y).mean(1)


class Counts(nn.Module):
    """Each number of the input is another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) * x.abs().max().item()


def batch(count: int, padded: bool, seed: int, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    there = torch.ones(count, length)
    if padded:
        there[:, -1] = 0
    return {"x": torch.randn(count, length, 6, generator=generator), "there": there}


def chosen(
    kinds: str, sizes: dict[str, int] | None = None, example: str = "w"
) -> tuple[list[int], tuple[str, ...]]:
    """What is chosen of batches that are padded (p), whole (w) or longer and padded (P)."""
    sizes = sizes or {}
    batches = [
        batch(sizes.get(kind, 4), kind in "pP", n, length=7 if kind == "P" else 5)
        for n, kind in enumerate(kinds)
    ]
    model, inputs = Masked().eval(), batch(2, example == "p", 99)
    return same_way(model, inputs, record(model, inputs), batches)


def test_what_asks_no_number_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    program = record(model, torch.randn(2, 6))
    assert questions(program) == []
    monkeypatch.setattr("thinet.calibrate.ways.Execution", None)  # nothing is recorded or run
    assert same_way(model, torch.randn(2, 6), program, [torch.randn(2, 6)] * 3) == ([0, 1, 2], ())


@pytest.mark.parametrize(
    ("kinds", "numbers"),
    [
        ("www", [0, 1, 2]),
        ("ppp", [0, 1, 2]),
        ("wpp", [1, 2]),
        ("pwpw", [1, 3]),  # as many: the example's
        ("wwpwPw", [0, 1, 3, 5]),
        ("wpPp", [1, 2, 3]),  # of any length
    ],
)
def test_the_way_of_most_images_is_taken(kinds: str, numbers: list[int]) -> None:
    found, notes = chosen(kinds)
    assert found == numbers
    left = len(kinds) - len(numbers)
    assert [n.startswith(f"{left} of {len(kinds)} calibration batches were left") for n in notes] \
        == [True] * bool(left)  # fmt: skip
    assert all("aten._local_scalar_dense" in note for note in notes)


def test_images_count_and_not_batches() -> None:
    assert chosen("wwp", {"p": 30})[0] == [2]


def test_example_inputs_of_another_way_are_told() -> None:
    numbers, (note,) = chosen("wpp")
    assert numbers == [1, 2] and note.endswith("give some like these batches")
    numbers, (note,) = chosen("wpp", example="p")
    assert numbers == [1, 2] and note.endswith("are all used")
    assert chosen("wpwp", example="p")[0] == [1, 3]


def test_numbers_that_always_differ_are_refused() -> None:
    model = Counts().eval()
    batches = [torch.randn(4, 6) * (n + 1) for n in range(5)]
    with pytest.raises(CalibrationError, match=r"take 5 or more ways .* none of them half"):
        thinet.prune(model, batches[0], batches, budget=HALF)
    thinet.prune(model, batches[0], batches[:1], budget=HALF)


@pytest.mark.parametrize("options", [{}, {"criterion": "taylor"}, {"loss_aware": True}])
def test_a_prune_is_that_of_the_batches_that_are_alike(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    padded, whole = [batch(8, True, n) for n in range(3)], batch(8, False, 7)
    if options:  # which read targets too
        alike = [(b, torch.arange(8) % 3) for b in padded]
        mixed = [alike[0], (whole, torch.zeros(8, dtype=torch.long)), *alike[1:]]
    else:
        alike, mixed = padded, [padded[0], whole, *padded[1:]]
    example = batch(2, False, 3)
    want = thinet.prune(model, example, alike, budget=HALF, **options)
    found = thinet.prune(model, example, mixed, budget=HALF, **options)
    assert found.plan.keep == want.plan.keep and not want.report.notes
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor)
    (note,) = found.report.notes
    assert note.startswith("1 of 4 calibration batches were left out")
