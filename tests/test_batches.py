"""Calibration data in every accepted form, and what is said of the rest."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from thinet.calibrate.batches import calibration_inputs, calibration_pairs, images_in
from thinet.errors import CalibrationError

X, Y = torch.ones(2, 3), torch.zeros(2)
CPU = torch.device("cpu")


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    return len(found) == len(expected) and all(map(same, found, expected))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, X),
        ((X, Y), X),
        ([X, [0, 1]], X),
        ([X], (X,)),
        (((X, X), Y), (X, X)),
        ((X, X, X), (X, X, X)),
        ({"a": X, "b": [X, X]}, {"a": X, "b": [X, X]}),
        (UserDict(a=X), {"a": X}),
        (({"a": X}, Y), {"a": X}),
    ],
)
def test_forms_of_a_batch(batch: Any, expected: Any) -> None:
    (found,) = calibration_inputs([batch], device=CPU)
    assert same(found, expected)
    assert images_in(found) == 2


def test_targets_are_kept_beside_where_they_are_tensors() -> None:
    pairs = calibration_pairs(iter([(X, Y), X, (X, [0, 1])]), device=CPU)
    assert [target is not None for _, target in pairs] == [True, False, False]
    assert pairs[0][1] is not None and torch.equal(pairs[0][1], Y)


def test_one_tensor_is_one_batch() -> None:
    assert len(calibration_inputs(X, device=CPU)) == 1


def test_batches_are_moved() -> None:
    found = calibration_inputs([{"a": X, "b": [X]}], device=torch.device("meta"))[0]
    assert found["a"].is_meta and found["b"][0].is_meta  # type: ignore[index]


def test_numbers_beside_the_images_have_no_batch_size() -> None:
    assert images_in({"temperature": torch.tensor(2.0), "x": X}) == 2


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        ([], "the calibration data is empty; give at least one batch"),
        (iter(()), "the calibration data is empty"),
        (3, "must be an iterable of batches, got int"),
        (["a.jpg"], "batch 0 is str without a tensor"),
        ({"x": X}, "batch 0 is str without a tensor"),
        ([X, None], "batch 1 is NoneType without a tensor"),
        ([X, torch.zeros(0, 3)], r"batch 1 is empty \(shape \(0, 3\)\)"),
        ([X, X * float("nan")], "batch 1 holds NaN or infinite values; check how the images"),
        ([{"a": X, "b": [X, X / 0]}], "batch 0 holds NaN or infinite values"),
    ],
)
def test_what_cannot_be_used_is_said(calibration: Any, text: str) -> None:
    with pytest.raises(CalibrationError, match=text):
        calibration_inputs(calibration, device=CPU)


TWO = (X, X + 1)


@pytest.mark.parametrize(
    ("batch", "inputs", "target"),
    [
        ((X, Y), (X, Y), None),
        ([X, Y], (X, Y), None),
        ((X, X, Y), (X, X), Y),
        (((X, X), Y), (X, X), Y),
        ({"a": X, "b": X}, {"a": X, "b": X}, None),
    ],
)
def test_a_batch_like_two_example_inputs_is_two_inputs(
    batch: Any, inputs: Any, target: torch.Tensor | None
) -> None:
    ((found, labels),) = calibration_pairs([batch], device=CPU, like=TWO)
    assert same(found, inputs)
    assert (labels is None) == (target is None)
    assert target is None or (labels is not None and torch.equal(labels, target))


def test_one_example_input_in_a_tuple_changes_nothing() -> None:
    ((found, labels),) = calibration_pairs([(X, Y)], device=CPU, like=(X,))
    assert same(found, X) and labels is not None
