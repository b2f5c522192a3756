"""Files of pruned models: bit for bit there and back, and every file that is not one."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import thinet
from tests.more_nets import TiedEmbeddingNet
from tests.nets import BatchNormVGG, BufferScaleNet, ConcatNet, FrozenNet, Net
from tests.oracle import call, outputs, randomise
from thinet import checkpoint
from thinet.checkpoint import KEY, load, load_plan, save
from thinet.cut import apply_to_copy
from thinet.errors import CheckpointError, UnknownGroupError
from thinet.plan import AttributeChange, Plan
from thinet.trace.analyse import analyse
from thinet.trace.planning import make_plan


def pruned(cls: type[Net] = BatchNormVGG, dtype: torch.dtype = torch.float32) -> Any:
    """A cut model, its plan and its inputs."""
    return copy.deepcopy(_pruned(cls, dtype))


@functools.cache
def _pruned(cls: type[Net], dtype: torch.dtype) -> Any:
    model = randomise(cls()).eval().to(dtype)
    inputs = model.example()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    analysis = analyse(model, inputs)
    keep = {
        g.name: list(range(0, g.channels, 2))
        for g in analysis.groups
        if g.locked is None and g.channels > 1
    }
    assert keep
    plan = make_plan(analysis, model, keep)
    return apply_to_copy(model, plan), plan, inputs


@pytest.fixture
def written(tmp_path: Path) -> Path:
    small, plan, _ = pruned()
    return save(tmp_path / "small.safetensors", small, plan)


# --- there and back -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls", [BatchNormVGG, BufferScaleNet, ConcatNet, FrozenNet, TiedEmbeddingNet]
)
def test_a_file_gives_the_same_model_back(cls: type[Net], tmp_path: Path) -> None:
    small, plan, inputs = pruned(cls)
    path = save(tmp_path / "small.safetensors", small, plan)
    dense = cls()
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    found = load(path, dense).eval()
    ours, theirs = found.state_dict(), small.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    frozen = {n for n, p in small.named_parameters() if not p.requires_grad}
    assert {n for n, p in found.named_parameters() if not p.requires_grad} == frozen
    with torch.no_grad():
        assert all(map(torch.equal, outputs(found, inputs), outputs(small, inputs)))
    assert all(torch.equal(before[n], t) for n, t in dense.state_dict().items())
    assert load_plan(path) == plan


def test_a_cut_by_hand_is_saved_with_its_plan(tmp_path: Path) -> None:
    model: Any = randomise(BatchNormVGG()).eval()
    x = model.example()
    name = next(g.name for g in thinet.find_groups(model, x) if g.locked is None)
    before = copy.deepcopy(model.state_dict())
    plan = thinet.plan_cut(model, x, {name: [2, 0]})
    assert dict(plan.keep) == {name: (0, 2)}
    small = thinet.cut(model, x, {name: [0, 2]})
    again = load(save(tmp_path / "small.safetensors", small, plan), BatchNormVGG().eval())
    assert torch.equal(again(x), small(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UnknownGroupError, match="no group is named 'nowhere'"):
        thinet.plan_cut(model, x, {"nowhere": [0]})


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    small, plan, _ = pruned(TiedEmbeddingNet)
    path = save(tmp_path / "small.safetensors", small, plan)
    tied = {n for n, _ in small.named_parameters(remove_duplicate=False)} - {
        n for n, _ in small.named_parameters()
    }
    assert tied and not tied & load_file(path).keys()
    found = load(path, TiedEmbeddingNet())
    both = [p for _, p in found.named_parameters(remove_duplicate=False)]
    assert len({id(p) for p in both}) == len(both) - len(tied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_file_says_the_type(dtype: torch.dtype, tmp_path: Path) -> None:
    small, plan, _ = pruned(dtype=dtype)
    found = load(save(tmp_path / "s.safetensors", small, plan), BatchNormVGG().eval())
    for name, tensor in small.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor)
    found = load(tmp_path / "s.safetensors", BatchNormVGG().half())
    assert found.features[0].weight.dtype == dtype


def test_the_dense_model_may_have_no_data_or_other_memory(tmp_path: Path) -> None:
    small, plan, inputs = pruned()
    path = save(tmp_path / "small.safetensors", small.to(memory_format=torch.channels_last), plan)
    with torch.device("meta"):
        empty = BatchNormVGG()
    last = BatchNormVGG().to(memory_format=torch.channels_last)
    for dense in (empty, last):
        found = load(path, dense).eval()
        with torch.no_grad():
            assert torch.allclose(call(found, inputs), call(small, inputs), atol=1e-6)
    assert next(empty.parameters()).is_meta
    assert found.features[0].weight.is_contiguous(memory_format=torch.channels_last)


class TiedConvs(nn.Module):
    """Two convolutions of one weight behind one that can be cut, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.b.weight = self.a.weight
        self.over = nn.LSTM(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(torch.relu(self.first(x)))))
        return self.over(x.mean(3).permute(2, 0, 1))[0]


def test_tied_weights_of_a_dense_model_without_data_stay_tied(tmp_path: Path) -> None:
    model = TiedConvs().eval()
    path = save(tmp_path / "tied.safetensors", model, Plan())
    with torch.device("meta"):
        dense = TiedConvs()
    found: Any = load(path, dense).eval()
    assert found.b.weight is found.a.weight
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(found(x), model(x))
    assert dense.a.weight.is_meta and dense.b.weight is dense.a.weight


def test_tensors_that_share_memory_without_being_tied_are_written_whole(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pool = torch.arange(6.0)
            self.register_buffer("left", pool[:4])
            self.register_buffer("right", pool[2:])
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.left * self.right)

    path = save(tmp_path / "flat.safetensors", Flat(), Plan())
    found = load(path, Flat())
    assert found.left.tolist() == [0, 1, 2, 3] and found.right.tolist() == [2, 3, 4, 5]


def test_a_fresh_process_loads_it_and_gives_the_same(tmp_path: Path) -> None:
    small, plan, inputs = pruned()
    path = save(tmp_path / "small.safetensors", small, plan)
    torch.save(inputs, tmp_path / "x.pt")
    code = f"""
import torch, thinet
from tests.nets import BatchNormVGG
model = thinet.load({str(path)!r}, BatchNormVGG()).eval()
with torch.no_grad():
    y = model(torch.load({str(tmp_path / "x.pt")!r}, weights_only=True))
torch.save(y, {str(tmp_path / "y.pt")!r})
"""
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    with torch.no_grad():
        expected = small(inputs)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt", weights_only=True), expected)


def test_the_file_is_plain_safetensors_with_the_plan_as_json(written: Path) -> None:
    with safe_open(written, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata[KEY])["format"] == 1
    assert written.stat().st_mode & 0o777 == 0o644


def test_an_existing_file_is_replaced_and_nothing_else_is_left(written: Path) -> None:
    small, plan, _ = pruned()
    with torch.no_grad():
        next(small.parameters()).fill_(7)
    save(str(written), small, plan)
    assert next(load(written, BatchNormVGG()).parameters()).eq(7).all()
    assert [p.name for p in written.parent.iterdir()] == ["small.safetensors"]


# --- what cannot be written -----------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_a_write_that_stops_leaves_the_old_file(
    error: type[BaseException], written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = written.read_bytes()

    def half(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(old[: len(old) // 2])
        raise error("no space left")

    monkeypatch.setattr(checkpoint, "save_file", half)
    small, plan, _ = pruned()
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected, match="no space left"):
        save(written, small, plan)
    assert written.read_bytes() == old
    assert [p.name for p in written.parent.iterdir()] == ["small.safetensors"]


def test_folders_that_cannot_be_written_are_named(written: Path) -> None:
    small, plan, _ = pruned()
    with pytest.raises(CheckpointError, match=r"cannot write into the folder .*missing \(No such"):
        save(written.parent / "missing" / "a.safetensors", small, plan)
    with pytest.raises(CheckpointError, match=r"small.safetensors \(Not a directory\); make it"):
        save(written / "a.safetensors", small, plan)
    (written.parent / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*folder: .*[Dd]irectory"):
        save(written.parent / "folder", small, plan)
    assert sorted(p.name for p in written.parent.iterdir()) == ["folder", "small.safetensors"]


def test_a_plan_of_another_model_is_not_written(tmp_path: Path) -> None:
    small, plan, _ = pruned()
    text = r"the plan keeps 3 entries of features.0.weight along dimension 0, the model has 6"
    with pytest.raises(CheckpointError, match=text):
        save(tmp_path / "a.safetensors", BatchNormVGG(), plan)
    with pytest.raises(CheckpointError, match=r"features.0.weight .* the model has None"):
        save(tmp_path / "a.safetensors", nn.Linear(2, 2), plan)
    with pytest.raises(CheckpointError, match="needs the plan that made the model.*; got None"):
        save(tmp_path / "a.safetensors", small, None)  # type: ignore[arg-type]
    far = replace(plan, kept=(replace(plan.kept[0], dim=7),))
    with pytest.raises(CheckpointError, match=r"along dimension 7, the model has None"):
        save(tmp_path / "a.safetensors", small, far)
    odd = Plan(plan.keep, plan.kept, plan.attributes, plan.replaced, {"criterion": object()})
    with pytest.raises(CheckpointError, match="the plan's settings cannot be written as JSON"):
        save(tmp_path / "a.safetensors", small, odd)
    assert not list(tmp_path.iterdir())


def test_a_result_in_place_of_its_model_is_named(tmp_path: Path) -> None:
    small, plan, inputs = pruned()
    result = thinet.prune(small, inputs, [inputs], budget=thinet.Budget(keep=0.9))
    with pytest.raises(CheckpointError, match=r"needs the model.*got PruneResult: give result.mod"):
        save(tmp_path / "a.safetensors", result, result.plan)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="needs the model, a module; got OrderedDict: give"):
        save(tmp_path / "a.safetensors", small.state_dict(), plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extra", [{"epoch": 3}, torch.ones(2)])
def test_state_beside_the_tensors_is_refused(tmp_path: Path, extra: Any) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return extra

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(CheckpointError, match="_extra_state of the model is state beside its tens"):
        save(tmp_path / "a.safetensors", Extra(2, 2), Plan())
    assert not list(tmp_path.iterdir())


def test_a_type_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("turn", torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(CheckpointError, match="turn of the model is torch.complex128, which a saf"):
        save(tmp_path / "a.safetensors", model, Plan())
    with pytest.raises(CheckpointError, match="is no name of a file"):
        save("a\0b", nn.Linear(2, 2), Plan())
    assert not list(tmp_path.iterdir())


class Noting(nn.Module):
    """Notes a mask of the length it was last run on; its table of places is expanded."""

    mask: Tensor | None
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("places", torch.arange(4.0).expand(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        if self.mask is None or self.mask.shape[0] != size:
            self.mask = torch.ones(size, size).tril()
        return self.mask @ self.b((self.a(x + self.places[0])).relu())


@pytest.mark.parametrize("run_before", [0, 5, 9])
@pytest.mark.parametrize("saved_with", [0, 5])
def test_what_a_forward_notes_may_differ(tmp_path: Path, saved_with: int, run_before: int) -> None:
    model = randomise(Noting()).eval()
    x = torch.randn(2, 5, 4)
    result = thinet.prune(model, x, x, budget=thinet.Budget(keep={"a": 3}))
    if saved_with:
        result.model(x)
    path = save(tmp_path / "a.safetensors", result.model, result.plan)
    dense = Noting()
    if run_before:
        dense(torch.randn(2, run_before, 4))
    loaded = load(path, dense)
    expected = saved_with or run_before
    assert (loaded.mask is None) == (expected == 0)
    assert loaded.mask is None or loaded.mask.shape[0] == expected
    assert torch.equal(loaded(x), result.model(x))
    loaded.places[0, 0] = 7.0  # each entry in a place of its own
    assert loaded.places[1, 0] == 0


# --- what cannot be read --------------------------------------------------------------------


def refused(path: Path, text: str, dense: nn.Module | None = None) -> None:
    dense = BatchNormVGG() if dense is None else dense
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    with pytest.raises(CheckpointError, match=text):
        load(path, dense)
    assert all(torch.equal(before[n], t) for n, t in dense.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(share: float, written: Path) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: int(len(data) * share)])
    refused(written, r"small.safetensors is not a whole safetensors file \(.*\); thinet reads no")


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "there is no file .*none.safetensors")
    refused(tmp_path, "there is no file|is not a whole safetensors file")
    with (tmp_path / "p.safetensors").open("wb") as file:
        pickle.dump({"a": 1}, file)
    refused(tmp_path / "p.safetensors", "is not a whole safetensors file")
    torch.save(BatchNormVGG().state_dict(), tmp_path / "p.pt")
    refused(tmp_path / "p.pt", "is not a whole safetensors file")


def test_files_without_a_plan_or_with_a_bad_one(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", {"w": torch.ones(2)}
    save_file(tensors, path)
    refused(path, "a.safetensors holds no plan; it was not written by thinet.save")
    save_file(tensors, path, metadata={KEY: "{"})
    refused(path, "the plan in .*a.safetensors is not JSON")
    save_file(tensors, path, metadata={KEY: "[]"})
    refused(path, "a.safetensors: this is not a thinet plan")
    newer = json.dumps(Plan().to_json() | {"format": 9})
    save_file(tensors, path, metadata={KEY: newer})
    refused(path, "a.safetensors: the plan has format 9, this version of thinet reads format 1")


def test_the_wrong_model_is_named(written: Path) -> None:
    refused(written, "which this Linear does not have; give the dense model", nn.Linear(2, 2))
    small, _, _ = pruned()
    refused(
        written, "but it has only 3; give the dense model that the plan was made for, uncut", small
    )
    wider = BatchNormVGG()
    wider.classifier[5] = nn.Linear(7, 9)
    refused(written, r"classifier.5.weight is \(4, 4\) in the file and \(9, 4\) in the cut", wider)


def test_wrong_names_are_listed(written: Path) -> None:
    _, plan, _ = pruned()
    tensors = load_file(written)
    tensors["head.weight"] = tensors.pop("classifier.5.weight")
    save_file(tensors, written, metadata={KEY: json.dumps(plan.to_json())})
    refused(
        written,
        "does not fit this BatchNormVGG: it lacks classifier.5.weight and has head.weight too many",
    )
    assert load_plan(written) == plan


def rewrite(path: Path, plan: Plan, **tensors: Tensor) -> None:
    """A file's tensors, some of them others, with this plan."""
    save_file({**load_file(path), **tensors}, path, metadata={KEY: json.dumps(plan.to_json())})


def test_a_plan_whose_indices_do_not_fit_is_refused(written: Path) -> None:
    plan = load_plan(written)
    narrow, wide = plan.kept[0], max(plan.kept, key=lambda piece: max(piece.indices))
    for odd, text in (
        (replace(wide, parameter=narrow.parameter, dim=narrow.dim), "index|twice"),
        (replace(narrow, indices=(0,)), f"{narrow.parameter} along dimension 0 twice, which no"),
        (replace(narrow, dim=-5), f"cuts {narrow.parameter} along dimension -5, which this"),
    ):
        rewrite(written, replace(plan, kept=(*plan.kept, odd)))
        refused(written, text)


def test_a_parameter_of_whole_numbers_is_refused(written: Path) -> None:
    whole = load_file(written)["features.0.weight"].long()
    rewrite(written, load_plan(written), **{"features.0.weight": whole})
    refused(written, "holds features.0.weight as torch.int64, the model has it as torch.float32")


@pytest.mark.parametrize("attribute", ["forward", "__class__", "train", "weight", "_modules"])
def test_a_plan_that_sets_what_no_plan_does_is_refused(attribute: str, written: Path) -> None:
    plan = load_plan(written)
    path = next(s.parameter for s in plan.kept).rpartition(".")[0]
    changes = (*plan.attributes, AttributeChange(path, attribute, 3))
    rewrite(written, replace(plan, attributes=changes))
    with pytest.raises(CheckpointError, match=f"the plan sets {attribute} of .*do not use"):
        load(written, BatchNormVGG())


def test_wrapped_and_unmade_models_are_told_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x, keep = torch.randn(2, 4), {"0": [0, 1]}
    plan, small = thinet.plan_cut(model, x, keep), thinet.cut(model, x, keep)
    path = tmp_path / "small.safetensors"
    with pytest.raises(CheckpointError, match=r"compiled; save model\._orig_mod"):
        thinet.save(path, torch.compile(small, backend="eager"), plan)
    with pytest.raises(CheckpointError, match=r"save model\.module with the plan"):
        thinet.save(path, nn.DataParallel(small), plan)
    thinet.save(path, small, plan)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(CheckpointError, match="0.weight has no size yet"):
        thinet.load(path, lazy)
