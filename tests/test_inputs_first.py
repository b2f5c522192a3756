"""Weights whose first dimension is that of the inputs: transposed convolutions, and x @ W."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from tests.test_repair import close, images, least_squares, repaired, rows
from thinet.calibrate.collect import collect
from thinet.calibrate.layers import find_layers
from thinet.calibrate.patches import Geometry, output_rows, patches, sample_positions
from thinet.calibrate.statistics import group_statistics
from thinet.repair import Repaired
from thinet.trace.analyse import analyse
from thinet.trace.record import record

CONVOLVE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CASES = {  # kernel, stride, padding, dilation, output_padding, size
    "k2s2": ((2, 2), (2, 2), (0, 0), (1, 1), (0, 0), (3, 4)),
    "k4s2p1": ((4, 4), (2, 2), (1, 1), (1, 1), (0, 0), (3, 4)),
    "k3s2p1o1": ((3, 3), (2, 2), (1, 1), (1, 1), (1, 1), (4, 3)),
    "uneven": ((3, 1), (1, 3), (2, 0), (2, 1), (0, 2), (5, 3)),
    "cropped": ((1, 1), (2, 2), (1, 1), (1, 1), (1, 0), (4, 4)),
    "line": ((5,), (3,), (2,), (1,), (1,), (6,)),
    "volume": ((2, 3, 3), (2, 1, 2), (0, 1, 1), (1, 1, 1), (0, 0, 1), (2, 3, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampled", [False, True])
def test_patches_times_the_turned_weight_are_the_transposed_convolution(
    case: str, sampled: bool
) -> None:
    kernel, stride, padding, dilation, extra, size = CASES[case]
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(3, 4, *kernel, dtype=torch.float64)
    y = CONVOLVE[len(kernel)](x, weight, None, stride, padding, extra, 1, dilation)
    geometry = Geometry.transposed(kernel, stride, padding, dilation, extra)
    assert geometry.output_size(size) == y.shape[2:]
    positions = None
    if sampled:
        positions = sample_positions(2, y[0, 0].numel(), 11, torch.Generator().manual_seed(0))
    turned = weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))
    made = patches(x, geometry, positions) @ turned.flatten(1).T
    torch.testing.assert_close(made, output_rows(y, geometry, positions))


class Up(nn.Module):
    """first -> relu -> transposed convolution -> last."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.up = nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1, bias=bias)
        self.last = nn.Conv2d(5, 4, 1)

    def inner(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(self.inner(x))))


class Product(nn.Module):
    """GPT-2's layers: weights of (inputs, outputs), with a bias and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 7))
        self.shift = nn.Parameter(torch.randn(7))
        self.second = nn.Parameter(torch.randn(7, 5))
        self.third = nn.Linear(5, 4)

    def inner(self, x: Tensor) -> Tensor:
        return F.gelu(torch.addmm(self.shift, x.flatten(0, -2), self.first))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) @ self.second
        return self.third(F.relu(y)).unflatten(0, x.shape[:-1])


class Summed(nn.Module):
    """The same sums written as einsum, with the outputs first and with the inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 1)
        self.second = nn.Parameter(torch.randn(5, 7))
        self.third = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)).movedim(1, -1)
        y = torch.einsum("bhwc,dc->bhwd", y, self.second)
        return torch.einsum("bhwc,cd->bhwd", F.relu(y), self.third)


def columns(x: Tensor, up: nn.ConvTranspose2d) -> Tensor:
    """(rows, inputs * taps): what a weight of a single one makes, for each place of that one."""
    taps = up.weight[0, 0].numel()
    ones = torch.eye(taps).view(taps, 1, *up.weight.shape[2:])
    made = [
        F.conv_transpose2d(
            x[:, c : c + 1], one[None], None, up.stride, up.padding, up.output_padding
        )
        for c in range(x.shape[1])
        for one in ones
    ]
    return rows(torch.cat(made, 1))


def test_they_are_layers_unless_they_have_groups() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 1)
    )
    found = find_layers(record(model, torch.randn(2, 3, 4, 4))).values()
    assert [(layer.weight, layer.inputs_first) for layer in found] == [
        ("0.weight", True), ("2.weight", False)
    ]  # fmt: skip
    found = find_layers(record(Product(), torch.randn(2, 6, 3))).values()
    assert [(layer.weight, layer.bias, layer.inputs_first) for layer in found] == [
        ("first", "shift", True), ("second", None, True), ("third.weight", "third.bias", False)
    ]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_transposed_convolution_is_refitted_by_least_squares(bias: bool) -> None:
    model, batches, kept = randomise(Up(bias)).eval(), images(), [0, 2, 5]
    small, report = repaired(model, {"first": kept}, batches)
    assert report == Repaired(("up", "last"), {})
    y = model.inner(torch.cat(batches))
    phi, target = columns(y[:, kept], model.up), rows(model.up(y))
    weight, shift = least_squares(phi, target, intercept=bias)
    close(small.up.weight.transpose(0, 1).flatten(1), weight)
    if bias:
        close(small.up.bias, shift)


@torch.no_grad()
def test_one_that_loses_outputs_too_keeps_the_right_targets() -> None:
    model, batches = randomise(Up()).eval(), images()
    keep = {"first": [0, 2, 5], "up": [1, 2, 4]}
    small, report = repaired(model, keep, batches)
    assert report == Repaired(("up", "last"), {})
    y = model.inner(torch.cat(batches))
    target = rows(model.up(y))[:, keep["up"]]
    weight, shift = least_squares(columns(y[:, keep["first"]], model.up), target)
    close(small.up.weight.transpose(0, 1).flatten(1), weight)
    close(small.up.bias, shift)


@torch.no_grad()
def test_a_product_is_refitted_by_least_squares() -> None:
    model, batches = randomise(Product()).eval(), [torch.randn(9, 6, 3), torch.randn(4, 6, 3)]
    kept, left = [0, 2, 3, 6], [1, 2, 4]
    small, report = repaired(model, {"first": kept, "second": left}, batches)
    assert report == Repaired(("second", "third"), {})
    y = model.inner(torch.cat(batches))
    weight, _ = least_squares(y[:, kept], (y @ model.second)[:, left], intercept=False)
    close(small.second.T, weight)
    assert small.second.shape == (4, 3) and small.first.shape == (3, 4)
    assert torch.equal(small.first, model.first[:, kept])


@torch.no_grad()
def test_sums_by_einsum_are_refitted_by_least_squares() -> None:
    model, batches = randomise(Summed()).eval(), images()
    found = find_layers(record(model, batches[0])).values()
    assert [(layer.weight, layer.inputs_first) for layer in found] == [
        ("first.weight", False), ("second", False), ("third", True)
    ]  # fmt: skip
    kept, left = [0, 2, 3, 6], [1, 2, 4]
    small, report = repaired(model, {"first": kept, "second": left}, batches)
    assert report == Repaired(("second", "third"), {})
    x = torch.cat(batches)
    y = rows(F.relu(model.first(x)))
    weight, _ = least_squares(y[:, kept], (y @ model.second.T)[:, left], intercept=False)
    close(small.second, weight)
    z = F.relu(y[:, kept] @ small.second.T)
    target = F.relu(y @ model.second.T) @ model.third
    close(small.third.T, least_squares(z, target, intercept=False)[0], 1e-3)


@torch.no_grad()
def test_a_view_that_is_not_the_whole_matrix_is_no_weight() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.folded = nn.Linear(3, 8), nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.first(x)) @ self.folded.view(8, 4)

    found = find_layers(record(Folded(), torch.randn(2, 3))).values()
    assert [layer.weight for layer in found] == ["first.weight"]


@torch.no_grad()
def test_consumers_alone_are_told_by_their_inputs() -> None:
    model, batches = randomise(Up()).eval(), images()
    only = thinet.RepairSettings(ridge=0.0, layers="consumers")
    _, report = repaired(model, {"first": [0, 2, 5]}, batches, settings=only)
    assert report.refitted == ("up",)
    _, report = repaired(model, {"up": [0, 2]}, batches, settings=only)
    assert report.refitted == ("last",)


@torch.no_grad()
def test_thinet_sums_what_each_channel_makes_of_the_output() -> None:
    model, x = randomise(Up()).eval(), torch.randn(6, 3, 4, 5)
    analysis = analyse(model, x[:1])
    group = analysis.group("first")
    seen = collect(model, [x], program=analysis.program, groups=[group])
    stats = group_statistics(model, group, seen)
    y = model.inner(x)
    parts = torch.stack([
        rows(F.conv_transpose2d(y[:, c : c + 1], model.up.weight[c : c + 1], None, 2, 1, 1))
        for c in range(6)
    ]).double()  # fmt: skip
    energy = parts.sum(0).var(0, correction=0).sum()
    expected = torch.einsum("cro,dro->cd", parts, parts) / parts.shape[1] / energy
    assert stats.gram is not None
    torch.testing.assert_close(stats.gram, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("repair", ["scale", "full"])
@pytest.mark.parametrize("criterion", ["thinet", "block-obs", "random"])
def test_dead_channels_before_one_go_for_nothing(repair: Any, criterion: str) -> None:
    model, x = randomise(Up()).eval(), torch.randn(40, 3, 6, 6)
    model.first.weight[[1, 3, 4]] = 0
    model.first.bias[[1, 3, 4]] = -1
    found = thinet.prune(
        model, x[:1], [x], criterion=criterion, repair=repair, only="first",
        budget=thinet.Budget(keep=0.5), widths="uniform", divisor=1,
    )  # fmt: skip
    assert found.model.first.weight.shape[0] == 3
    if criterion != "random":
        assert found.plan.keep["first"] == (0, 2, 5)
        close(found.model(x), model(x))
    assert "first" not in str(found.report.notes)
    assert not found.report.not_refitted


@torch.no_grad()
@pytest.mark.parametrize("net", [Up, Product, Summed])
def test_the_joint_refit_takes_them_on_either_side(net: Any) -> None:
    torch.manual_seed(1)
    model = randomise(net()).eval()
    x = torch.randn(64, 6, 3) if net is Product else torch.randn(48, 3, 6, 6)
    errors: dict[int, float] = {}
    for refine in (0, 8):
        found = thinet.prune(
            model, x[:1], [x[:32], x[32:]], budget=thinet.Budget(keep=0.6), divisor=1,
            repair_settings=thinet.RepairSettings(refine=refine),
        )  # fmt: skip
        errors[refine] = float((found.model(x) - model(x)).square().mean())
        if refine:
            pairs = {
                Up: {"first -> up", "up -> last"},
                Product: {"first -> second", "second -> third"},
                Summed: {"first -> second", "second -> third"},
            }
            assert set(found.report.refined) == pairs[net]
            assert all(after < before for before, after in found.report.refined.values())
    assert errors[8] < errors[0]


def test_a_weight_norm_says_how_its_inputs_can_be_cut() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 4, 3))
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), normed, nn.Conv1d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 12)
    locked = thinet.find_groups(model, x)[0].locked
    assert locked is not None and "remove_parametrizations" in locked
    nn.utils.parametrize.remove_parametrizations(normed, "weight")
    assert thinet.find_groups(model, x)[0].locked is None


class BothWays(nn.Module):
    """One weight read as (outputs, inputs) and as (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 6)
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.c, self.d = nn.Linear(6, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        there = F.relu(F.linear(F.relu(self.a(x)), self.weight))
        back = F.relu(F.relu(self.b(x)) @ self.weight)
        return self.c(there) + self.d(back)


class TokenMixer(nn.Module):
    """Products whose rows are the channels that a cut takes."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.a, self.o = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 3, 1)
        self.mix = nn.Parameter(torch.randn(6, 7) * 0.4, requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(F.relu(self.a(x)) @ self.mix))


class LowRank(nn.Module):
    """A weight that is a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(3, 8), nn.Linear(5, 3)
        self.left, self.right = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(F.relu(self.a(x)) @ (self.left.t() @ self.right)))


def pruned(model: nn.Module, x: Tensor, keep: Any = 0.5, **options: Any) -> thinet.PruneResult:
    settings = thinet.RepairSettings(ridge=1e-6, refine=options.pop("refine", 0))
    return thinet.prune(
        model.eval(), x[:2], [x], budget=thinet.Budget(keep=keep), divisor=1,
        repair_settings=settings, **options,
    )  # fmt: skip


@torch.no_grad()
def test_a_weight_read_both_ways_is_left_alone() -> None:
    report = pruned(BothWays(), torch.randn(60, 5)).report
    assert report.not_refitted == {"weight": "its weights are used more than once"}
    assert set(report.refitted) == {"c", "d"}


@torch.no_grad()
@pytest.mark.parametrize("images", [40, 3000])  # more rows than are looked at
def test_a_layer_whose_rows_are_cut_is_left_alone(images: int) -> None:
    torch.manual_seed(0)
    model, x = TokenMixer(True), torch.randn(images, 3, 6)
    found = pruned(model, x, refine=3)
    assert found.report.not_refitted == {"mix": "the cut takes away some of the rows that it sees"}
    assert found.report.refitted == ("o",)
    assert torch.equal(found.model.mix, model.mix)
    bare = pruned(model, x, repair="none").model
    assert (found.model(x) - model(x)).square().mean() < (bare(x) - model(x)).square().mean()


@torch.no_grad()
def test_a_product_of_parameters_is_no_layer() -> None:
    model, x = LowRank(), torch.randn(60, 3)
    found = find_layers(record(model, x[:2])).values()
    assert [layer.weight for layer in found] == ["a.weight", "o.weight"]
    report = pruned(model, x, {"a": 4}, criterion="l2").report
    assert report.refitted == ("o",)
    assert list(report.not_refitted) == ["the model"]


@torch.no_grad()
def test_what_is_fixed_lies_between_the_ends_of_a_pair() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(5, 12), nn.Linear(12, 3)
            self.register_buffer("turn", torch.randn(12, 12) * 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(F.relu(self.a(x) @ self.turn))

    torch.manual_seed(0)
    report = pruned(Fixed(), torch.randn(100, 5), {"a": 6}, refine=5).report
    ((pair, (before, after)),) = report.refined.items()
    assert pair == "a -> o" and after < before
    assert report.not_refitted == {
        "turn": "its weights or its bias are a buffer, which is not trained"
    }


@torch.no_grad()
def test_the_papers_draws_are_those_of_each_row_in_an_einsum_too() -> None:
    class Tokens(nn.Module):
        def __init__(self, summed: bool) -> None:
            super().__init__()
            self.summed = summed
            self.a, self.weight = nn.Linear(5, 12), nn.Parameter(torch.randn(12, 10))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return torch.einsum("btc,cd->btd", y, self.weight) if self.summed else y @ self.weight

    x, grams = torch.randn(300, 4, 5), []
    state = Tokens(False).state_dict()
    for summed in (False, True):
        model = Tokens(summed)
        model.load_state_dict(state)
        analysis = analyse(model, x[:2])
        group = analysis.group("a")
        for sampling in ("exact", "paper"):
            seen = collect(model, [x], program=analysis.program, groups=[group], sampling=sampling)
            stats = group_statistics(model, group, seen)
            assert stats.gram is not None
            grams.append(stats.gram)
    torch.testing.assert_close(grams[0], grams[2], rtol=1e-4, atol=1e-5)
    for drawn in (grams[1], grams[3]):
        assert (drawn - grams[0]).norm() < 0.15 * grams[0].norm()


@torch.no_grad()
def test_a_weight_cut_to_one_entry_knows_its_sides() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(4, 4).abs())
            self.o = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.bmm(F.relu(self.a(x))[None], self.weight[None])[0])

    torch.manual_seed(3)
    model, x = Single().eval(), torch.randn(300, 5)
    small, _ = repaired(model, {"a": [0], "weight": [3]}, [x])
    y = F.relu(model.a(x))
    weight, _ = least_squares(y[:, [0]], (y @ model.weight)[:, [3]], intercept=False)
    close(small.weight, weight)


@torch.no_grad()
def test_a_bias_that_is_not_its_own_or_not_trained_is_left_alone() -> None:
    class Biased(nn.Module):
        def __init__(self, bias: Tensor, trained: bool) -> None:
            super().__init__()
            self.a, self.weight = nn.Linear(5, 8), nn.Parameter(torch.randn(8, 6))
            self.o = nn.Linear(6, 3)
            if trained:
                self.bias = nn.Parameter(bias)
            else:
                self.register_buffer("bias", bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.addmm(self.bias, F.relu(self.a(x)), self.weight).relu())

    x = torch.randn(60, 5)
    one = pruned(Biased(torch.randn(1), True), x, {"a": 4}, criterion="l2")
    assert one.report.refitted == ("o",) and one.model.bias.shape == (1,)
    fixed = Biased(torch.randn(6), False)
    found = pruned(fixed, x, {"a": 4})
    assert found.report.refitted == ("o",)
    assert found.report.not_refitted["weight"].startswith("its weights or its bias are a buffer")
    assert torch.equal(found.model.bias, fixed.bias)


@torch.no_grad()
def test_layers_over_a_table_of_their_own_are_measured_and_refitted() -> None:
    class Table(nn.Module):
        """Relative positions through two layers, as in Swin v2."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 8), nn.Linear(8, 6)
            self.register_buffer("table", torch.randn(40, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.second(F.relu(self.first(self.table))).T

    torch.manual_seed(0)
    model, x = Table().eval(), torch.randn(12, 6)
    found = pruned(model, x, {"first": 4})
    assert found.report.refitted == ("second",) and found.report.notes == ()
    y = F.relu(model.first(model.table))
    kept = list(found.plan.keep["first"])
    weight, _ = least_squares(y[:, kept], model.second(y))
    close(found.model.second.weight, weight, 1e-2)
