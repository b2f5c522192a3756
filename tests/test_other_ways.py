"""Ways through a model that the example inputs do not take, and weights of unusual standing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import thinet
from thinet.errors import CalibrationError, IndicesError, ModelError, OptionError, RepairError
from thinet.timing import latency

HALF = thinet.Budget(keep=0.5)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(count: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        self.x, self.y = nn.Linear(16, 5), nn.Linear(16, 3)

    def forward(self, image: Tensor, task: str = "x") -> Tensor:
        return getattr(self, task)(self.body(image).mean((2, 3)))


def test_a_head_that_is_not_run_is_named() -> None:
    result = thinet.prune(TwoTasks().eval(), images(2), [images(16)], budget=HALF)
    assert [note.split(":")[0] for note in result.report.notes] == ["y"]
    assert result.model.y.in_features == 16


def test_calibration_takes_the_way_of_the_example_inputs() -> None:
    example = {"image": images(2), "task": "y"}
    with pytest.raises(CalibrationError, match="batch 0 lacks task, which the example inputs have"):
        thinet.prune(TwoTasks().eval(), example, [images(16)], budget=HALF)
    batch = {"image": images(16), "task": "y"}
    result = thinet.prune(TwoTasks().eval(), example, [batch], budget=HALF)
    assert result.model.y.in_features == 8


class Positions(nn.Module):
    """A linear layer on a view whose strides are not those of its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.p, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.c(x).relu().flatten(2).transpose(1, 2)
        return self.o(self.p(seen).relu())


def test_frozen_weights_are_measured_and_refitted_alike() -> None:
    torch.manual_seed(0)
    model = Positions().eval()
    free = thinet.prune(model, images(2), [images(16)], budget=HALF)
    frozen = thinet.prune(model.requires_grad_(False), images(2), [images(16)], budget=HALF)
    assert free.report.refitted == frozen.report.refitted == ("p", "o")
    assert torch.equal(free.model(images(4)), frozen.model(images(4)))
    assert not any(p.requires_grad for p in frozen.model.parameters())


class ByComputed(nn.Module):
    """A weight computed from a parameter, which the repair does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 9)
        self.w = nn.Parameter(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() @ self.w.sinh()


def test_what_the_repair_does_not_know_is_named() -> None:
    model = ByComputed().eval()
    report = thinet.prune(model, rows(4), [rows(32)], budget=HALF, criterion="l2").report
    assert report.refitted == ()
    assert list(report.not_refitted) == ["the model"]
    assert report.not_refitted["the model"].endswith("the model itself (mm) is no such layer")


@pytest.mark.parametrize("loss_aware", [False, True])
def test_a_criterion_that_can_judge_nothing_says_so(loss_aware: bool) -> None:
    text = r"can judge none of the chosen groups.*a: gram could not.*the model itself \(mm\) is no"
    with pytest.raises(CalibrationError, match=text):
        thinet.prune(ByComputed().eval(), rows(4), [rows(32)], budget=HALF, loss_aware=loss_aware)


class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h, self.o = nn.Linear(6, 9), nn.Linear(6, 8), nn.Linear(8, 3)
        self.back = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        code = self.e(x).relu()
        return self.o(self.h(F.linear(code, self.e.weight.t(), self.back)).relu())


def test_a_tied_decoder_is_measured_like_any_layer() -> None:
    torch.manual_seed(3)
    model, x = TiedDecoder().eval(), rows(32)
    with torch.no_grad():
        code = model.e(x).relu()
        parts = code[:, :, None] * model.e.weight  # (rows, channels, outputs of the decoder)
    removed: list[int] = []
    while len(removed) < 5:  # of nine, half stay rounded down
        left = [c for c in range(9) if c not in removed]
        energy = [float(parts[:, [*removed, c]].sum(1).square().sum()) for c in left]
        removed.append(left[energy.index(min(energy))])
    result = thinet.prune(model, rows(4), [x], budget=HALF, criterion="thinet")
    assert result.plan.keep["e"] == tuple(c for c in range(9) if c not in removed)
    assert result.report.not_refitted["e"] == "its weights are used more than once"
    result = thinet.prune(model, rows(4), [x], budget=HALF, criterion="apoz")
    most = (code > 0).float().mean(0).topk(4).indices.tolist()
    assert result.plan.keep["e"] == tuple(sorted(most))
    result = thinet.prune(model, rows(4), [x], budget=HALF, criterion="taylor")
    code = code.requires_grad_()
    logits = model.o(model.h(F.linear(code, model.e.weight.t(), model.back)).relu())
    loss = F.cross_entropy(logits, logits.argmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, code)
    most = (code * gradient).abs().mean(0).topk(4).indices.tolist()
    assert result.plan.keep["e"] == tuple(sorted(most))


@pytest.mark.parametrize("criterion", ["l2", "weight-sum"])
def test_a_group_without_a_producer_of_its_own_goes_by_its_weights(criterion: str) -> None:
    torch.manual_seed(3)
    model = TiedDecoder().eval()
    result = thinet.prune(model, rows(4), [rows(32)], budget=HALF, criterion=criterion)
    weight = model.e.weight.detach()
    score = weight.abs().sum(1) if criterion != "l2" else weight.norm(dim=1)
    assert result.plan.keep["e"] == tuple(sorted(score.topk(4).indices.tolist()))


def test_the_sizes_of_a_normed_weight_follow() -> None:
    model = nn.Sequential(
        weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), weight_norm(nn.Conv2d(6, 5, 3)), nn.ReLU(),
        nn.Conv2d(5, 2, 1),
    ).eval()  # fmt: skip
    small = thinet.cut(model, images(1), {"2": [0, 2, 4]})
    assert (small[2].in_channels, small[2].out_channels, small[4].in_channels) == (6, 3, 3)


def test_a_numpy_mask_is_no_list_of_indices() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(IndicesError, match="indices must be integers"):
        thinet.cut(model, rows(1, 3), {"0": np.array([True, False])})


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.b(self.a(x).relu())


def test_generators_and_inputs_stay_as_they_were() -> None:
    model, x, batch = Drawing().eval(), rows(4), rows(32)
    was = x.clone(), batch.clone()
    plain, arrays = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    thinet.find_groups(model, x)
    thinet.prune(model, x, [batch], budget=HALF, criterion="taylor")
    assert random.getstate() == plain
    assert np.random.get_state()[1].tolist() == arrays  # noqa: NPY002
    latency(model, x, seconds=0.001)
    assert torch.equal(was[0], x)
    assert torch.equal(was[1], batch)


class Asserting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def test_any_error_of_the_forward_code_is_the_models() -> None:
    with pytest.raises(ModelError, match="does not run on the inputs .*: AssertionError"):
        latency(Asserting(), rows(2), seconds=0.001)


def test_a_joint_refit_belongs_to_the_full_repair() -> None:
    with pytest.raises(OptionError, match="refine=3 .* with repair='none' leave it out"):
        thinet.prune(
            TwoTasks().eval(), images(2), [images(4)], budget=HALF, repair="none",
            repair_settings=thinet.RepairSettings(refine=3),
        )  # fmt: skip


class Experts(nn.Module):
    """Each row goes to the expert that a cut layer chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.route = nn.Linear(6, 12), nn.Linear(12, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        chosen, out = self.route(h).argmax(1), x.new_zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if rows.any():
                out[rows] = expert(h[rows])
        return out


def test_rows_that_a_cut_sends_elsewhere_are_told_before_weights_are_solved() -> None:
    torch.manual_seed(0)
    model, x = Experts().eval(), rows(64)
    with pytest.raises(RepairError, match=r"experts\.0\.0 is given other rows by the cut network"):
        thinet.prune(model, x, [x[:32], x[32:]], budget=HALF)
    result = thinet.prune(model, x, [x[:32], x[32:]], budget=HALF, skip="a")
    assert "experts.0.2" in result.report.refitted
