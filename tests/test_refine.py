"""Two layers refitted together: their derivatives, what they reach, and what is left alone."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.nets import BasicResidualNet, ConvTransposeNet, DepthwiseNet, PlainVGG, SharedConvNet
from tests.oracle import randomise
from thinet.calibrate.layers import find_layers
from thinet.calibrate.ordering import in_order
from thinet.calibrate.pairs import find_pairs
from thinet.cut import apply_to_copy
from thinet.errors import OptionError
from thinet.joint import PairOutputs
from thinet.outcome import PruneReport
from thinet.plan import Plan
from thinet.refine import refine
from thinet.repair import RepairSettings
from thinet.report.rows import pruned_notes
from thinet.trace.analyse import analyse
from thinet.trace.interpret import Execution, dependencies
from thinet.trace.planning import make_plan


class MLP(nn.Module):
    """Linear layers around a GELU, on (n, tokens, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class InputsFirst(nn.Module):
    """The same with weights of (inputs, outputs), the first of them with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shift = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8))
        self.down = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.shift, x.flatten(0, 1), self.up).unflatten(0, x.shape[:2])
        return x + F.gelu(y) @ self.down


class InPlaceNet(nn.Module):
    """A producer without norm whose outputs are written over."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x), inplace=True))


class NoPairNet(nn.Module):
    """What the first layer makes goes to the output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return torch.cat([self.conv2(y.relu()), y], 1)


def example(cls: Any, images: int) -> Tensor:
    """Random inputs for one of the nets."""
    return torch.randn(images, *cls().shape[1:])


def cut_by_hand(
    model: nn.Module, keep: dict[str, list[int]], batches: Sequence[Tensor]
) -> tuple[nn.Module, Plan]:
    plan = make_plan(analyse(model, batches[0][:1]), model, keep)
    return apply_to_copy(model, plan).eval(), plan


def pairs_of(model: nn.Module, x: Tensor) -> dict[str, tuple[str, int]]:
    program = Execution(model).program(x)
    found = find_pairs(program, find_layers(program), dependencies(program))
    return {p.producer.weight: (p.consumer.weight, len(p.ops)) for p in found.values()}


def test_pairs_are_those_between_which_nothing_leaves() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert pairs_of(NoPairNet().eval(), x) == {}
    assert pairs_of(InPlaceNet().eval(), x) == {"conv1.weight": ("conv2.weight", 3)}
    assert pairs_of(MLP().eval(), torch.randn(2, 4, 5))["up.weight"][0] == "down.weight"


def test_a_depthwise_convolution_lies_between_the_layers_of_a_pair() -> None:
    found = pairs_of(DepthwiseNet().eval(), example(DepthwiseNet, 2))
    assert found["conv1.weight"][0] == "conv2.weight"


@pytest.mark.parametrize(
    ("cls", "shape"),
    [(InPlaceNet, (3, 3, 6, 6)), (MLP, (3, 4, 5)), (BasicResidualNet, None), (DepthwiseNet, None),
     (ConvTransposeNet, None), (InputsFirst, (3, 4, 5))],
)  # fmt: skip
def test_derivatives_are_those_of_differences(cls: Any, shape: Any) -> None:
    model = randomise(cls()).double().eval()
    x = torch.randn(shape) if shape else example(cls, 3)
    x = x.double()
    execution = Execution(model)
    program = execution.program(x)
    found = find_pairs(program, find_layers(program), dependencies(program))
    assert found
    with execution.started([x]) as lane:
        needs = dependencies(program)
        for index in in_order(program, needs, {i: p.needs for i, p in found.items()}):
            if index not in found:
                lane.step(index)
                continue
            pair = found[index]
            assert lane.done.issuperset(pair.needs)
            dim = -1 - pair.consumer.geometry.rank
            shape = list(pair.consumer.y.shape)
            gain = torch.rand(shape[dim], dtype=torch.float64) + 0.5
            zeros = torch.zeros(shape, dtype=torch.float64)
            outputs = PairOutputs(lane, execution.tensors, pair, [0], [zeros], gain)
            outputs.residuals()
            change = tuple(
                torch.randn(len(w), w[0].numel() + 1, dtype=torch.float64) for w in outputs.weights
            )
            step = 1e-5
            ahead = outputs.moved(change, step).residuals()[0]
            back = outputs.moved(change, -step).residuals()[0]
            measured = (back - ahead) / (2 * step)
            torch.testing.assert_close(outputs.jvp(0, change), measured, rtol=1e-5, atol=1e-7)
            other = torch.randn_like(zeros)
            transposed = outputs.vjp(0, other)
            free = [c.clone() for c in change]
            for n in range(2):  # an intercept without a place is no unknown
                if not outputs.free[n]:
                    free[n][:, -1] = 0
            left = float((outputs.jvp(0, tuple(free)) * other).sum())
            right = sum(float((a * b).sum()) for a, b in zip(free, transposed, strict=True))
            assert left == pytest.approx(right, rel=1e-9)
            lane.step(index)


def test_of_many_positions_each_nth_batch_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(InPlaceNet()).eval()
    batches = [torch.randn(4, 3, 6, 6) for _ in range(5)]
    small, plan = cut_by_hand(model, {"conv1": [0, 2]}, batches)
    thirds, wanted = copy.deepcopy(small), copy.deepcopy(small)
    refine(wanted, model, plan, batches[::3])
    monkeypatch.setattr(importlib.import_module("thinet.refine"), "POSITIONS", 5 * 4 * 36 // 3)
    refine(thirds, model, plan, batches)
    torch.testing.assert_close(thirds.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    assert not torch.equal(thirds.conv1.weight, small.conv1.weight)


def test_one_filter_learns_to_stand_in_for_two() -> None:
    """relu(a) + relu(b) of a, b >= 0 is relu(a + b): only a new producer can make up for a cut."""
    model = InPlaceNet()
    with torch.no_grad():
        for conv in (model.conv1, model.conv2):
            conv.weight.zero_()
        assert model.conv1.bias is not None
        model.conv1.bias.zero_()
        model.conv1.weight[0, 0, 1, 1] = model.conv1.weight[1, 1, 1, 1] = 1.0
        model.conv2.weight[:, :2, 1, 1] = 1.0
    batches = [torch.rand(8, 3, 6, 6), torch.rand(4, 3, 6, 6)]
    small, plan = cut_by_hand(model.eval(), {"conv1": [0]}, batches)
    best = copy.deepcopy(small)
    steps = [refine(small, model, plan, batches, iterations=40).errors for _ in range(4)]
    (first,), (last,) = steps[0].values(), steps[-1].values()
    x = torch.rand(5, 3, 6, 6)
    with torch.no_grad():
        wanted, answer, before = model(x), small(x), best(x)
    assert first[1] < 0.1 * first[0]
    assert last[1] < 1e-4 * first[0]
    assert float((answer - wanted).square().mean()) < 1e-3 * float(
        (before - wanted).square().mean()
    )


def test_the_error_is_that_of_the_block_behind_its_norm_and_shortcut() -> None:
    model = randomise(BasicResidualNet()).eval()
    batches = [example(BasicResidualNet, 6), example(BasicResidualNet, 3)]
    groups = {g.name: g for g in thinet.find_groups(model, batches[0][:1])}
    inner = next(g for g in groups.values() if g.locked is None and len(g.producers) == 1)
    small, plan = cut_by_hand(model, {inner.name: list(range(inner.channels // 2))}, batches)
    with torch.no_grad():  # as a repair leaves it: the intercept is in the norm
        for module in small.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.1 * torch.randn(module.num_features))  # type: ignore[union-attr]
    start = copy.deepcopy(small)
    told = refine(small, model, plan, batches)
    seen: dict[str, list[Tensor]] = {}
    for name, net in (("dense", model), ("start", start), ("small", small)):
        seen[name] = []
        consumer = inner.consumers[0]
        path = consumer.replace("conv", "bn")
        net.get_submodule(path).register_forward_hook(
            lambda _, __, y, name=name: seen[name].append(y.detach())
        )
    for net in (model, start, small):
        with torch.no_grad():
            net(batches[0])
            net(batches[1])
    ((name, errors),) = told.errors.items()
    assert inner.consumers[0] in name
    for which, error in (("start", errors[0]), ("small", errors[1])):
        missing = torch.cat(seen["dense"]) - torch.cat(seen[which])
        assert float(missing.square().mean()) == pytest.approx(error, rel=1e-3)
    assert errors[1] < errors[0]


def test_refining_never_makes_worse_and_leaves_the_dense_network() -> None:
    model = randomise(PlainVGG()).eval()
    batches = [example(PlainVGG, 6) for _ in range(2)]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    groups = [g for g in thinet.find_groups(model, batches[0][:1]) if g.locked is None]
    keep = {g.name: list(range(0, g.channels, 2)) for g in groups}
    small, plan = cut_by_hand(model, keep, batches)
    told = refine(small, model, plan, batches)
    assert told.errors
    assert all(after < before for before, after in told.errors.values())
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())


def test_shared_weights_are_left_alone_with_the_reason() -> None:
    model = randomise(SharedConvNet()).eval()
    batches = [example(SharedConvNet, 4)]
    groups = [g for g in thinet.find_groups(model, batches[0][:1]) if g.locked is None]
    small, plan = cut_by_hand(model, {g.name: list(range(2)) for g in groups}, batches)
    before = {name: t.clone() for name, t in small.state_dict().items()}
    told = refine(small, model, plan, batches)
    for name in told.skipped:
        assert "more than once" in told.skipped[name]
    touched = {layer for name in told.errors for layer in name.split(" -> ")}
    for name, tensor in small.state_dict().items():
        module = name.rpartition(".")[0]
        if module not in touched and "bn" not in module:
            assert torch.equal(before[name], tensor), name


def test_settings_say_how_many_iterations() -> None:
    model = randomise(PlainVGG()).eval()
    batches = [example(PlainVGG, 8)]

    def pruned(refine: int | None, budget: thinet.Budget) -> PruneReport:
        return thinet.prune(
            model, batches[0][:1], batches, budget=budget, divisor=1,
            repair_settings=RepairSettings(refine=refine),
        ).report  # fmt: skip

    keep, macs = thinet.Budget(keep=0.5), thinet.Budget(macs=0.6)
    for budget in (keep, macs):
        assert pruned(0, budget).refined == {}
        assert "refining" not in pruned(0, budget).seconds
        assert pruned(2, budget).refined
    assert pruned(None, macs).refined  # a pass over so little is cheap
    assert not pruned(None, keep).refined  # as the paper
    with pytest.raises(OptionError, match="refine"):
        RepairSettings(refine=-1)
    with pytest.raises(OptionError, match="every"):
        RepairSettings(every=0)


def test_a_pass_that_costs_too_much_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("thinet.prune"), "AFFORDED", 10.0)
    model = randomise(PlainVGG()).eval()
    batches = [example(PlainVGG, 4)]
    budget = thinet.Budget(macs=0.6)
    report = thinet.prune(model, batches[0][:1], batches, budget=budget, divisor=1).report
    assert not report.refined
    assert any("refine=5" in note for note in report.notes)


def test_a_dropout_that_drops_nothing_is_none() -> None:
    def net(between: nn.Module) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(10, 16), nn.Linear(16, 32), nn.GELU(), between, nn.Linear(32, 16), nn.ReLU(),
            nn.Linear(16, 4),
        ).eval()  # fmt: skip

    x = torch.randn(200, 10)
    asked = {"budget": thinet.Budget(keep={"1": 10}), "repair_settings": RepairSettings(refine=5)}
    want = thinet.prune(net(nn.Identity()), x, x, **asked)
    found = thinet.prune(net(nn.Dropout(0.0)), x, x, **asked)
    assert found.report.refined == want.report.refined and want.report.refined
    for ours, theirs in zip(found.model.parameters(), want.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    left = thinet.prune(net(nn.Dropout(0.5)), x, x, **asked).report
    reason = "4 is trained behind dropout, which a joint refit would not bear"
    assert not left.refined and left.not_refined == {"1 -> 4": reason}
    assert f"1 -> 4 were not refitted together: {reason}" in pruned_notes(left)
    many = replace(left, not_refined={f"{n} -> {n + 1}": "no step" for n in range(6)})
    assert "3 more pairs were not, for such reasons" in pruned_notes(many)
