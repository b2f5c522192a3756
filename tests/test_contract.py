"""What `find_groups`, `slices` and `cut` promise, whatever the network."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from typing import Any

import pytest
import torch
from torch import nn

import thinet
from tests.more_nets import DictInputNet, MultiheadAttentionNet, TiedEmbeddingNet, every_net
from tests.nets import (
    BasicResidualNet,
    BatchNormVGG,
    ChannelShuffleNet,
    ConcatNet,
    FrozenNet,
    GLUNet,
    HookNet,
    InputResidualNet,
    Net,
    OptionANet,
    PixelShuffleNet,
    PlainVGG,
    SENet,
)
from tests.oracle import all_tensors, assert_untouched, distance, outputs, randomise, snapshot
from tests.view_nets import ChunkNet, FlipChannelsNet, PermuteThenFlattenNet, RepeatNet
from thinet.errors import LockedGroupError, ThinetError, UnknownGroupError

torch.set_num_threads(1)


def prepared(cls: type[Net] = BatchNormVGG) -> tuple[Any, Any]:
    model = randomise(cls()).eval()
    return model, model.example()


@functools.cache
def groups_of(cls: type[Net]) -> tuple[Any, ...]:
    return thinet.find_groups(*prepared(cls))


# --- groups and slices ----------------------------------------------------------------------


@pytest.mark.parametrize("cls", every_net(), ids=lambda c: c.__name__)
def test_groups_are_well_formed(cls: type[Net]) -> None:
    model, groups = prepared(cls)[0], groups_of(cls)
    tensors = all_tensors(model)
    first = {id(t): n for n, t in reversed(tensors.items())}
    modules = dict(model.named_modules())
    assert isinstance(groups, tuple)
    names = [g.name for g in groups]
    assert len(set(names)) == len(names), names
    for g in groups:
        assert isinstance(g.name, str)
        assert isinstance(g.channels, int)
        assert g.channels >= 1
        assert g.locked is None or isinstance(g.locked, str)
        assert isinstance(g.producers, tuple)
        assert isinstance(g.consumers, tuple)
        for path in (*g.producers, *g.consumers):
            assert path in modules or path in tensors, path
        for s in g.slices(range(g.channels)):
            assert isinstance(s.dim, int)
            assert isinstance(s.indices, tuple)
            assert first[id(tensors[s.parameter])] == s.parameter, "the first name of a tied tensor"
            assert 0 <= s.dim < tensors[s.parameter].dim()
            size = tensors[s.parameter].shape[s.dim]
            assert list(s.indices) == sorted(set(s.indices))
            assert s.indices[0] >= 0
            assert s.indices[-1] < size


@pytest.mark.parametrize("cls", every_net(), ids=lambda c: c.__name__)
def test_slices_of_a_set_are_the_union_of_its_members_slices(cls: type[Net]) -> None:
    def entries(group: Any, units: Any) -> set[tuple[str, int, int]]:
        return {(s.parameter, s.dim, i) for s in group.slices(units) for i in s.indices}

    for group in groups_of(cls):
        singles = [entries(group, [i]) for i in range(group.channels)]
        if group.locked is None:
            assert all(singles), "each unit takes something with it"
        for a, b in itertools.combinations(range(group.channels), 2):
            assert entries(group, [b, a]) == singles[a] | singles[b]
            assert group.locked or not singles[a] & singles[b], "an entry belongs to one unit"
        assert entries(group, range(group.channels)) == set().union(*singles)
        assert group.slices([]) == ()


def test_no_entry_is_in_two_groups() -> None:
    for cls in every_net():
        seen: dict[tuple[str, int, int], str] = {}
        for group in groups_of(cls):
            for s in group.slices(range(group.channels)) if group.locked is None else ():
                for i in s.indices:
                    key = (s.parameter, s.dim, i)
                    other = seen.setdefault(key, group.name)
                    assert other == group.name, (cls, key)


@pytest.mark.parametrize("cls", every_net(), ids=lambda c: c.__name__)
def test_finding_groups_is_deterministic_and_leaves_no_trace(cls: type[Net]) -> None:
    model, inputs = prepared(cls)
    before = snapshot(model)
    first = thinet.find_groups(model, inputs)
    assert_untouched(before, model)
    torch.manual_seed(123)
    assert thinet.find_groups(copy.deepcopy(model), inputs) == first == groups_of(cls)


def test_the_weights_and_the_mode_do_not_change_the_groups() -> None:
    model, inputs = prepared(SENet)
    want = thinet.find_groups(model, inputs)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert thinet.find_groups(model, inputs) == want
    model.train()
    before = snapshot(model)
    assert [g.name for g in thinet.find_groups(model, inputs)] == [g.name for g in want]
    assert_untouched(before, model)


def test_producers_and_consumers_of_a_residual_stream() -> None:
    model, inputs = prepared(BasicResidualNet)
    groups = {g.name: g for g in thinet.find_groups(model, inputs)}
    assert set(groups["stem"].producers) == {"stem", "conv2"}
    assert set(groups["stem"].consumers) == {"conv1", "fc"}
    assert groups["conv1"].producers == ("conv1",)
    assert groups["conv1"].consumers == ("conv2",)


def test_slices_of_a_concatenation_by_hand() -> None:
    model, inputs = prepared(ConcatNet)
    groups = {g.name: g for g in thinet.find_groups(model, inputs)}
    found = {(s.parameter, s.dim): s.indices for s in groups["b"].slices([1, 4])}
    follows = {(f"bn.{n}", 0): (5, 8) for n in ("weight", "bias", "running_mean", "running_var")}
    rows = {("b.weight", 0): (1, 4), ("b.bias", 0): (1, 4)}
    assert found == rows | follows | {("c.weight", 1): (5, 8)}


def test_slices_of_a_flatten_by_hand() -> None:
    model, inputs = prepared(PlainVGG)
    groups = {g.name: g for g in thinet.find_groups(model, inputs)}
    found = {(s.parameter, s.dim): s.indices for s in groups["features.2"].slices([3])}
    rows = {("features.2.weight", 0): (3,), ("features.2.bias", 0): (3,)}
    assert found == rows | {("classifier.0.weight", 1): tuple(range(27, 36))}


def rows(cls: type[Net], unit: int) -> set[tuple[str, int, tuple[int, ...]]]:
    """What goes with a unit of the group that starts at conv1."""
    group = next(g for g in groups_of(cls) if g.name.startswith("conv1") and g.locked is None)
    return {(s.parameter, s.dim, s.indices) for s in group.slices([unit])}


def test_slices_of_equal_pieces_by_hand() -> None:
    """Unit 1 is channel 1 of both pieces: `chunk(2)` would deal unequal pieces anew."""
    conv1 = {("conv1.weight", 0, (1, 5)), ("conv1.bias", 0, (1, 5))}
    assert rows(GLUNet, 1) == conv1 | {("conv2.weight", 1, (1,))}
    assert rows(ChunkNet, 1) == conv1 | {("a.weight", 1, (1,)), ("b.weight", 1, (1,))}


def test_slices_through_views_by_hand() -> None:
    conv1 = {("conv1.weight", 0, (1,)), ("conv1.bias", 0, (1,))}
    assert rows(FlipChannelsNet, 1) == conv1 | {("conv2.weight", 1, (4,))}
    columns = tuple(range(1, 36, 4))
    assert rows(PermuteThenFlattenNet, 1) == conv1 | {("fc1.weight", 1, columns)}
    assert rows(RepeatNet, 1) == conv1 | {("conv2.weight", 1, (2, 3, 10, 11))}
    four = tuple(range(4, 8))
    pixel = {("conv1.weight", 0, four), ("conv1.bias", 0, four)}
    assert rows(PixelShuffleNet, 1) == pixel | {("conv2.weight", 1, (1,))}
    pair = {("conv1.weight", 0, (1, 5)), ("conv1.bias", 0, (1, 5))}
    assert rows(ChannelShuffleNet, 1) == pair | {("conv2.weight", 1, (2, 3))}


def test_slices_of_a_padded_shortcut_by_hand() -> None:
    group = next(g for g in groups_of(OptionANet) if g.name == "stem")
    found = {(s.parameter, s.dim): s.indices for s in group.slices([1])}
    stem = {("stem.weight", 0): (1,), ("stem.bias", 0): (1,), ("conv1.weight", 1): (1,)}
    conv2 = {("conv2.weight", 0): (3,), ("conv2.bias", 0): (3,), ("fc.weight", 1): (3,)}
    assert found == stem | conv2


# --- wrong arguments ------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([], "no index|empty"),
        ([1, 1], "1.*more than once"),
        ([6], "6.*out of range"),
        ([-1], "-1.*out of range"),
        ([0.5], "integer"),
        (["a"], "integer"),
        ([True, False], "integer"),
        (None, "integer|indices"),
        (3, "integer|indices"),
    ],
)
def test_wrong_indices_are_refused(indices: Any, text: str, verify: bool) -> None:
    model, inputs = prepared()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text) as error:
        thinet.cut(model, inputs, {"features.0": indices}, verify=verify)
    assert isinstance(error.value, ThinetError)
    assert "features.0" in str(error.value)
    assert_untouched(before, model)


@pytest.mark.parametrize("indices", [[7], [-1], [2, 2], [0.5]])
def test_slices_check_their_indices(indices: Any) -> None:
    model, inputs = prepared()
    group = thinet.find_groups(model, inputs)[0]
    with pytest.raises(ValueError, match=re.escape(group.name)):
        group.slices(indices)


@pytest.mark.parametrize("verify", [True, False])
def test_an_unknown_group_is_named(verify: bool) -> None:
    model, inputs = prepared()
    with pytest.raises(UnknownGroupError, match=r"features\.9"):
        thinet.cut(model, inputs, {"features.0": [0], "features.9": [0]}, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_locked_group_is_refused_with_its_reason(verify: bool) -> None:
    model, inputs = prepared(InputResidualNet)
    locked = [g for g in thinet.find_groups(model, inputs) if g.locked and g.name == "conv1"]
    assert len(locked) == 1
    with pytest.raises(LockedGroupError, match="conv1") as error:
        thinet.cut(model, inputs, {"conv1": [0]}, verify=verify)
    assert locked[0].locked is not None
    assert locked[0].locked in str(error.value)


def test_an_empty_cut_is_not_a_silent_copy() -> None:
    """Either an error, or a model that computes the same; never the model itself."""
    model, inputs = prepared()
    try:
        small = thinet.cut(model, inputs, {})
    except ValueError:
        return
    assert small is not model
    assert distance(outputs(small, inputs), outputs(model, inputs)) == 0


@pytest.mark.parametrize(
    "wrong",
    [torch.randn(2, 4, 8, 8), torch.randn(3), (), {"picture": torch.randn(2, 3, 8, 8)}, "text"],
    ids=["channels", "dimensions", "nothing", "keyword", "text"],
)
def test_wrong_example_inputs_are_a_short_error(wrong: Any) -> None:
    model, _ = prepared()
    before = snapshot(model)
    with pytest.raises(ThinetError) as error:
        thinet.find_groups(model, wrong)
    assert 20 < len(str(error.value)) < 2000
    assert_untouched(before, model)


class RaisesNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.conv(x)
        raise RuntimeError("the model's own complaint")


def test_a_model_that_raises_is_reported_with_its_own_words() -> None:
    model, x = RaisesNet().train(), torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    with pytest.raises(ThinetError, match="the model's own complaint"):
        thinet.find_groups(model, x)
    assert_untouched(before, model)


# --- what a cut keeps -----------------------------------------------------------------------


@pytest.mark.parametrize("indices", [range(1, 6), (5, 2), torch.tensor([0, 3]), [4]])
def test_indices_of_every_usual_kind(indices: Any) -> None:
    model, inputs = prepared()
    small = thinet.cut(model, inputs, {"features.0": indices})
    want = sorted(int(i) for i in indices)
    assert torch.equal(small.features[0].weight, model.features[0].weight[want])
    assert small.features[0].out_channels == len(want)
    assert small.features[3].in_channels == len(want)
    assert small.features[1].num_features == len(want)


def test_keeping_everything_changes_nothing() -> None:
    model, inputs = prepared()
    small = thinet.cut(model, inputs, {"features.0": range(6)})
    assert distance(outputs(small, inputs), outputs(model, inputs)) == 0
    assert small is not model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_mode_is_kept_module_by_module(training: bool, verify: bool) -> None:
    model, inputs = prepared()
    model.train(training)
    model.features[1].train(not training)
    before = snapshot(model)
    small = thinet.cut(model, inputs, {"features.0": [0, 1, 2]}, verify=verify)
    assert_untouched(before, model)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    names = ("running_mean", "running_var")
    for name in names:
        old, new = getattr(model.features[1], name), getattr(small.features[1], name)
        assert torch.equal(new, old[:3]), f"{name} moved"


def test_requires_grad_is_kept() -> None:
    model, inputs = prepared(FrozenNet)
    small = thinet.cut(model, inputs, {"conv1": [0, 2]})
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in small.named_parameters()} == flags
    assert not all(flags.values())


def test_gradients_of_the_original_are_kept() -> None:
    model, inputs = prepared()
    model(inputs).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    before = {n: g.clone() for n, g in grads.items()}
    thinet.cut(model, inputs, {"features.0": [0, 2]})
    for n, p in model.named_parameters():
        assert p.grad is grads[n]
        assert torch.equal(p.grad, before[n])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model, inputs = prepared(BasicResidualNet)
    model, inputs = model.to(dtype), inputs.to(dtype)
    small = thinet.cut(model, inputs, {"stem": [0, 2, 5], "conv1": [1]})
    assert {t.dtype for t in small.state_dict().values() if t.is_floating_point()} == {dtype}
    assert small(inputs).dtype == dtype


def test_memory_format_is_kept() -> None:
    model, inputs = prepared(BasicResidualNet)
    model = model.to(memory_format=torch.channels_last)
    small = thinet.cut(model, inputs, {"stem": [0, 2, 5], "conv1": [1, 2]})
    for name in ("conv1", "conv2"):
        weight = getattr(small, name).weight
        assert weight.is_contiguous(memory_format=torch.channels_last), name
    plain = thinet.cut(model.to(memory_format=torch.contiguous_format), inputs, {"conv1": [1, 2]})
    assert all(p.is_contiguous() for p in plain.parameters())


def test_user_hooks_run_in_the_cut_model_and_not_while_cutting() -> None:
    model, inputs = prepared(HookNet)
    seen: list[Any] = []
    model.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    small = thinet.cut(model, inputs, {"conv1": [0, 2, 4]}, verify=False)
    seen.clear()
    small(inputs)
    assert seen == [3]
    assert small.conv1._forward_hooks.keys() == model.conv1._forward_hooks.keys()


def test_ties_hold_after_the_cut() -> None:
    model, inputs = prepared(TiedEmbeddingNet)
    small = thinet.cut(model, inputs, {"embed": [0, 3]})
    assert small.head.weight is small.embed.weight
    assert small.embed.weight.shape == (11, 2)
    assert small.embed.embedding_dim == small.head.in_features == 2


def test_names_types_and_buffers_are_kept() -> None:
    model, inputs = prepared(SENet)
    model.squeeze.note = "the user's own"  # type: ignore[assignment]
    model.register_buffer("steps", torch.tensor(41), persistent=False)
    small = thinet.cut(model, inputs, {"conv1": [0, 3], "squeeze": [0]})
    assert list(small.state_dict()) == list(model.state_dict())
    types = [(n, type(m)) for n, m in model.named_modules()]
    assert [(n, type(m)) for n, m in small.named_modules()] == types
    assert small.squeeze.note == "the user's own"
    assert int(small.steps) == 41
    assert small.steps is not model.steps


def test_an_attention_module_is_cut_or_left_whole() -> None:
    model, inputs = prepared(MultiheadAttentionNet)
    free = [g for g in thinet.find_groups(model, inputs) if g.locked is None and g.channels > 1]
    for g in free:
        small = thinet.cut(model, inputs, {g.name: [0]}, verify=True)
        assert sum(p.numel() for p in small.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


def test_keyword_inputs() -> None:
    model, inputs = prepared(DictInputNet)
    small = thinet.cut(model, inputs, {"a": [0, 4]})
    assert small.a.weight.shape[0] == small.b.weight.shape[0] == 2


def test_example_inputs_are_not_changed() -> None:
    model, inputs = prepared(BasicResidualNet)
    inputs.requires_grad_(True)
    before = inputs.detach().clone()
    thinet.find_groups(model, inputs)
    thinet.cut(model, inputs, {"stem": [1, 2]})
    assert torch.equal(inputs, before)
    assert inputs.grad is None
    assert inputs.requires_grad


def test_a_cut_under_no_grad_and_inference_mode_can_still_be_trained() -> None:
    model, inputs = prepared()
    with torch.no_grad():
        small = thinet.cut(model, inputs, {"features.0": [0, 1]})
    small.train()(inputs).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_cut_model_is_saved_and_loaded_by_state_dict() -> None:
    model, inputs = prepared()
    small = thinet.cut(model, inputs, {"features.0": [0, 1], "classifier.0": [3, 4, 5]})
    other = thinet.cut(
        randomise(BatchNormVGG(), seed=5).eval(),
        inputs,
        {"features.0": [2, 3], "classifier.0": [0, 1, 2]},
    )
    other.load_state_dict(small.state_dict())
    assert distance(outputs(other, inputs), outputs(small, inputs)) == 0
