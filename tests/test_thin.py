"""Convolutions of the taps that are left: hand-worked, against the masked ones, saved and read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import thinet
from tests.test_group_sparsity import KERNELS, Depth, hand_worked
from thinet.errors import CheckpointError, OptionError
from thinet.plan import Plan, Replacement
from thinet.surgery.replace import replace
from thinet.surgery.thin_conv import ThinConv2d
from thinet.thin import read_channels, thin


def with_taps(conv: nn.Conv2d, keep: float) -> nn.Conv2d:
    """The convolution with that fraction of its taps, drawn anew, and the others zero."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape[1:], generator=random) < keep)
    return conv


def test_a_worked_example() -> None:
    """Taps (1, 0, 1) and (1, 1, 1) of the second map only: 5 and 8, 12 and 6."""
    model = hand_worked()
    with torch.no_grad():
        model[0].weight.copy_(KERNELS)  # type: ignore[union-attr]
        model[0].weight[:, 0] = 0  # type: ignore[index, union-attr]
        model[0].weight[:, 1, :, 0] = 0  # type: ignore[index, union-attr]
        model[0].bias.copy_(torch.tensor([0.5, -1.0]))  # type: ignore[union-attr]
    result = thin(model)
    assert result.taps == {"0": (2, 8)}
    layer = result.model[0]  # type: ignore[index]
    assert isinstance(layer, ThinConv2d)
    assert layer.mix.weight.flatten(1).tolist() == [[5.0, 8.0], [12.0, 6.0]]
    x = torch.zeros(1, 2, 3, 3)
    x[0, 1] = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 4.0], [9.0, 5.0, 6.0]])
    assert layer.taps(x).tolist() == [[[[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [5.0, 6.0]]]]
    y = result.model(x)
    assert y[0, 0].tolist() == [[29.5, 42.5], [55.5, 68.5]]  # 5 * 1 + 8 * 3 + 0.5, ...
    assert y[0, 1].tolist() == [[29.0, 47.0], [65.0, 83.0]]  # 12 * 1 + 6 * 3 - 1, ...


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("keep", [0.2, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (2, 3), "padding": (1, 2)},
        {"dilation": (2, 1), "padding": 2, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": "same", "kernel_size": (2, 4)},
        {"padding": "valid", "kernel_size": (1, 5)},
        {"kernel_size": 1},
        {"kernel_size": 1, "stride": 2, "bias": False},
        {"kernel_size": (4, 3), "stride": 3, "dilation": 2, "padding": (3, 1)},
    ],
)
def test_it_computes_what_the_masked_convolution_does(options: dict[str, Any], keep: float) -> None:
    model = nn.Sequential(with_taps(nn.Conv2d(6, 7, **{"kernel_size": 3, **options}), keep))
    result = thin(model)
    for side in ((13, 10), (9, 16)):
        x = torch.randn(2, 6, *side)
        assert torch.allclose(result.model(x), model(x), atol=1e-6)
        assert torch.allclose(result.model(x[0]), model(x[0]), atol=1e-6)
    left, total = result.taps["0"]
    assert left == int((model[0].weight != 0).any(0).sum())  # type: ignore[union-attr, operator]
    assert total == model[0].weight[0].numel()  # type: ignore[index, union-attr, operator]


def test_its_gradients_and_flags_are_those_of_the_masked_convolution() -> None:
    model = nn.Sequential(with_taps(nn.Conv2d(3, 4, 3), 0.5)).double().train()
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    new = thin(model).model
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for net in (model, new):
        net(x).square().sum().backward()
    mix = new[0].mix  # type: ignore[index, union-attr]
    gradient = model[0].weight.grad.permute(0, 2, 3, 1)  # type: ignore[union-attr]
    left = (model[0].weight != 0).any(0).permute(1, 2, 0)  # type: ignore[union-attr, operator]
    assert torch.allclose(mix.weight.grad.flatten(1), gradient[:, left])  # type: ignore[union-attr]
    assert not mix.bias.requires_grad  # type: ignore[union-attr]
    assert new.training and new[0].training  # type: ignore[index]


class Net(nn.Module):
    """Two convolutions in a row; the second has lost taps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 8, 3, stride=2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x)))))
        return self.out(x.mean((2, 3)))


def holed() -> Net:
    """All taps of maps 2 and 5 are gone, one whole place of the kernel, and one tap of map 0."""
    net = Net().eval()
    with torch.no_grad():
        net.two.weight[:, [2, 5]] = 0
        net.two.weight[:, :, 0, 0] = 0
        net.two.weight[:, 0, 1, 1] = 0
    return net


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


def test_multiply_adds_are_those_of_the_thinner_product() -> None:
    dense, result = holed(), thin(holed())
    left = 4 * 8 - 1
    assert result.taps == {"two": (left, 54)}
    before, after = thinet.count(dense, X), thinet.count(result.model, X)
    places = 2 * 4 * 4
    assert before.by_module["two"].macs == places * 8 * 54
    assert after.by_module["two.mix"].macs == places * 8 * left
    assert before.macs - after.macs == places * 8 * (54 - left)
    assert after.params == before.params - 8 * (54 - left)


def test_maps_without_taps_are_named_to_be_cut_and_the_plans_follow_each_other(
    tmp_path: Path,
) -> None:
    dense = holed()
    keep = read_channels(dense, X)
    assert keep == {"one": (0, 1, 3, 4)}
    small = thinet.cut(dense, X, keep)
    assert torch.allclose(small(X), dense(X), atol=1e-6)
    result = thin(small)
    assert result.taps == {"two": (31, 36)}
    assert torch.allclose(result.model(X), dense(X), atol=1e-6)
    calibration = [torch.randn(8, 3, 9, 9)]
    pruned = thinet.prune(
        dense, X, calibration, budget=thinet.Budget(keep={"one": 4}), criterion="weight-sum",
        repair="none",
    )  # fmt: skip
    thinned = thin(pruned.model)
    plan = pruned.plan.then(thinned.plan)
    path = thinet.save(tmp_path / "thin.safetensors", thinned.model, plan)
    read = thinet.load(path, Net()).eval()
    assert torch.equal(read(X), thinned.model.eval()(X))
    assert thinet.load_plan(path) == plan


def test_channels_that_something_reads_stay() -> None:
    dense = holed()
    with torch.no_grad():
        dense.two.weight[3, 5, 2, 2] = 1e-3
    assert read_channels(dense, X) == {"one": (0, 1, 3, 4, 5)}
    nn.init.zeros_(dense.two.weight)
    assert read_channels(dense, X) == {"one": (0,)}
    assert read_channels(Net(), X) == {}


def test_it_is_read_back_from_the_dense_model_and_cut_on() -> None:
    result = thin(holed())
    groups = {g.name: g for g in thinet.find_groups(result.model, X)}
    assert "aten.index_select in two.taps picks entries" in (groups["one"].locked or "")
    assert groups["two.mix"].locked is None
    small = thinet.cut(result.model, X, {"two.mix": [0, 2, 7]})
    assert thinet.count(small, X).by_module["two.mix"].macs == 2 * 4 * 4 * 3 * 31


def test_whole_places_leave_the_channels_free_to_be_cut() -> None:
    net = Net().eval()
    with torch.no_grad():
        net.two.weight[:, :, 1] = 0
    small = thinet.cut(thin(net).model, X, {"one": [0, 1, 4]})
    assert small.two.mix.in_channels == 3 * 6  # type: ignore[union-attr]


def test_a_loaded_file_needs_no_weights_of_the_dense_model(tmp_path: Path) -> None:
    result = thin(holed())
    path = thinet.save(tmp_path / "thin.safetensors", result.model, result.plan)
    assert Plan.from_json(result.plan.to_json()) == result.plan
    with torch.device("meta"):
        empty = Net()
    assert torch.equal(thinet.load(path, empty).eval()(X), result.model(X))


def test_what_cannot_be_thinned_is_said() -> None:
    model = Depth()
    with torch.no_grad():
        for conv in (model.grouped, model.mirrored):
            conv.weight[:, 0] = 0
    with pytest.raises(OptionError, match="none of plain, grouped, mirrored, frozen is a conv"):
        thin(model)
    with pytest.raises(OptionError, match="grouped cannot be thinned: it has 2 groups"):
        thin(model, only="g*")
    with pytest.raises(OptionError, match=r"none of .* that fit p\* is a convolution with a tap"):
        thin(model, only=["p*"])
    nn.init.zeros_(model.plain.weight)
    with pytest.raises(OptionError, match="plain cannot be thinned: all its weights are zero"):
        thin(model)


@pytest.mark.parametrize("taps", [[], [[3, 0, None]], [[0, 0, [6]]]])
def test_a_plan_with_taps_outside_of_the_kernel_is_refused(taps: list[Any]) -> None:
    options = {
        "in_channels": 6, "out_channels": 8, "bias": True, "taps": taps, "kernel_size": [3, 3],
        "stride": [2, 2], "padding": [0, 0, 0, 0], "dilation": [1, 1],
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="the taps are none, or not within the kernel"):
        replace(Net(), (Replacement("two", "thin-convolution", options),))


def test_thin_layers_are_thinned_again_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    with_taps(dense[0], 0.5), with_taps(dense[2], 0.5)
    once = thin(dense)
    assert isinstance(once.model[0], ThinConv2d)
    with torch.no_grad():  # what more training may leave
        once.model[0].mix.weight[:, ::2] = 0
    twice = thin(once.model, only="0.mix")
    plan = once.plan.then(twice.plan)
    path = thinet.save(tmp_path / "thin.safetensors", twice.model, plan)
    x = torch.randn(2, 3, 8, 8)
    loaded = thinet.load(path, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)))
    assert torch.equal(loaded(x), twice.model(x))
    torch.testing.assert_close(loaded(x), once.model(x))


def test_replacements_that_fail_midway_are_undone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    first = model[0]
    gone = Replacement("0", "identity", {}), Replacement("5", "identity", {})
    with pytest.raises(CheckpointError, match="the plan replaces '5', a module that this Seq"):
        replace(model, gone)
    assert model[0] is first


def masked() -> nn.Conv2d:
    return prune.ln_structured(nn.Conv2d(4, 4, 3), "weight", 0.5, n=2, dim=1)


def hooked() -> nn.Conv2d:
    conv = with_taps(nn.Conv2d(4, 4, 3), 0.5)
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return conv


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (masked, "its weights are computed from others before each forward pass"),
        (lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3)), "its weights are computed from others"),
        (hooked, "it has hooks, which what takes its place would not have"),
    ],
)
def test_what_does_more_than_it_stores_is_not_thinned(make: Any, reason: str) -> None:
    model = nn.Sequential(with_taps(nn.Conv2d(3, 4, 3), 0.5), nn.ReLU(), make())
    with pytest.raises(OptionError, match=f"2 cannot be thinned: {reason}"):
        thin(model, only="2")
    result = thin(model)
    assert list(result.taps) == ["0"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(result.model(x), model(x))
    config = thinet.FinetuneConfig(lr=0.01, group_sparsity=thinet.GroupSparsity(0.01, keep=0.4))
    ends = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(x, torch.tensor([0, 1]))]
    tuned = thinet.finetune(ends, data, epochs=1, config=config).model
    left = (tuned[0][0].weight != 0).any(0)
    assert int(left.sum()) == 10  # of 27


def test_a_layer_under_two_names_is_left_whole() -> None:
    model = nn.Sequential(with_taps(nn.Conv2d(3, 3, 3), 0.5), nn.ReLU())
    model.append(model[0])
    with pytest.raises(OptionError, match="0 cannot be thinned: it stands in the model under sev"):
        thin(model, only="0")


def test_zeros_that_a_parametrization_changes_are_read() -> None:
    class PlusOne(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w + 1

    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, :4] = 0
    x = torch.randn(4, 3)
    assert read_channels(model, x) == {"0": (4, 5)}
    register_parametrization(model[2], "weight", PlusOne(), unsafe=True)
    with torch.no_grad():
        model[2].parametrizations.weight.original[:, :4] = 0
    assert read_channels(model, x) == {}
