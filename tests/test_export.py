"""Exported files compute what the torch model computes, for any batch, or are not left behind."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import thinet
from thinet.errors import ExportError, MissingExtraError, OptionError
from thinet.export import onnx as onnx_files
from thinet.export import to_exported_program, to_onnx
from thinet.export.check import largest_error, resized
from thinet.types import ExampleInputs

IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.conv2(self.norm(self.conv1(x)).relu())).relu()
        return self.fc(x.mean((2, 3)))


class Difference(nn.Module):
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"gap": first - 2 * second, "sum": (first + second).sum(1)}


class FixedBatchNet(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1, 4).sum(1)


class DataDependentNet(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if bool(x.sum() > 0) else -x


class NoisyNet(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


@pytest.fixture
def small() -> nn.Module:
    """A network that was cut; 12 inner channels became 5."""
    torch.manual_seed(0)
    model = ResidualNet().eval()
    model.norm.running_mean.normal_()
    return thinet.cut(model, IMAGE, {"conv1": [0, 2, 5, 6, 11]})


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def run_onnx(path: Path, *inputs: torch.Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})


def test_onnx_of_a_cut_network_gives_its_numbers(small: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(small.state_dict())
    small.train()
    done = to_onnx(small, IMAGE, tmp_path / "small.onnx")
    assert small.training and all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    assert (done.opset, done.batches, done.bytes) == (20, (1, 2, 3), done.path.stat().st_size)
    assert 0 <= done.error < 1e-5
    small.eval()
    for batch in (1, 7):
        ((got,), wanted) = run_onnx(done.path, images(batch)), small(images(batch))
        assert np.abs(got - wanted.detach().numpy()).max() < 1e-5
    file = onnx.load(str(done.path))
    assert [(o.domain, o.version) for o in file.opset_import if not o.domain] == [("", 20)]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    shapes = {tuple(weight.dims) for weight in file.graph.initializer}
    assert {(5, 8, 3, 3), (8, 5, 3, 3)} <= shapes  # the cut is in the file, no masks


def test_an_exported_program_gives_its_numbers(small: nn.Module, tmp_path: Path) -> None:
    done = to_exported_program(small, IMAGE, tmp_path / "small.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt2"]
    assert (done.opset, done.batches, done.bytes) == (None, (1, 2, 3), done.path.stat().st_size)
    loaded = torch.export.load(done.path).module()
    assert torch.allclose(loaded(images(7)), small(images(7)), rtol=0, atol=1e-6)


def test_named_inputs_in_another_order_and_several_outputs(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    done = to_onnx(Difference(), {"second": b, "first": a}, tmp_path / "two.onnx")
    session = onnxruntime.InferenceSession(str(done.path))
    gap, total = session.run(None, {"first": a.numpy(), "second": b.numpy()})
    assert np.allclose(gap, (a - 2 * b).numpy())
    assert np.allclose(total, (a + b).sum(1).numpy())
    to_exported_program(Difference(), {"second": b, "first": a}, tmp_path / "two.pt2")
    loaded = torch.export.load(tmp_path / "two.pt2").module()
    assert torch.equal(loaded(second=b, first=a)["gap"], a - 2 * b)


WRITERS = [pytest.param(to_onnx, "a.onnx", id="onnx"), pytest.param(to_exported_program, "a.pt2")]
Writer = Callable[..., Any]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_a_model_of_one_batch_size_is_exported_with_that(
    write: Writer, name: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ExportError, match=r"FixedBatchNet .*dynamic_batch=False the batch stays"):
        write(FixedBatchNet(), x, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert write(FixedBatchNet(), x, tmp_path / name, dynamic_batch=False).batches == (2,)


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_what_differs_is_not_kept(
    write: Writer, name: str, small: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("the old file")
    with pytest.raises(ExportError, match=r"output 0 of .* differs from .* no file was kept"):
        write(NoisyNet(), IMAGE, tmp_path / name)
    with pytest.raises(ExportError, match="cannot follow DataDependentNet"):
        write(DataDependentNet(), IMAGE, tmp_path / name, dynamic_batch=False)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "the old file")]
    write(small, IMAGE, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000


def test_differences_are_relative_and_every_shape_counts() -> None:
    double, one = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0]])
    nn.init.constant_(double.weight, 200.0)

    def error(*outputs: torch.Tensor) -> float:
        def run(_: ExampleInputs) -> Sequence[torch.Tensor]:
            return outputs

        return largest_error(double, [one], run, what="it", tolerance=0.01)

    assert error(torch.tensor([[201.0]])) == pytest.approx(1 / 200)
    for wrong in (torch.tensor([[203.0]]), torch.tensor([[torch.nan]])):
        with pytest.raises(ExportError, match="output 0 of it differs"):
            error(wrong)
    for outputs in ((torch.tensor([200.0]),), (), (torch.ones(1, 1), torch.ones(1, 1))):
        with pytest.raises(ExportError, match="gives outputs of shapes"):
            error(*outputs)


def test_batches_are_made_of_the_examples_in_turns() -> None:
    given = {"x": torch.tensor([[1.0], [2.0]]), "scale": torch.tensor(3.0), "n": 4}
    made: Any = resized(given, 3)
    assert made["x"].tolist() == [[1.0], [2.0], [1.0]]
    assert (made["scale"].item(), made["n"]) == (3.0, 4)


@pytest.mark.parametrize("opset", [17, 99, 20.0, True])
def test_an_opset_that_cannot_be_written_is_refused(
    opset: Any, small: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"opset .* cannot be written; torch .* know 18 to \d\d"):
        to_onnx(small, IMAGE, tmp_path / "small.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_an_opset_that_was_not_reached_is_an_error(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnx_files._translated
    monkeypatch.setattr(onnx_files, "_translated", lambda found, _, name: real(found, 18, name))
    with pytest.raises(ExportError, match="convert the model to opset 20, it would be 18"):
        to_onnx(small, IMAGE, tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []
    assert to_onnx(small, IMAGE, tmp_path / "small.onnx", opset=18).opset == 18


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(
    package: str, small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is needed .*thinet\[export\]"):
        to_onnx(small, IMAGE, tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []
    to_exported_program(small, IMAGE, tmp_path / "small.pt2")  # needs none of them


def test_bad_names_are_refused_before_any_work(tmp_path: Path) -> None:
    for write, path, error, text in (
        (to_onnx, tmp_path / "a.pt2", OptionError, "must end with .onnx"),
        (to_exported_program, tmp_path / "a.onnx", OptionError, "must end with .pt2"),
        (to_onnx, tmp_path / "no" / "a.onnx", ExportError, "there is no folder"),
    ):
        with pytest.raises(error, match=text):
            write(DataDependentNet(), IMAGE, path)
    (tmp_path / "b.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        to_onnx(DataDependentNet(), IMAGE, tmp_path / "b.onnx")
    with pytest.raises(OptionError, match="tolerance lies between 0 and 1"):
        to_onnx(DataDependentNet(), IMAGE, tmp_path / "c.onnx", tolerance=-1)


def test_a_model_that_masks_with_infinities_is_exported(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.net(x)
            return y.masked_fill(y < 0, float("-inf"))

    torch.manual_seed(0)
    x = torch.randn(3, 3, 2, 2)
    assert bool(Masked()(x).isinf().any())
    to_exported_program(Masked(), x, tmp_path / "masked.pt2")
    assert (tmp_path / "masked.pt2").exists()


def test_a_model_of_no_finite_number_and_no_model_at_all_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(ExportError, match="output 0 of the model itself holds no finite number"):
        to_exported_program(model, torch.randn(3, 3, 2, 2), tmp_path / "nan.pt2")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match=r"the model is a torch.nn.Module; got str"):
        to_onnx("model", torch.randn(3, 3, 2, 2), tmp_path / "m.onnx")  # type: ignore[arg-type]
