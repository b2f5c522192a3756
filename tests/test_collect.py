"""One pass over the dense network, against moments, grams and outputs computed from all samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import BasicResidualNet, BottleneckProjectionNet, ConcatNet, SharedConvNet
from tests.oracle import randomise
from thinet.calibrate import collect as module
from thinet.calibrate import room
from thinet.calibrate.collect import Observations, collect
from thinet.calibrate.rows import Rows
from thinet.calibrate.statistics import group_statistics, site_gram
from thinet.calibrate.targets import in_half
from thinet.errors import CalibrationError, OptionError
from thinet.store import Store
from thinet.trace.analyse import analyse
from thinet.trace.groups import Analysis
from thinet.types import ChannelGroup


class Chain(nn.Module):
    """conv1 (5) -> relu -> conv2 (4, strided) -> relu -> flatten -> fc1 (6) -> fc2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1, stride=2)
        self.fc1 = nn.Linear(4 * 9, 6)
        self.fc2 = nn.Linear(6, 3)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.conv1(x))

    def flat(self, x: Tensor) -> Tensor:
        return torch.flatten(F.relu(self.conv2(self.maps(x))), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(self.flat(x))))


def chain() -> tuple[Any, Analysis]:
    model = randomise(Chain()).eval()
    return model, analyse(model, torch.randn(1, 3, 6, 6))


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 3, 6, 6) for n in sizes]


def observed(model: nn.Module, analysis: Analysis, batches: Any, **options: Any) -> Observations:
    free = [g for g in analysis.groups if g.locked is None]
    return collect(model, batches, program=analysis.program, groups=free, **options)


def only_site(group: ChannelGroup) -> Any:
    (site,) = group.sites
    return site


def parts(model: Any, name: str, x: Tensor) -> Tensor:
    """(rows, outputs, channels or units) what each unit adds to each output, in float64."""
    if name == "conv1":
        phi = F.unfold(model.maps(x), 3, padding=1, stride=2).double()  # (n, 5 * 9, L)
        phi = phi.transpose(1, 2).reshape(-1, 5, 9)
        return torch.einsum("rct,oct->roc", phi, model.conv2.weight.double().flatten(2))
    if name == "conv2":
        phi = model.flat(x).double().view(-1, 4, 9)
        return torch.einsum("rct,oct->roc", phi, model.fc1.weight.double().view(6, 4, 9))
    phi = F.relu(model.fc1(model.flat(x))).double()
    return phi[:, None] * model.fc2.weight.double()


@torch.no_grad()
def test_moments_are_those_of_the_unfolded_inputs_whatever_the_batches() -> None:
    model, analysis = chain()
    batches = images(1, 4, 2)
    seen = observed(model, analysis, batches)
    x = torch.cat(batches)
    phi = F.unfold(model.maps(x), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double()
    found = seen.moments[only_site(analysis.group("conv1")).op]
    assert found.rows == len(phi) == 7 * 9
    torch.testing.assert_close(found.second, phi.T @ phi / len(phi), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean, phi.mean(0), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1"])
def test_the_gram_is_the_direct_sum_over_all_samples(name: str) -> None:
    model, analysis = chain()
    batches = images(3, 5)
    group = analysis.group(name)
    seen = observed(model, analysis, batches)
    rows = parts(model, name, torch.cat(batches))
    direct = torch.einsum("roc,rod->cd", rows, rows) / len(rows)
    stats = group_statistics(model, group, seen)
    (consumer,) = stats.consumers
    found = site_gram(only_site(group), group, seen, consumer.weight)
    assert found is not None and stats.gram is not None
    torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-5)
    energy = rows.sum(2).var(0, correction=0).sum()  # of what goes on beyond a constant
    assert consumer.energy == pytest.approx(float(energy), rel=1e-4)
    torch.testing.assert_close(stats.gram, direct / energy, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1"])
def test_consumers_too_wide_for_moments_give_their_gram_by_unit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WIDEST", 4)
    monkeypatch.setattr("thinet.calibrate.rows.WIDEST", 4)
    model, analysis = chain()
    batches = images(3, 1, 4)
    group = analysis.group(name)
    seen = observed(model, analysis, batches)
    assert not seen.moments
    stats = group_statistics(model, group, seen)
    rows = parts(model, name, torch.cat(batches))
    direct = torch.einsum("roc,rod->cd", rows, rows) / len(rows)
    energy = rows.sum(2).var(0, correction=0).sum()
    assert stats.gram is not None and stats.gram.shape == (group.channels,) * 2
    torch.testing.assert_close(stats.gram, direct / energy, rtol=1e-4, atol=1e-5)
    assert stats.consumers[0].energy == pytest.approx(float(energy), rel=1e-4)
    assert not stats.has("hessians") and stats.has("gram") and stats.has("systems")
    varies = rows - rows.mean(0)
    direct = torch.einsum("roc,rod->cd", varies, varies) / len(rows)
    assert stats.consumers[0].system is not None
    torch.testing.assert_close(stats.consumers[0].system[0], direct, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_classifier_behind_a_large_flatten_takes_little_memory() -> None:
    """VGG-16's first linear layer: 25,088 columns of 512 units; their gram would hold 5 GB."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 28 * 28, 300),
        nn.Linear(300, 2),
    )
    x = torch.randn(4, 3, 28, 28)
    analysis = analyse(model, x[:1])
    seen = observed(model, analysis, [x], targets=False)
    group = analysis.group("0")
    assert only_site(group).op not in seen.moments
    found = seen.parts[only_site(group).op].gram("0")
    assert found.shape == (16, 16)
    phi = F.relu(model[0](x)).flatten(2).double()  # (images, units, positions)
    z = torch.einsum("rup,oup->rou", phi, model[3].weight.view(300, 16, 784).double())
    direct = torch.einsum("rou,rov->uv", z, z) / 4
    assert (found - direct).norm() / direct.norm() < 0.2  # 256 random mixtures of 300 outputs


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv1", "conv2", "fc1"])
def test_the_papers_sampling_agrees_in_expectation(name: str) -> None:
    model, analysis = chain()
    batches = images(300, 100)
    group = analysis.group(name)
    exact = group_statistics(model, group, observed(model, analysis, batches)).gram
    seeds = [observed(model, analysis, batches, sampling="paper", seed=s) for s in range(6)]
    drawn = [group_statistics(model, group, seen).gram for seen in seeds]
    assert exact is not None
    gaps = [float((d - exact).norm() / exact.norm()) for d in drawn if d is not None]
    mean = torch.stack([d for d in drawn if d is not None]).mean(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.1
    assert all(0 < gap < 0.25 for gap in gaps)
    assert len(set(gaps)) == 6  # each seed draws anew
    again = observed(model, analysis, batches, sampling="paper", seed=3)
    same = group_statistics(model, group, again).gram
    assert same is not None and drawn[3] is not None and torch.equal(same, drawn[3])


@torch.no_grad()
def test_zeros_are_counted_over_all_images_alike() -> None:
    model, analysis = chain()
    batches = images(1, 6)
    seen = observed(model, analysis, batches, zeros=True)
    dead = (model.maps(torch.cat(batches)) == 0).double().mean((0, 2, 3))
    torch.testing.assert_close(seen.zeros[only_site(analysis.group("conv1")).op], dead)
    flat = (model.flat(torch.cat(batches)) == 0).double().mean(0)
    torch.testing.assert_close(seen.zeros[only_site(analysis.group("conv2")).op], flat)
    stats = group_statistics(model, analysis.group("conv2"), seen)
    assert stats.zeros is not None
    torch.testing.assert_close(stats.zeros, flat.view(4, 9).mean(1))


@torch.no_grad()
def test_targets_are_the_layers_own_outputs_at_the_positions() -> None:
    model, analysis = chain()
    batches = images(2, 3)
    seen = observed(model, analysis, batches, rows=Rows(per_column=0, least=20))
    by_weight = {seen.layers[op].weight: kept for op, kept in seen.targets.items()}
    kept = by_weight["conv2.weight"]
    drawn = [p for p in kept.positions if p is not None]
    assert [len(p) for p in drawn] == [8, 12]  # 20 rows shared out by images
    for batch, positions, y in zip(batches, kept.positions, kept.y, strict=True):
        out = model.conv2(model.maps(batch)).movedim(1, -1).reshape(-1, 4)
        torch.testing.assert_close(y, out[positions], rtol=1e-5, atol=1e-6)
    assert by_weight["fc2.weight"].positions == [None, None]
    torch.testing.assert_close(by_weight["fc2.weight"].y[1], model(batches[1]))
    assert not kept.shortcut


@torch.no_grad()
def test_moments_and_targets_are_of_the_same_positions() -> None:
    model, analysis = chain()
    batches = images(4)
    rows = Rows(per_column=0, least=10, choosing=1.0)
    seen = observed(model, analysis, batches, rows=rows)
    op = only_site(analysis.group("conv1")).op
    positions = seen.targets[op].positions[0]
    phi = F.unfold(model.maps(batches[0]), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    phi = phi[positions].double()
    torch.testing.assert_close(seen.moments[op].mean, phi.mean(0), rtol=1e-5, atol=1e-6)
    y = phi @ model.conv2.weight.double().flatten(1).T + model.conv2.bias.double()
    torch.testing.assert_close(seen.targets[op].y[0].double(), y, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_shortcut_that_another_layer_makes_is_kept_apart() -> None:
    model = randomise(BottleneckProjectionNet()).eval()
    x = model.example()
    seen = observed(model, analyse(model, x), [x])
    stem = F.relu(model.stem(x))
    made = {
        "conv3.weight": model.conv3(F.relu(model.conv2(F.relu(model.conv1(stem))))),
        "downsample.0.weight": model.downsample[0](stem),
    }
    norms = {"conv3.weight": model.bn3, "downsample.0.weight": model.downsample[1]}
    kept = {seen.layers[op].weight: kept for op, kept in seen.targets.items()}
    for name, other in made.items():
        theirs = next(n for n in made if n != name)
        assert not kept[name].summed
        close(kept[name].y[0], as_rows(other))
        close(kept[name].shortcut[0], as_rows(norms[theirs](made[theirs])))
    assert all(k.undo is None for name, k in kept.items() if name not in made)


@torch.no_grad()
def test_a_shortcut_that_is_there_before_the_layer_is_in_the_target() -> None:
    model = randomise(BasicResidualNet()).eval()
    x = model.example()
    seen = observed(model, analyse(model, x), [x])
    kept = {seen.layers[op].weight: kept for op, kept in seen.targets.items()}
    stem = F.relu(model.stem(x))
    y = model.conv2(F.relu(model.bn1(model.conv1(stem))))
    gain = model.bn2.weight / torch.sqrt(model.bn2.running_var + model.bn2.eps)
    assert kept["conv2.weight"].summed and not kept["conv1.weight"].summed
    close(kept["conv2.weight"].y[0], as_rows(y) + as_rows(stem) / gain)
    without = observed(model, analyse(model, x), [x], shortcuts=False)
    weights = {without.layers[op].weight: kept for op, kept in without.targets.items()}
    apart = weights["conv2.weight"]
    assert apart.undo is None
    close(apart.y[0], as_rows(y))


def as_rows(y: Tensor) -> Tensor:
    return y.movedim(1, -1).reshape(-1, y.shape[1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_nothing_is_measured_that_was_not_asked_for() -> None:
    model, analysis = chain()
    seen = collect(model, images(2), program=analysis.program, groups=(), targets=False)
    assert not (seen.moments or seen.grams or seen.zeros or seen.targets or seen.outputs)
    assert len(seen.layers) == 4


def test_progress_is_told_by_batch() -> None:
    model, analysis = chain()
    told: list[tuple[str, int, int]] = []
    observed(model, analysis, images(1, 1), progress=lambda *step: told.append(step))
    assert told == [("measuring the dense network", n, 2) for n in (1, 2)]


class TurnedNet(nn.Module):
    """Reshaping is a view of one image and a copy of two, so batches run other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x)).transpose(0, 1).flatten(0, 1)
        return self.third(F.relu(self.second(x)))


@torch.no_grad()
def test_a_larger_batch_than_the_traced_one_is_matched_by_layer() -> None:
    model = randomise(TurnedNet())
    x = torch.randn(8, 5, 4)
    analysis = analyse(model, x[:1])
    seen = observed(model, analysis, [x], zeros=True)
    phi = F.relu(model.first(x)).transpose(0, 1).flatten(0, 1).double()
    found = seen.moments[only_site(analysis.group("first")).op]
    torch.testing.assert_close(found.second, phi.T @ phi / len(phi), rtol=1e-5, atol=1e-6)
    phi = F.relu(model.second(phi.float())).double()
    found = seen.moments[only_site(analysis.group("second")).op]
    torch.testing.assert_close(found.second, phi.T @ phi / len(phi), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("widest", [4, 6144])
def test_activations_that_are_not_finite_name_the_layer(
    widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WIDEST", widest)
    monkeypatch.setattr("thinet.calibrate.rows.WIDEST", widest)
    model, analysis = chain()
    with torch.no_grad():
        model.conv1.weight[2] = float("inf")
    with pytest.raises(CalibrationError, match=r"^conv2 \(conv2.weight\): .*NaN"):
        observed(model, analysis, images(2))


def test_rows_are_checked() -> None:
    assert Rows().count(10) == 16384 and Rows().count(4000) == 32000
    with pytest.raises(OptionError, match="per_column is at least 0 and least at least 1"):
        Rows(least=0)
    for part in (0.0, 1.5, float("nan")):
        with pytest.raises(OptionError, match="choosing is a part above 0 and at most 1"):
            Rows(choosing=part)


@torch.no_grad()
def test_channels_are_chosen_from_half_of_the_rows() -> None:
    model, analysis = chain()
    op = only_site(analysis.group("conv1")).op
    seen = observed(model, analysis, images(4), rows=Rows(per_column=0, least=20))
    kept = seen.targets[op]
    assert sum(len(kept.y[batch]) for batch in range(len(kept.y))) == 20
    assert seen.moments[op].rows == 10


# --- memory ---------------------------------------------------------------------------------


@torch.no_grad()
def test_many_targets_are_kept_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(BottleneckProjectionNet()).eval()
    analysis, batches = analyse(model, model.example()), [model.example(), model.example()]
    exact = observed(model, analysis, batches)
    monkeypatch.setattr(module, "HALVED_FROM", 0)
    halved = observed(model, analysis, batches)
    shortcuts = 0
    for op, kept in exact.targets.items():
        fewer = halved.targets[op]
        shortcuts += len(kept.shortcut)
        for full, half in zip((*kept.y, *kept.shortcut), (*fewer.y, *fewer.shortcut), strict=True):
            assert (full.dtype, half.dtype) == (torch.float32, torch.float16)
            torch.testing.assert_close(half.float(), full, rtol=2**-11, atol=2**-25)
    assert shortcuts
    for op, signal in exact.signals.items():  # taken of what was made, not of what was kept
        assert torch.equal(signal.y_variance(), halved.signals[op].y_variance())


def test_rows_out_of_the_range_of_half_precision_stay() -> None:
    rows = torch.tensor([[1.0, -2.0]])
    assert torch.equal(in_half(rows), rows.half())
    for out in (rows * 1e5, rows * 1e-6, rows.double(), rows.bfloat16(), rows[:0]):
        assert in_half(out) is out


@torch.no_grad()
@pytest.mark.parametrize("systems", [1, 4])
def test_what_is_found_with_little_memory_is_the_same(
    systems: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SYSTEMS", systems)
    model, analysis = chain()
    batches, store = images(3, 1, 4), Store()
    monkeypatch.setattr(store, "set_aside", lambda needed, why: setattr(store, "limit", 0))
    told: list[int] = []
    plain = observed(model, analysis, batches, zeros=True)
    tight = observed(
        model, analysis, batches, zeros=True, store=store, progress=lambda *s: told.append(s[2])
    )
    assert store.spilled and not store.held
    assert told == ([6] * 6 if systems == 1 else [3] * 3)  # 45, then 36 and 6 columns
    for op, moments in plain.moments.items():
        assert torch.equal(moments.covariance(), tight.moments[op].covariance())
        assert torch.equal(moments.second, tight.moments[op].second)
        assert torch.equal(plain.zeros[op], tight.zeros[op])
        assert torch.equal(plain.signals[op].y_variance(), tight.signals[op].y_variance())
    for op, kept in plain.targets.items():
        pairs = zip(kept.y, tight.targets[op].y, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    op, moments = next(iter(plain.moments.items()))
    more = torch.randn(5, moments.columns)
    for seen in (plain, tight):
        seen.moments[op].add(more)  # what rests can be gone on with
    assert torch.equal(plain.moments[op].second, tight.moments[op].second)


def test_too_little_memory_says_what_is_needed_and_for_what() -> None:
    model, analysis = chain()
    text = (
        r"memory=1e-06 GiB is too little; at least [0-9.e-]+ GiB are needed: .* for what the model "
        r"computes for 4 images at a time, .*; calibrate in smaller batches or with fewer images"
    )
    with pytest.raises(OptionError, match=text):
        observed(model, analysis, images(3, 4), store=Store(1e-6))


# --- statistics of groups -------------------------------------------------------------------


def statistics(model: nn.Module, x: Tensor, name: str) -> tuple[ChannelGroup, Any]:
    analysis = analyse(model, x[:1])
    seen = observed(model, analysis, [x], zeros=True)
    group = analysis.group(name)
    return group, group_statistics(model, group, seen, seed=5)


def test_concatenated_channels_have_their_own_part_of_the_consumer() -> None:
    model = randomise(ConcatNet()).eval()
    x = torch.randn(3, 3, 8, 8)
    analysis = analyse(model, x[:1])
    shared = [
        (g, site) for g in analysis.groups for site in g.sites if -1 in site.units and not g.locked
    ]
    assert len(shared) >= 2
    for group, site in shared:
        stats = group_statistics(model, group, observed(model, analysis, [x]))
        (consumer,) = (c for c in stats.consumers if c.units.tolist() == list(site.units))
        assert sorted(u for u in site.units if u >= 0) == list(range(group.channels))
        assert consumer.second is not None
        assert len(consumer.second) == consumer.weight[0].numel()


def test_a_weight_used_twice_is_measured_at_both_places() -> None:
    model = randomise(SharedConvNet()).eval()
    x = torch.randn(3, 3, 8, 8)
    analysis = analyse(model, x[:1])
    seen = observed(model, analysis, [x])
    twice = [op for op, layer in seen.layers.items() if layer.shared]
    assert len(twice) >= 2
    assert len({seen.layers[op].weight for op in twice}) == 1
