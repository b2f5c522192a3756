"""Repairs against least squares in float64 on the samples themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from thinet import dual, refit
from thinet.calibrate.collect import collect
from thinet.calibrate.layers import dropouts, find_layers
from thinet.calibrate.rows import Rows
from thinet.cut import apply_to_copy
from thinet.errors import OptionError, RepairError
from thinet.repair import Repaired, RepairSettings, repair_full, repair_scale
from thinet.store import Store
from thinet.trace.analyse import analyse
from thinet.trace.interpret import Execution
from thinet.trace.planning import make_plan

EXACT = RepairSettings(ridge=0.0)


def images(count: int = 24, size: int = 6) -> list[Tensor]:
    return list(torch.randn(count, 3, size, size).split([count // 3, count - count // 3]))


def repaired(
    model: nn.Module,
    keep: dict[str, list[int]],
    batches: Sequence[Tensor],
    how: str = "full",
    settings: RepairSettings = EXACT,
    store: Store | None = None,
) -> tuple[Any, Repaired]:
    """The cut and repaired model; the dense one must come out as it went in."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    analysis = analyse(model, batches[0][:1])
    groups = [analysis.group(name) for name in keep]
    assert all(g.locked is None for g in groups), [g.locked for g in groups]
    seen = collect(
        model,
        batches,
        program=analysis.program,
        groups=groups,
        targets=how == "full",
        shortcuts=settings.shortcut,
        rows=Rows(per_column=0, least=10**9),
        store=store,
    )
    plan = make_plan(analysis, model, keep)
    small = apply_to_copy(model, plan)
    if how == "full":
        report = repair_full(small, plan, seen, batches, settings=settings, store=store)
    else:
        report = repair_scale(small, model, groups, plan, seen)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    return small.eval(), report


def least_squares(phi: Tensor, target: Tensor, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """(outputs, columns) and (outputs,) by numpy in float64."""
    a = phi.double().numpy()
    if intercept:
        a = np.hstack([a, np.ones((len(a), 1))])
    solution = np.linalg.lstsq(a, target.double().numpy(), rcond=None)[0].T
    if not intercept:
        return torch.from_numpy(solution), torch.zeros(len(solution), dtype=torch.float64)
    return torch.from_numpy(solution[:, :-1]), torch.from_numpy(solution[:, -1])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def unfolded(x: Tensor, kernel: int = 3, padding: int = 1) -> Tensor:
    return F.unfold(x, kernel, padding=padding).transpose(1, 2).flatten(0, 1)


def rows(y: Tensor) -> Tensor:
    return y.movedim(1, -1).flatten(0, -2)


class Two(nn.Module):
    """first -> (relu) -> second: the smallest network with a consumer."""

    def __init__(self, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.second = nn.Conv2d(6, 4, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(F.relu(self.first(x))))


class Deep(nn.Module):
    """Three linear layers in a row, two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Residual(nn.Module):
    """Two blocks on one stream; the stream itself is a group."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 3, 1)
        self.inplace = inplace

    def stream(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        z = self.bn(self.conv2(F.relu(self.conv1(y))))
        if self.inplace:
            z += y
        else:
            z = z + y
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stream(x))


# --- none and scale -------------------------------------------------------------------------


def test_none_is_the_bare_cut() -> None:
    model = randomise(Two())
    batches = images()
    result = thinet.prune(
        model, batches[0][:1], batches, budget=thinet.Budget(keep=0.5), repair="none"
    )
    bare = thinet.cut(model, batches[0][:1], dict(result.plan.keep))
    assert result.report.refitted == ()
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), bare.parameters()))


def scalars(x: Tensor, kept: list[int]) -> Tensor:
    """ThiNet's eq. 7 on samples: x is (rows, outputs, units)."""
    flat = x.double().flatten(0, 1)
    solution = np.linalg.lstsq(flat[:, kept].numpy(), flat.sum(1).numpy(), rcond=None)[0]
    return torch.from_numpy(solution)


@torch.no_grad()
def test_scale_is_the_papers_least_squares_folded_into_the_weights() -> None:
    model, batches, kept = randomise(Two(norm=True)).eval(), images(), [0, 2, 5]
    small, report = repaired(model, {"first": kept}, batches, "scale")
    phi = unfolded(F.relu(model.first(torch.cat(batches)))).view(-1, 1, 6, 9)
    x = (phi * model.second.weight.flatten(2)).sum(-1)
    weight = model.second.weight[:, kept] * scalars(x, kept).view(1, -1, 1, 1).float()
    close(small.second.weight, weight)
    assert torch.equal(small.second.bias, model.second.bias)
    assert report == Repaired(("second",), {})


@torch.no_grad()
def test_scale_behind_a_flatten_scales_all_columns_of_a_channel() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)))
    batches, kept = images(size=2), [1, 2]
    small, _ = repaired(model, {"0": kept}, batches, "scale")
    phi = model[:3](torch.cat(batches)).view(-1, 1, 4, 4)
    weight = model[3].weight.view(1, 3, 4, 4)
    w = scalars((phi * weight).sum(-1), kept).float()
    close(small[3].weight.view(3, 2, 4), weight[0][:, kept] * w.view(1, -1, 1))


@torch.no_grad()
def test_scale_of_parts_of_a_concatenation_leaves_the_other_part() -> None:
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)
            self.head = nn.Conv2d(7, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x), self.right(x)], 1))

    model, batches = randomise(Concat()), images()
    keep = {"left": [0, 2], "right": [1, 2, 3]}
    small, report = repaired(model, keep, batches, "scale")
    x = torch.cat(batches)
    phi = rows(torch.cat([model.left(x), model.right(x)], 1))
    parts = phi[:, None] * model.head.weight.flatten(1)
    left, right = scalars(parts[:, :, :3], keep["left"]), scalars(parts[:, :, 3:], keep["right"])
    stay = [0, 2, 4, 5, 6]
    expected = model.head.weight.flatten(1)[:, stay] * torch.cat([left, right]).float()
    close(small.head.weight.flatten(1), expected)
    assert report.refitted == ("head",)


@torch.no_grad()
def test_scale_through_a_grouped_consumer() -> None:
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2), nn.Conv2d(6, 2, 1)
        )
    )
    batches = images()
    analysis = analyse(model, batches[0][:1])
    group = analysis.group("0")
    kept = list(range(0, group.channels, 2))
    small, report = repaired(model, {"0": kept}, batches, "scale")
    if not report.refitted:
        assert report.skipped
        return
    phi = rows(model[:2](torch.cat(batches)))
    weight = torch.zeros(6, 8)
    weight[:3, :4], weight[3:, 4:] = model[2].weight[:3, :, 0, 0], model[2].weight[3:, :, 0, 0]
    per_channel = phi[:, None] * weight
    (site,) = group.sites
    units = torch.tensor(site.units)
    per_unit = torch.zeros(*per_channel.shape[:2], group.channels).index_add_(2, units, per_channel)
    w = scalars(per_unit, kept)
    inner = [c for c in range(4) if site.units[c] in kept]
    scale = torch.tensor([float(w[kept.index(site.units[c])]) for c in inner])
    close(small[2].weight[:, :, 0, 0], model[2].weight[:, inner, 0, 0] * scale)


def test_scale_leaves_a_weight_that_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.head(F.relu(y)) + self.head(torch.sigmoid(y))

    model = randomise(Twice())
    small, report = repaired(model, {"first": [0, 3]}, images(), "scale")
    assert torch.equal(small.head.weight, model.head.weight[:, [0, 3]])
    assert report == Repaired((), {"head": "its weights are used more than once"})


# --- full -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("bias", "norm"), [(True, False), (True, True), (False, True), (False, False)]
)
def test_full_is_least_squares_with_the_intercept_where_it_can_go(bias: bool, norm: bool) -> None:
    model, batches, kept = randomise(Two(bias, norm)).eval(), images(), [0, 2, 5]
    small, report = repaired(model, {"first": kept}, batches)
    y = F.relu(model.first(torch.cat(batches)))
    target = rows(model.second(y))
    weight, shift = least_squares(unfolded(y[:, kept]), target, intercept=bias or norm)
    close(small.second.weight.flatten(1), weight)
    if bias:
        close(small.second.bias, shift)
    if norm:
        mean = model.norm.running_mean - (0 if bias else shift)
        close(small.norm.running_mean, mean)
        assert torch.equal(small.norm.running_var, model.norm.running_var)
    assert report == Repaired(("second",), {})
    residual = F.mse_loss(rows(small.second(y[:, kept])), target)
    bare = thinet.cut(model, batches[0][:1], {"first": kept})
    assert bias or norm or residual < F.mse_loss(rows(bare.second(y[:, kept])), target)


@torch.no_grad()
def test_the_ridge_pulls_towards_the_old_weights() -> None:
    model, batches, kept = randomise(Two()).eval(), images(), [0, 2, 5]
    y = F.relu(model.first(torch.cat(batches)))
    phi, target = unfolded(y[:, kept]).double(), rows(model.second(y)).double()
    old = model.second.weight[:, kept].flatten(1).double()
    centred, aim = phi - phi.mean(0), target - target.mean(0)
    system = centred.T @ centred / len(phi)
    for ridge in (1e-3, 0.3, 1e6):
        small, _ = repaired(model, {"first": kept}, batches, settings=RepairSettings(ridge=ridge))
        pull = ridge * system.diagonal().mean() * torch.eye(len(system), dtype=torch.float64)
        weight = torch.linalg.solve(system + pull, centred.T @ aim / len(phi) + pull @ old.T).T
        close(small.second.weight.flatten(1), weight)
        close(small.second.bias, target.mean(0) - weight @ phi.mean(0))
    close(small.second.weight.flatten(1), old, 1e-3)


@torch.no_grad()
def test_each_layer_is_solved_on_what_the_repaired_one_before_it_gives() -> None:
    model, x = randomise(Deep()), torch.randn(200, 5)
    keep = {"a": [0, 1, 4], "b": [1, 2, 3, 6]}
    small, report = repaired(model, keep, [x[:60], x[60:]])
    hidden = torch.tanh(model.a(x))
    weight, bias = least_squares(hidden[:, keep["a"]], model.b(hidden)[:, keep["b"]])
    close(small.b.weight, weight)
    close(small.b.bias, bias)
    now = torch.tanh(hidden[:, keep["a"]].double() @ weight.T + bias)
    weight, bias = least_squares(now, model(x))
    close(small.c.weight, weight)
    close(small.c.bias, bias)
    assert report.refitted == ("b", "c")


@torch.no_grad()
def test_consumers_alone_and_layers_before_the_cut() -> None:
    model, x = randomise(Deep()), torch.randn(200, 5)
    settings = RepairSettings(ridge=0.0, layers="consumers")
    small, report = repaired(model, {"a": [0, 1, 4]}, [x], settings=settings)
    assert report.refitted == ("b",)
    assert torch.equal(small.c.weight, model.c.weight)
    _, report = repaired(model, {"a": [0, 1, 4]}, [x])
    assert report.refitted == ("b", "c")
    small, report = repaired(model, {"b": [0, 1, 4]}, [x])
    assert report.refitted == ("c",)  # b only loses outputs, a sees nothing of the cut
    assert torch.equal(small.b.weight, model.b.weight[[0, 1, 4]])


@torch.no_grad()
@pytest.mark.parametrize("how", ["scale", "full"])
@pytest.mark.parametrize("settings", [EXACT, RepairSettings()])
def test_removing_dead_channels_changes_nothing(how: str, settings: RepairSettings) -> None:
    model, batches = randomise(Two(norm=True)).eval(), images()
    model.first.weight[[1, 3]] = 0
    model.first.bias[[1, 3]] = -1
    small, _ = repaired(model, {"first": [0, 2, 4, 5]}, batches, how, settings)
    x = torch.randn(4, 3, 6, 6)
    close(small(x), model(x), 1e-5)


@torch.no_grad()
def test_what_a_twin_can_say_is_restored() -> None:
    model, batches = randomise(Two(norm=True)).eval(), images()
    model.first.weight[3], model.first.bias[3] = model.first.weight[2] * 2, model.first.bias[2] * 2
    small, _ = repaired(model, {"first": [0, 1, 2, 4, 5]}, batches)
    x = torch.randn(4, 3, 6, 6)
    close(small(x), model(x))
    bare = thinet.cut(model, x, {"first": [0, 1, 2, 4, 5]}).eval()
    assert (bare(x) - model(x)).abs().max() > 0.1


@torch.no_grad()
def test_a_constant_is_restored_by_the_intercept() -> None:
    model, x = randomise(Deep()), torch.randn(200, 5)
    model.a.weight[4], model.a.bias[4] = 0, 0.7
    small, _ = repaired(model, {"a": [0, 1, 2, 3, 5]}, [x])
    close(small(torch.ones(1, 5)), model(torch.ones(1, 5)))


# --- grouped convolutions and weights used several times --------------------------------------


class Grouped(nn.Module):
    """A grouped convolution behind one that loses channels; depthwise with groups=channels."""

    def __init__(self, groups: int, bias: bool, norm: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(24) if norm else nn.Identity()

    def inner(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.grouped(self.inner(x)))


@torch.no_grad()
@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("groups", [2, 3, 12])
def test_a_grouped_convolution_is_least_squares_group_by_group(
    groups: int, bias: bool, norm: bool
) -> None:
    model, batches = randomise(Grouped(groups, bias, norm)).eval(), images()
    small, report = repaired(model, {"first": [0, 2, 5]}, batches)
    assert report == Repaired(("second", "grouped"), {})
    x = torch.cat(batches)
    phi = unfolded(small.inner(x)).unflatten(1, (groups, -1))
    target = rows(model.grouped(model.inner(x))).unflatten(1, (groups, -1))
    for g in range(groups):
        weight, shift = least_squares(phi[:, g], target[:, g], intercept=bias or norm)
        outputs = slice(g * 24 // groups, (g + 1) * 24 // groups)
        close(small.grouped.weight[outputs].flatten(1), weight, 1e-3)
        if bias:
            close(small.grouped.bias[outputs], shift, 1e-3)
        if norm:
            mean = model.norm.running_mean[outputs] - shift
            close(small.norm.running_mean[outputs], mean, 1e-3)


@torch.no_grad()
def test_a_depthwise_convolution_that_loses_channels_itself() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    model, batches = randomise(model), images()
    kept = [0, 3, 4, 7]
    small, report = repaired(model, {"0": [1, 2, 4], "2": kept}, batches)
    assert report == Repaired(("2", "4", "5"), {})
    x = torch.cat(batches)
    phi = unfolded(small[:4](x)).unflatten(1, (4, -1))
    target = rows(model[:5](x))[:, kept]
    for g in range(4):
        weight, shift = least_squares(phi[:, g], target[:, g : g + 1])
        close(small[4].weight[g].flatten()[None], weight, 1e-3)
        close(small[4].bias[g : g + 1], shift, 1e-3)


class Beside(nn.Module):
    """One head on two streams; the second stream is made after the head's first use."""

    def __init__(self, bias: bool, linear: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
        head = nn.Linear(5, 4, bias=bias), nn.Conv2d(5, 4, 3, padding=1, bias=bias)
        self.linear, self.head = linear, head[0] if linear else head[1]

    def stream(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(layer(x))
        return y.mean((2, 3)) if self.linear else y

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(self.stream(self.left, x))
        return torch.cat([first, self.head(self.stream(self.right, x)).square()], 1)


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_used_beside_itself_is_least_squares_over_all_uses(
    bias: bool, linear: bool
) -> None:
    model, batches, kept = randomise(Beside(bias, linear)), images(48), [0, 2, 3]
    (group,) = (g for g in analyse(model, batches[0][:1]).groups if g.locked is None)
    small, report = repaired(model, {group.name: kept}, batches)
    assert report == Repaired(("head",), {})
    x = torch.cat(batches)
    inputs = [small.stream(layer, x) for layer in (small.left, small.right)]
    phi = torch.cat([v if linear else unfolded(v) for v in inputs])
    answers = [model.head(model.stream(layer, x)) for layer in (model.left, model.right)]
    target = torch.cat([answer if linear else rows(answer) for answer in answers])
    weight, shift = least_squares(phi, target, intercept=bias)
    close(small.head.weight.flatten(1), weight, 1e-3)
    if bias:
        close(small.head.bias, shift, 1e-3)


# --- memory -----------------------------------------------------------------------------------


class Full(Store):
    """A store that has no memory to spare."""

    def set_aside(self, needed: int, why: str) -> None:
        assert needed > 0 and "images at a time" in why
        self.limit = 0


@torch.no_grad()
@pytest.mark.parametrize("net", [Residual, lambda: Grouped(3, True, False), lambda: Beside(True)])
def test_what_waits_in_a_file_gives_the_same_repair(net: Any) -> None:
    model, batches = randomise(net()).eval(), images(40)
    free = [g for g in analyse(model, batches[0][:1]).groups if g.locked is None]
    keep = {g.name: list(range(0, g.channels, 2)) for g in free}
    plain, report = repaired(model, keep, batches)
    store = Full()
    small, same = repaired(model, keep, batches, store=store)
    assert store.spilled and not store.held
    assert same == report
    for a, b in zip(plain.state_dict().values(), small.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --- shortcuts ------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a1, self.a2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.b1, self.b2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.inplace = inplace

    def first(self, x: Tensor) -> Tensor:
        return x + self.bn(self.a2(F.relu(self.a1(x))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.bn2(self.b2(F.relu(self.b1(y))))
        return y.add_(z) if self.inplace else z + y


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_makes_up_for_what_its_shortcut_has_lost(inplace: bool) -> None:
    model, batches = randomise(Blocks(inplace)).eval(), images()
    x, gaps = torch.cat(batches), {}
    for name, settings in (("with", EXACT), ("without", RepairSettings(ridge=0, shortcut=False))):
        small, _ = repaired(model, {"a1": [0, 1, 2]}, batches, settings=settings)
        gaps[name] = float(F.mse_loss(small(x), model(x)))
    assert 0 < gaps["with"] < 0.95 * gaps["without"], gaps


def test_targets_with_shortcuts_are_not_for_a_repair_without() -> None:
    model, batches = randomise(Blocks(False)).eval(), images()
    analysis = analyse(model, batches[0][:1])
    seen = collect(model, batches, program=analysis.program, groups=())
    plan = make_plan(analysis, model, {"a1": [0, 1, 2]})
    small = apply_to_copy(model, plan)
    with pytest.raises(OptionError, match="collect them with shortcuts=False"):
        repair_full(small, plan, seen, batches, settings=RepairSettings(shortcut=False))


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True])
def test_the_shortcut_term_is_the_least_squares_of_the_sum(inplace: bool) -> None:
    """The first block's loss reaches the second by the shortcut; the second can undo it."""
    model, batches = randomise(Blocks(inplace)).eval(), images()
    small, report = repaired(model, {"a1": [0, 1, 2]}, batches)
    assert report.refitted == ("a2", "b1", "b2")
    x = torch.cat(batches)
    now, was = small.first(x), model.first(x)
    phi = rows(F.relu(small.b1(now)))
    gain = model.bn2.weight / torch.sqrt(model.bn2.running_var + model.bn2.eps)
    # behind the norm, gain * (W phi + b - mean) + beta + now has to be the dense network's output
    target = (rows(model(x)) - rows(now) - model.bn2.bias) / gain + model.bn2.running_mean
    assert not torch.allclose(now, was, atol=1e-2)
    weight, shift = least_squares(phi, target)
    close(small.b2.weight.flatten(1), weight, 1e-3)
    close(small.bn2.running_mean, model.bn2.running_mean - shift, 1e-3)


@torch.no_grad()
def test_a_shortcut_that_is_changed_in_place_is_read_as_it_is_added() -> None:
    class Side(nn.Module):
        """The shortcut passes a ReLU in place that the layer beside it does not need."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.main, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
            self.side = nn.Parameter(torch.randn(4, 8, 1, 1))

        def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.stem(x))
            z = self.main(y)
            return z, F.relu(F.conv2d(y, 2 * self.side), inplace=True)  # no layer to refit

        def forward(self, x: Tensor) -> Tensor:
            z, shortcut = self.parts(x)
            return self.head(z + shortcut)

    model, batches = randomise(Side()).eval(), images()
    analysis = analyse(model, batches[0][:1])
    group = analysis.group("stem")
    kept = list(range(group.channels))[1:]
    small, report = repaired(model, {"stem": kept}, batches)
    assert report.refitted == ("main", "head")
    x = torch.cat(batches)
    phi = rows(F.relu(small.stem(x)))
    target = rows(sum(model.parts(x))) - rows(small.parts(x)[1])
    weight, shift = least_squares(phi, target)
    close(small.main.weight.flatten(1), weight, 1e-3)
    close(small.main.bias, shift, 1e-3)


@torch.no_grad()
def test_channels_that_the_norm_switches_off_do_not_blow_up() -> None:
    model, batches = randomise(Residual()).eval(), images()
    model.bn.weight[2] = 0
    model.bn.weight[3] = 1e-9
    small, _ = repaired(model, {"stem": [0, 2, 3, 4], "conv1": [0, 1, 2]}, batches)
    assert all(bool(torch.isfinite(t).all()) for t in small.state_dict().values())
    assert small.conv2.weight.abs().max() < 100


# --- what is left alone ---------------------------------------------------------------------


class InTurn(nn.Module):
    """A weight used on what it has made, and one that more than its layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.read = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        x = self.twice(torch.tanh(self.twice(x)))
        return self.read(x) * self.read.weight.square().sum()


def test_layers_that_cannot_be_refitted_are_named_with_the_reason() -> None:
    model = randomise(InTurn())
    small, report = repaired(model, {"first": [0, 2]}, images())
    assert report.refitted == ("second",)
    assert report.skipped == {
        "twice": "its weights are used again on what they have made",
        "read": "its weights are used more than once",
    }
    assert torch.equal(small.twice.weight, model.twice.weight)
    assert torch.equal(small.read.weight, model.read.weight)


def test_convolutions_with_groups_too_wide_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinet.repair.WIDEST", 20)
    model = randomise(nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 4, 3, groups=2)))
    _, report = repaired(model, {"0": [0, 1, 2]}, images())
    assert report == Repaired((), {"2": "its 27 input columns are more than 20"})


def test_a_system_that_cannot_be_solved_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomise(Deep()), torch.randn(50, 5)
    analysis = analyse(model, x)
    keep = {"a": [0, 1], "b": [2, 3, 4]}
    seen = collect(model, [x], program=analysis.program, groups=())
    plan = make_plan(analysis, model, keep)
    small = apply_to_copy(model, plan)
    before = copy.deepcopy(small)
    solve = refit.solve_full

    def fails(*args: Any, **options: Any) -> Any:
        if options["name"] == "c":
            raise RepairError("c: singular")
        return solve(*args, **options)

    monkeypatch.setattr(refit, "solve_full", fails)
    with pytest.raises(RepairError, match="c: singular"):
        repair_full(small, plan, seen, [x])
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), before.parameters()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ridge": -1.0}, "ridge is at least 0; got -1.0"),
        ({"ridge": float("nan")}, "ridge is at least 0; got nan"),
        ({"layers": "some"}, "unknown layers 'some'; choose all or consumers"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        RepairSettings(**options)


class Dropping(nn.Module):
    """Two layers behind dropouts, one of them behind a flatten too, and one before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.drop = nn.Dropout2d(0.25)
        self.wide = nn.Linear(8 * 4 * 4, 12)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.drop(torch.relu(self.conv(x))).flatten(1)))


def test_layers_behind_dropout_are_known() -> None:
    model = Dropping().eval()
    program = Execution(model).program(torch.randn(2, 2, 6, 6))
    dropped = dropouts(model, program)
    found = {x.weight: dropped.get(x.x.storage) for x in find_layers(program).values()}
    assert found == {"conv.weight": None, "wide.weight": 0.25, "head.2.weight": 0.5}


def test_a_refit_stays_quiet_where_training_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual, "PULLS", (1.0,))  # cross-validation would quieten both
    torch.manual_seed(0)
    model = randomise(Dropping()).eval()
    batches = [torch.randn(20, 2, 6, 6) for _ in range(2)]  # fewer images than input columns
    changes = []
    for p in (0.5, 0.0):
        model.head[1].p = model.drop.p = p
        small = thinet.prune(model, batches[0], batches, budget=thinet.Budget(keep=0.5)).model
        bare = thinet.prune(
            model, batches[0], batches, budget=thinet.Budget(keep=0.5), repair="none"
        ).model
        change = small.wide.weight - bare.wide.weight
        changes.append(float(change.detach().norm()))
    assert changes[0] < 0.5 * changes[1]


class Blurred(nn.Module):
    """A fixed filter between two layers, as in networks that blur before they stride."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1)
        self.third = nn.Conv2d(6, 4, 1)
        self.register_buffer("blur", torch.rand(6, 1, 2, 2), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        return self.third(F.relu(F.conv2d(y, self.blur, groups=len(self.blur))))


@torch.no_grad()
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("how", ["scale", "full"])
def test_buffers_are_not_refitted(how: str, persistent: bool) -> None:
    model, batches = randomise(Blurred(persistent)).eval(), images()
    keep = {"first": [0, 2, 5, 6], "second": [0, 1, 4]}
    small, report = repaired(model, keep, batches, how)
    assert torch.equal(small.blur, model.blur[[0, 1, 4]])
    if how == "full":
        reason = "its weights or its bias are a buffer, which is not trained"
        assert report == Repaired(("second", "third"), {"blur": reason})
        found = thinet.prune(
            model, batches[0], batches, budget=thinet.Budget(keep=0.6), divisor=1,
            repair_settings=RepairSettings(refine=3),
        )  # fmt: skip
        assert found.report.not_refitted == {"blur": reason}
        kept = list(found.plan.keep["second"])
        assert torch.equal(found.model.blur, model.blur[kept])
