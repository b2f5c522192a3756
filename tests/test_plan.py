"""Plans as data: to JSON and back, and one after another."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thinet
from tests.nets import (
    BasicResidualNet,
    BatchNormVGG,
    ConcatNet,
    DenseNet,
    DepthwiseNet,
    GroupedNet,
    Net,
    SENet,
)
from tests.oracle import randomise
from thinet.cut import apply_to_copy
from thinet.errors import CheckpointError, OptionError
from thinet.plan import AttributeChange, Plan, Replacement
from thinet.trace.analyse import analyse
from thinet.trace.planning import make_plan
from thinet.types import Slice

EXAMPLE = Plan(
    keep={"conv1": (0, 2), "conv2": (1,)},
    kept=(Slice("conv1.weight", 0, (0, 2)), Slice("conv2.weight", 1, (0, 2))),
    attributes=(AttributeChange("conv1", "out_channels", 2), AttributeChange("n", "shape", (2, 3))),
    replaced=(Replacement("fc", "linear", {"in_features": 2, "out_features": 3}),),
    settings={"criterion": "thinet", "budget": {"macs": 0.5}},
)


def test_json_and_back_gives_an_equal_plan() -> None:
    assert Plan.from_json(json.loads(json.dumps(EXAMPLE.to_json()))) == EXAMPLE
    assert Plan.from_json(Plan().to_json()) == Plan()


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1), st.sets(st.integers(0, 999), min_size=1)),
    st.lists(st.tuples(st.text(), st.integers(0, 3), st.sets(st.integers(0, 99), min_size=1))),
)
def test_any_plan_goes_to_json_and_back(
    keep: dict[str, set[int]], kept: list[tuple[str, int, set[int]]]
) -> None:
    plan = Plan(
        keep={name: tuple(sorted(units)) for name, units in keep.items()},
        kept=tuple(Slice(name, dim, tuple(sorted(i))) for name, dim, i in kept),
    )
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_newer_format_is_refused() -> None:
    text = (
        "the plan has format 2, this version of thinet reads format 1; use the version that wrote"
    )
    with pytest.raises(CheckpointError, match=text):
        Plan.from_json(EXAMPLE.to_json() | {"format": 2})


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "plan",
        {},
        {"format": 1},
        {**Plan().to_json(), "keep": [1]},
        {**Plan().to_json(), "keep": {"a": "12"}},
        {**Plan().to_json(), "keep": {"a": [-1, 2]}},
        {**Plan().to_json(), "keep": {"a": [2, 2]}},
        {**Plan().to_json(), "keep": {"a": []}},
        {**Plan().to_json(), "kept": [["w", 0]]},
        {**Plan().to_json(), "kept": [["w", "x", [1]]]},
        {**Plan().to_json(), "attributes": [["m", "a", None]]},
        {**Plan().to_json(), "replaced": [["m", "linear", 3]]},
    ],
)
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(CheckpointError, match="this is not a thinet plan"):
        Plan.from_json(data)


# --- one after another ----------------------------------------------------------------------


def random_plan(model: nn.Module, inputs: Any, rng: random.Random) -> Plan:
    analysis = analyse(model, inputs)
    free = [g for g in analysis.groups if g.locked is None and g.channels > 1]
    keep = {
        g.name: sorted(rng.sample(range(g.channels), rng.randint(1, g.channels - 1)))
        for g in free
        if rng.random() < 0.7
    }
    return make_plan(analysis, model, keep)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


NETS = [BasicResidualNet, BatchNormVGG, ConcatNet, DenseNet, DepthwiseNet, GroupedNet, SENet]


@settings(max_examples=14, deadline=None)
@given(st.sampled_from(NETS), st.integers(0, 10**6))
def test_two_plans_in_one_cut_as_two_cuts_in_a_row(cls: type[Net], seed: int) -> None:
    rng = random.Random(seed)
    model = randomise(cls()).eval()
    inputs = model.example()
    first = random_plan(model, inputs, rng)
    half = apply_to_copy(model, first)
    later = random_plan(half, inputs, rng)
    twice, once = apply_to_copy(half, later), apply_to_copy(model, first.then(later))
    assert same(twice, once)
    with torch.no_grad():
        assert torch.equal(twice(inputs), once(inputs))
    for name, units in first.then(later).keep.items():
        weight = dict(once.named_parameters()).get(f"{name}.weight")
        group = analyse(model, inputs).group(name)
        made = {p.parameter: p.indices for p in group.slices(units) if p.dim == 0}
        if name in later.keep and weight is not None:
            assert len(made[f"{name}.weight"]) == len(weight)
    modules = dict(once.named_modules())
    for change in first.then(later).attributes:
        assert getattr(modules[change.module], change.attribute) == change.value


def test_nothing_first_or_nothing_later_changes_nothing() -> None:
    model = randomise(BatchNormVGG()).eval()
    plan = random_plan(model, model.example(), random.Random(3))
    assert plan.keep
    assert same(apply_to_copy(model, Plan().then(plan)), apply_to_copy(model, plan))
    assert same(apply_to_copy(model, plan.then(Plan())), apply_to_copy(model, plan))


def test_units_are_those_of_the_dense_model() -> None:
    first = Plan(keep={"a": (1, 3, 5)}, kept=(Slice("a.weight", 0, (1, 3, 5)),))
    later = Plan(keep={"a": (0, 2), "b": (4,)}, kept=(Slice("a.weight", 0, (0, 2)),))
    both = first.then(later)
    assert both.keep == {"a": (1, 5), "b": (4,)}
    assert both.kept == (Slice("a.weight", 0, (1, 5)),)


def test_a_group_that_is_tied_in_another_way_later_has_no_units_of_its_own() -> None:
    """First two filters make a unit, later one does; `kept` is right all the same."""
    first = Plan(keep={"a": (1,)}, kept=(Slice("a.weight", 0, (2, 5)),))
    later = Plan(
        keep={"a": (1,), "b": (0,)}, kept=(Slice("a.weight", 0, (1,)), Slice("b.weight", 0, (0,)))
    )
    both = first.then(later)
    assert both.keep == {"b": (0,)}
    assert both.kept == (Slice("a.weight", 0, (5,)), Slice("b.weight", 0, (0,)))
    other = Plan(keep={"b": (0,)}, kept=(Slice("a.weight", 0, (1,)), Slice("b.weight", 0, (0,))))
    assert first.then(other).keep == {"a": (1,), "b": (0,)}
    tied = Plan(keep={"a": (0,)}, kept=(Slice("a.weight", 0, (0,)), Slice("b.weight", 0, (1, 2))))
    assert tied.then(Plan(keep={"b": (1,)}, kept=(Slice("b.weight", 0, (1,)),))).keep == {"a": (0,)}


def test_what_lies_in_a_replaced_module_is_forgotten() -> None:
    first = Plan(
        keep={"head.0": (0,), "body": (1,)},
        kept=(Slice("head.0.weight", 0, (0,)), Slice("headless.weight", 0, (0,))),
        attributes=(AttributeChange("head.0", "out_features", 1),),
        settings={"criterion": "l2"},
    )
    both = first.then(Plan(replaced=(Replacement("head", "identity"),), settings={"seed": 1}))
    assert both.keep == {"body": (1,)}
    assert both.kept == (Slice("headless.weight", 0, (0,)),)
    assert both.attributes == () and both.replaced == (Replacement("head", "identity"),)
    assert both.settings == {"criterion": "l2", "seed": 1}


def test_a_later_plan_of_another_model_is_refused() -> None:
    first = Plan(keep={"a": (1, 3)}, kept=(Slice("a.weight", 0, (1, 3)),))
    text = "the later plan keeps entry 2 of a, of which this plan leaves 2; it was made for another"
    with pytest.raises(OptionError, match=text):
        first.then(Plan(keep={"a": (0, 2)}))
    with pytest.raises(OptionError, match="entry 5 of a.weight"):
        first.then(Plan(kept=(Slice("a.weight", 0, (5,)),)))


def test_the_plan_of_prune_is_the_cut_that_was_made() -> None:
    model = randomise(BatchNormVGG()).eval()
    x = torch.randn(8, 3, 8, 8)
    result = thinet.prune(model, x[:1], [x], budget=thinet.Budget(keep=0.5), repair="none")
    assert same(apply_to_copy(model, result.plan), result.model)
    assert Plan.from_json(json.loads(json.dumps(result.plan.to_json()))) == result.plan
