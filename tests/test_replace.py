"""Modules that take others' places: built from data, fitted, kept in the plan, read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import thinet
from tests.chains import SmallVgg, images
from thinet.errors import CalibrationError, CheckpointError
from thinet.plan import AttributeChange, Plan, Replacement
from thinet.recipes import resolve
from thinet.recipes.apply import with_replaced
from thinet.surgery.apply import apply_plan
from thinet.surgery.replace import replace
from thinet.types import Slice

X = torch.zeros(1, 3, 16, 16)
HEAD = (
    Replacement("squeeze", "global-average-pool"),
    Replacement("head", "linear", {"in_features": 16, "out_features": 5}),
)


def test_a_pooled_head_is_the_mean_of_each_map_and_one_product() -> None:
    model = SmallVgg().eval()
    replace(model, HEAD)
    maps = model.body(images(4))
    assert isinstance(model.head, nn.Linear)
    expected = maps.mean((2, 3)) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(images(4)), expected, atol=1e-6)


def test_new_modules_follow_device_type_and_mode_and_are_the_same_each_time() -> None:
    first, second = SmallVgg().double().eval(), SmallVgg().double().eval()
    state = torch.get_rng_state()
    replace(first, HEAD)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    replace(second, HEAD)
    assert torch.equal(first.head.weight, second.head.weight)  # type: ignore[arg-type]
    assert first.head.weight.dtype == torch.float64
    assert not first.head.training
    assert SmallVgg().train().head.training


def test_old_modules_can_be_put_back() -> None:
    model = SmallVgg()
    before = list(model.named_modules())
    put_back = replace(model, HEAD)
    assert list(model.named_modules()) != before
    put_back()
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in before]


@pytest.mark.parametrize(
    ("replacement", "text"),
    [
        (Replacement("tail", "identity"), "replaces 'tail', a module that this SmallVgg does not"),
        (Replacement("head", "attention"), "by 'attention'; this version .* identity, global-aver"),
        (Replacement("", "identity"), "replaces '' by 'identity'"),
        (Replacement("head", "linear", {"in_features": 3}), "which makes no module"),
        (Replacement("head", "linear", {"in_features": -1, "out_features": 2}), "makes no module"),
    ],
)
def test_what_cannot_be_replaced_is_said_and_nothing_is_changed(
    replacement: Replacement, text: str
) -> None:
    model = SmallVgg()
    before = [id(m) for m in model.modules()]
    with pytest.raises(CheckpointError, match=text):
        replace(model, (HEAD[0], replacement))
    assert [id(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    "plan",
    [
        Plan(replaced=HEAD, kept=(Slice("head.3.weight", 0, (0,)),)),
        Plan(replaced=HEAD, kept=(Slice("head.weight", 1, (16,)),)),
        Plan(replaced=HEAD, attributes=(AttributeChange("head.3", "out_features", 1),)),
    ],
)
def test_a_plan_that_fails_after_its_replacements_changes_nothing(plan: Plan) -> None:
    model = SmallVgg()
    before = [id(m) for m in model.modules()]
    with pytest.raises(CheckpointError):
        apply_plan(model, plan)
    assert [id(m) for m in model.modules()] == before


def test_the_new_head_is_the_ridge_regression_on_the_dense_outputs() -> None:
    model, data = SmallVgg().double().eval(), images().double()
    calibration = [data[:20], data[20:]]
    new = with_replaced(model, HEAD, calibration).eval()
    with torch.no_grad():
        x = model.body(data).mean((2, 3)).numpy()
        y = model(data).numpy()
    centred, target = x - x.mean(0), y - y.mean(0)
    system = centred.T @ centred / len(x)
    system += 1e-3 * np.trace(system) / 16 * np.eye(16)
    weight = np.linalg.solve(system, centred.T @ target / len(x)).T
    assert isinstance(new.head, nn.Linear)
    assert np.allclose(new.head.weight.detach().numpy(), weight, atol=1e-10)
    expected = y.mean(0) - weight @ x.mean(0)
    assert np.allclose(new.head.bias.detach().numpy(), expected, atol=1e-10)
    assert isinstance(model.head, nn.Sequential)


def test_a_head_of_other_outputs_cannot_be_fitted() -> None:
    class Maps(SmallVgg):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:, :, None]

    with pytest.raises(CalibrationError, match=r"the network gives \(32, 5, 1\)"):
        with_replaced(Maps(), HEAD, [images()])


def test_a_replaced_and_cut_model_is_read_back_from_the_dense_one(tmp_path: Path) -> None:
    dense = SmallVgg()
    result = thinet.prune_by_recipe(dense, X, [images()], "vgg16-tiny")
    assert [type(m).__name__ for m in (result.model.squeeze, result.model.head)] == [
        "AdaptiveAvgPool2d",
        "Linear",
    ]
    path = thinet.save(tmp_path / "tiny.safetensors", result.model, result.plan)
    assert thinet.load_plan(path) == result.plan
    read = thinet.load(path, SmallVgg())
    assert torch.equal(read.eval()(images()), result.model.eval()(images()))
    counts = thinet.count(dense, X)
    report = result.report
    assert (report.macs_before, report.params_before) == (counts.macs, counts.params)
    assert report.macs_after == thinet.count(result.model, X).macs


def test_cuts_before_and_after_a_replacement_are_one_plan() -> None:
    """The layers are cut, then the head is replaced, then the last layer is cut for it."""
    dense, plan = SmallVgg(), Plan()
    model: nn.Module = dense
    data = [images()]
    for keep in ({"body.0": 4, "head.0": 7, "body.26": 12}, None, {"body.26": 6}):
        if keep is None:
            model = with_replaced(model, HEAD12, data)
            plan = plan.then(Plan(replaced=HEAD12))
        else:
            result = thinet.prune(model, X, data, budget=thinet.Budget(keep=keep))
            model, plan = result.model, plan.then(result.plan)
    again = SmallVgg()
    again.load_state_dict(dense.state_dict())
    apply_plan(again, plan)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in again.named_parameters()} == shapes
    assert shapes["head.weight"] == (5, 6)
    assert "head.0" not in plan.keep
    chosen = list(plan.keep["body.26"])
    assert len(chosen) == 6
    ours, theirs = dict(again.named_parameters()), dict(dense.named_parameters())
    assert torch.equal(ours["body.26.bias"], theirs["body.26.bias"][chosen])


def test_a_module_that_only_states_its_sizes_keeps_its_cuts() -> None:
    first = Plan(keep={"a.fc": (1,)}, kept=(Slice("a.fc.weight", 0, (1,)),))
    assert first.then(Plan(replaced=(Replacement("a", "explicit"),))).kept == first.kept
    assert first.then(Plan(replaced=(Replacement("a", "identity"),))).kept == ()


HEAD12 = (HEAD[0], Replacement("head", "linear", {"in_features": 12, "out_features": 5}))


def test_a_plan_with_replacements_goes_through_json() -> None:
    plan = Plan(replaced=resolve("vgg16-gap", SmallVgg(), X).replaced)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.replaced[-1].options == {"in_features": 16, "out_features": 5}
