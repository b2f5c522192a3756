"""Models by name: the three forms, and what is said when there is no such model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from thinet.errors import ModelError, OptionError
from thinet.models import resolve

SOURCE = """
from dataclasses import dataclass
from torch import nn
from beside import WIDTH

@dataclass
class Shape:
    width: int = WIDTH

def fixed():
    return nn.Linear(Shape().width, 2)

def sized(num_classes=5):
    return nn.Linear(3, num_classes)

def wrong():
    return "a model"

def failing():
    raise KeyError("depth")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 7\n")
    path = tmp_path / "nets_of_mine.py"
    path.write_text(SOURCE)
    return path


def test_a_torchvision_name() -> None:
    model = resolve("torchvision:mobilenet_v3_small", num_classes=4)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    assert not model.training


def test_a_backbone_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    model = resolve("torchvision:lraspp_mobilenet_v3_large", num_classes=2)
    assert sum(p.numel() for p in model.parameters()) > 1e6


def test_a_timm_name() -> None:
    model = resolve("timm:resnet10t", num_classes=3)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_function_of_a_file_with_and_without_classes(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve(f"{source}:fixed").in_features == 7
    assert not caplog.messages
    assert resolve(f"{source}:fixed", num_classes=9).out_features == 2
    assert caplog.messages == [f"{source}:fixed has no num_classes; 9 is not used"]
    assert resolve(f"{source}:sized").out_features == 5
    assert resolve(f"{source}:sized", num_classes=9).out_features == 9


def test_weights_are_loaded(source: Path) -> None:
    weights = {"weight": torch.arange(14.0).view(2, 7), "bias": torch.ones(2)}
    save_file(weights, source.parent / "w.safetensors")
    model = resolve(f"{source}:fixed", weights=source.parent / "w.safetensors")
    assert torch.equal(model.weight, weights["weight"])


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("torchvision:resnet51", "torchvision has no model 'resnet51'; did you mean .*resnet50"),
        ("timm:resnet10x", "timm has no model 'resnet10x'; did you mean .*resnet10t"),
        ("resnet50", "'resnet50' is not understood; models are named torchvision:NAME, timm:NAME"),
        ("torchvision:", "is not understood"),
        ("no/such.py:net", "there is no file no/such.py"),
    ],
)
def test_names_that_are_not_models(spec: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        resolve(spec)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("fixd", "has no function 'fixd'; did you mean fixed?"),
        ("wrong", "gives a str; it must return a torch.nn.Module"),
        ("failing", "cannot be built .no arguments.: KeyError: 'depth'"),
    ],
)
def test_functions_that_give_no_model(source: Path, function: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        resolve(f"{source}:{function}")


def test_a_file_with_a_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ny = x.missing\n")
    with pytest.raises(ModelError, match="AttributeError in line 2: 'int' object has no attribute"):
        resolve(f"{path}:net")


def test_a_device_that_is_not_there(source: Path) -> None:
    with pytest.raises(OptionError, match="device 'warp:3' cannot be used"):
        resolve(f"{source}:fixed", device="warp:3")


def test_the_model_is_a_fresh_one_each_time(source: Path) -> None:
    first, second = resolve(f"{source}:fixed"), resolve(f"{source}:fixed")
    assert isinstance(first, nn.Linear)
    assert first is not second
    assert not torch.equal(first.weight, second.weight)
