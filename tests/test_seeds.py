"""Randomness by place in the run, and nothing left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from thinet.seeds import derive, generator, seeded


def draws() -> list[float]:
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]  # noqa: NPY002


def test_a_seed_depends_on_all_parts_and_is_the_same_anywhere() -> None:
    seeds = {derive("a", 1, 2), derive("a", 2, 1), derive("b", 1, 2), derive("a", 12), derive("a")}
    assert len(seeds) == 5
    assert derive("order", 0, 3) == 5882203715201594713
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_the_same_parts_draw_the_same_and_others_do_not() -> None:
    with seeded("here", 1):
        first = draws()
    with seeded("here", 1):
        again = draws()
    with seeded("here", 2):
        other = draws()
    assert first == again
    assert all(a != b for a, b in zip(first, other))
    assert generator(1).initial_seed() == derive(1)


def fails_inside() -> None:
    with seeded("inner"):
        draws()
        raise ValueError("inside")


def test_the_global_generators_are_put_back_also_after_an_error() -> None:
    with seeded("outer"):
        expected = draws()
    with seeded("outer"):
        with pytest.raises(ValueError, match="inside"):
            fails_inside()
        assert draws() == expected
