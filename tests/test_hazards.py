"""Every tiny net: the groups worked out by hand, and cuts that are exact or refused."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

import thinet
from tests.more_nets import MixedChannelsNet, every_net
from tests.nets import Net, PlainVGG
from tests.oracle import as_double, check, randomise
from thinet.errors import LockedGroupError

torch.set_num_threads(1)
NETS = every_net()


@functools.cache
def prepared(cls: type[Net]) -> tuple[Net, Any, tuple[Any, ...]]:
    """Shared by the tests, which is safe as no test may change it."""
    torch.manual_seed(0)
    model = randomise(cls()).double().eval()
    inputs = as_double(model.example())
    return model, inputs, thinet.find_groups(model, inputs)


def starts_at(name: str, key: str) -> bool:
    """Several groups may start at one module; what follows its path is up to the namer."""
    return name == key or (name.startswith(key) and not name[len(key)].isalnum())


def cuttable(groups: Any) -> list[Any]:
    return [g for g in groups if g.locked is None and g.channels > 1]


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_groups_are_those_worked_out_by_hand(cls: type[Net]) -> None:
    groups = prepared(cls)[2]
    listed = set()
    for key, answer in cls.expected.items():
        here = [g for g in groups if starts_at(g.name, key)]
        free = [g.channels for g in cuttable(here)]
        locks = {g.name: g.locked for g in here if g.locked}
        listed.update(g.name for g in here)
        if answer == "locked":
            assert not free, f"{key} may not be cut, but has unlocked groups of {free} channels"
        elif isinstance(answer, tuple):
            assert len(free) == 1, (key, free, answer, locks)
            assert free[0] in answer, (key, free, answer, locks)
        elif isinstance(answer, int):
            assert free == [answer], (key, free, answer, locks)
    unlisted = [g.name for g in cuttable(groups) if g.name not in listed]
    assert not unlisted, f"groups that the hand-worked answer does not have: {unlisted}"


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_cuts_are_exact_or_refused(cls: type[Net]) -> None:
    """Each group alone, by one, half, or all but one of its units; and all groups together."""
    model, inputs, groups = prepared(cls)
    rng = random.Random(cls.__name__)
    removed = {
        g.name: rng.sample(range(g.channels), rng.choice((1, g.channels // 2, g.channels - 1)))
        for g in cuttable(groups)
    }
    tasks = [{name: units} for name, units in removed.items()]
    tasks += [removed] if len(removed) > 1 else []
    effects = [check(model, inputs, groups, task, thinet.cut).effect for task in tasks]
    weak = sum(effect < 1e-9 for effect in effects)
    assert weak <= len(effects) // 2, f"silencing changes nothing, so nothing is shown: {effects}"


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_locked_groups_are_refused(cls: type[Net]) -> None:
    model, inputs, groups = prepared(cls)
    locked = [g for g in groups if g.locked is not None]
    assert all(len(g.locked) > 10 for g in locked), "a lock has a reason"
    with pytest.raises(LockedGroupError):
        thinet.cut(model, inputs, {g.name: [0] for g in locked[:1]}, verify=False)


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_verify_agrees_with_the_oracle(cls: type[Net]) -> None:
    """`verify=True` accepts a right cut, in the float32 of every day."""
    model = randomise(cls()).eval()
    inputs = model.example()
    free = cuttable(thinet.find_groups(model, inputs))
    thinet.cut(model, inputs, {g.name: range(1, g.channels) for g in free}, verify=True)


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_a_cut_model_can_be_cut_again(cls: type[Net]) -> None:
    model, inputs, groups = prepared(cls)
    free = cuttable(groups)
    if free:
        first = free[0]
        small = thinet.cut(model, inputs, {first.name: range(1, first.channels)}, verify=False)
        left = thinet.find_groups(small, inputs)
        removed = {g.name: [0] for g in cuttable(left)}
        if removed:
            check(small, inputs, left, removed, thinet.cut)


@pytest.mark.parametrize("cls", [c for c in NETS if issubclass(c, MixedChannelsNet)])
def test_mixed_channels_say_which_operation_mixes_them(cls: type[Net]) -> None:
    reasons = [g.locked for g in prepared(cls)[2] if starts_at(g.name, "conv1")]
    assert reasons, "a group that cannot be cut is still listed, with its reason"


@pytest.mark.parametrize("batch", [1, 6])
def test_the_batch_size_plays_no_part(batch: int) -> None:
    """Six images and six channels are not the same six."""
    model = randomise(PlainVGG()).double().eval()
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    groups = thinet.find_groups(model, x)
    free = {g.name: g.channels for g in cuttable(groups)}
    assert free == PlainVGG.expected
    check(model, x, groups, {"features.0": [2]}, thinet.cut)
