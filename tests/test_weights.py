"""Weights files: no code is run, and what does not fit is named entry by entry."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from thinet.errors import CheckpointError, ModelError
from thinet.weights import load_weights, read_weights


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3))


class Bomb:
    """A pickle that leaves a file behind when it is read with code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_and_prefixed_files_load(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, target = net(), net()
    weights: dict[str, Any] = {prefix + name: t for name, t in source.state_dict().items()}
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "w.pt")
    load_weights(target, tmp_path / "w.pt")
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_only_a_prefix_of_all_names_is_taken_off(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors")) == {"module.a", "b"}


def test_wrong_names_and_shapes_are_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    weights = {name: tensor.clone() + 1 for name, tensor in net().state_dict().items()}
    weights["0.weight"] = torch.zeros(5, 1, 3, 3)
    weights["head.bias"] = weights.pop("2.bias")
    save_file(weights, tmp_path / "w.safetensors")
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_weights(model, tmp_path / "w.safetensors", "model mine")
    text = str(caught.value)
    assert "are not those of model mine" in text
    assert "1 missing in the file: 2.bias (3,)" in text
    assert "1 not in the model: head.bias (3,)" in text
    assert "0.weight ((5, 1, 3, 3) in the file, (2, 1, 3, 3) in the model)" in text
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_many_mismatches_are_counted(tmp_path: Path) -> None:
    save_file({f"x{i}": torch.ones(1) for i in range(7)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"7 not in the model: .* and 3 more"):
        load_weights(net(), tmp_path / "w.safetensors")


def test_another_number_of_classes_gives_advice(tmp_path: Path) -> None:
    weights = {**net().state_dict(), "2.weight": torch.ones(9, 4), "2.bias": torch.ones(9)}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="only the classifier differs, give num_classes"):
        load_weights(net(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "w.pt", tmp_path / "exploded"
    if kind == "torch":
        torch.save({"weights": Bomb(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(CheckpointError, match="is refused: it is a pickle that would run code"):
        read_weights(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pt"):
        torch.save(net().state_dict(), path)
    else:
        save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="truncated"):
        read_weights(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": torch.ones(1), "epoch": 3}, "holds other things than tensors: epoch"),
        ([torch.ones(1)], "holds a list; a dict of named tensors is needed"),
        ({}, "holds nothing; a dict of named tensors is needed"),
    ],
)
def test_files_without_named_tensors(tmp_path: Path, content: Any, text: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=text):
        read_weights(tmp_path / "w.pt")


def test_a_missing_file() -> None:
    with pytest.raises(CheckpointError, match="there is no weights file no/such"):
        read_weights("no/such.safetensors")


def test_what_a_module_keeps_beside_tensors_is_none_of_the_file(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    model, other = Counting(3, 2), nn.Linear(3, 2)
    save_file(dict(other.state_dict()), tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.weight, other.weight)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    kept = model.weight.clone()
    whole = {name: (tensor * 100).to(torch.int8) for name, tensor in model.state_dict().items()}
    save_file(whole, tmp_path / "int8.safetensors")
    with pytest.raises(
        ModelError, match=r"another kind of number: bias \(int8 in the file, float32"
    ):
        load_weights(model, tmp_path / "int8.safetensors")
    assert torch.equal(model.weight, kept)
    with pytest.raises(CheckpointError, match="is a folder; give the weights file in it"):
        read_weights(tmp_path)


def test_one_of_tied_weights_is_enough(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self, tied: bool = True) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            if tied:
                self.b.weight = self.a.weight

    source, path = Tied(), tmp_path / "tied.safetensors"
    save_model(source, str(path))
    model = Tied()
    load_weights(model, path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())
    with pytest.raises(ModelError, match=r"1 missing in the file: b.weight \(4, 4\)"):
        load_weights(Tied(tied=False), path)


def test_a_model_with_a_part_named_module_gets_its_own_names(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 2)

    source, path = Inner(), tmp_path / "ddp.safetensors"
    save_file({"module." + name: t for name, t in source.state_dict().items()}, path)
    model = Inner()
    load_weights(model, path)
    assert torch.equal(model.module.weight, source.module.weight)
