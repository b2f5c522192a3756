"""BatchNorm statistics against those computed from the data at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.oracle import randomise
from thinet.calibrate.batchnorm import recalibrate_bn
from thinet.errors import CalibrationError


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU())


def test_one_norm_gets_the_statistics_of_all_images_whatever_the_batches() -> None:
    model = randomise(net()).eval()
    batches = [torch.randn(n, 3, 6, 6) * n for n in (1, 5, 2)]
    found = recalibrate_bn(model, batches)[1]
    with torch.no_grad():
        y = torch.cat([model[0](b) for b in batches]).double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(found.running_mean.double(), y.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.running_var.double(), y.var(1, correction=0))


def test_later_norms_see_what_earlier_ones_make_of_each_batch() -> None:
    model = randomise(nn.Sequential(net(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)))
    x = torch.randn(16, 3, 6, 6)
    found = recalibrate_bn(model, [x])
    reference = copy.deepcopy(model).train()
    with torch.no_grad():
        y = reference[1](reference[0](x)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(found[2].running_mean, y.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2].running_var, y.var(1, correction=0), rtol=1e-4, atol=1e-5)


def test_with_one_batch_evaluation_is_what_training_gives() -> None:
    model = randomise(nn.Sequential(net(), net().append(nn.Flatten())[1:2]))
    x = torch.randn(16, 3, 6, 6)
    found = recalibrate_bn(model, [x]).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(x), model.train()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_only_the_statistics_differ(training: bool, momentum: float | None) -> None:
    model = randomise(net(momentum=momentum)).train(training)
    model[0].eval()  # a mode of its own
    model[1].num_batches_tracked.fill_(7)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = recalibrate_bn(model, [torch.randn(4, 3, 6, 6, generator=torch.Generator())])
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    differ = {n for n, t in found.state_dict().items() if not torch.equal(t, state[n])}
    assert differ == {"1.running_mean", "1.running_var"}
    assert found[1].momentum == momentum
    assert [m.training for m in found.modules()] == [m.training for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in found.modules())


def test_norms_that_do_not_run_and_models_without_keep_what_they_have() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux = net(affine=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            return (self.body(x), self.aux(self.body(x))) if self.training else self.body(x)

    model, x = Head(), torch.randn(4, 3, 6, 6)
    model.aux.running_mean.fill_(3)
    found = recalibrate_bn(model, [x])
    assert found.aux.running_mean.eq(3).all()
    assert not torch.equal(found.body[1].running_mean, model.body[1].running_mean)
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    same = recalibrate_bn(plain, [torch.randn(4, 3)])
    assert same is not plain
    assert torch.equal(same[0].weight, plain[0].weight)


@pytest.mark.parametrize(
    ("model", "batches", "text"),
    [
        (net(), [], "the calibration data is empty"),
        (net(), [torch.ones(2, 4, 6, 6)], r"does not run on .* \(shapes \(2, 4, 6, 6\)\)"),
        (
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
            [torch.ones(1, 3)],
            "in training mode: Expected more than 1 value per channel",
        ),
    ],
)
def test_data_that_does_not_fit(model: nn.Module, batches: list[Tensor], text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        recalibrate_bn(model, batches)


def test_statistics_that_are_not_finite_name_the_norm() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0] = float("inf")
    with pytest.raises(CalibrationError, match=r"^1: the input of this BatchNorm holds NaN"):
        recalibrate_bn(model, [torch.randn(4, 3, 6, 6)])


class Shifted(nn.Module):
    """Two positional inputs, of which the second may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.b(self.bn(self.a(x if shift is None else x + shift)).relu()).mean((2, 3))


def shifted() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 3, 7, 7), 4 + torch.randn(n, 3, 1, 1)) for n in (6, 2)]


def mean_behind(conv: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        y = torch.cat([conv(x + shift) for x, shift in batches])
    return y.movedim(1, 0).flatten(1).mean(1)


def test_a_second_input_is_no_target() -> None:
    model, batches = randomise(Shifted()), shifted()
    found = recalibrate_bn(model, batches, example_inputs=batches[0])
    torch.testing.assert_close(found.bn.running_mean, mean_behind(model.a, batches))
    with_targets = [(*batch, torch.zeros(len(batch[0]))) for batch in batches]
    other = recalibrate_bn(model, with_targets, example_inputs=batches[0])
    assert torch.equal(other.bn.running_mean, found.bn.running_mean)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_prune_keeps_the_second_input_for_the_statistics(rounds: int) -> None:
    model, batches = randomise(Shifted()), shifted()
    result = thinet.prune(
        model, batches[0], batches, budget=thinet.Budget(macs=0.5), only="a", rounds=rounds,
        divisor=1, recalibrate=True,
    )  # fmt: skip
    small = result.model
    assert small.a.out_channels < 8
    torch.testing.assert_close(small.bn.running_mean, mean_behind(small.a, batches))


def test_so_does_the_loop_of_layers(tmp_path: Path) -> None:
    model, batches = randomise(Shifted()), shifted()
    result = thinet.iterate(
        model, batches[0], batches, budget=thinet.Budget(keep={"a": 4}), recalibrate=True,
        state_dir=tmp_path,
    )  # fmt: skip
    small = result.model
    torch.testing.assert_close(small.bn.running_mean, mean_behind(small.a, batches))
