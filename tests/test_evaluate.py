"""Accuracy worked by hand, whatever form data and outputs have, and clear errors for bad ones."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thinet.errors import DataError, ModelError, OptionError
from thinet.train.evaluate import evaluate

LOGITS = torch.eye(7) * 3  # image i has its largest logit at class i
LABELS = torch.tensor([0, 1, 2, 0, 0, 6, 5])  # images 0, 1, 2 are right
# image 3 (label 0): the others of its row tie, so give the label the second place
LOGITS[3, 0], LOGITS[4, 0], LOGITS[6, 5] = 1.0, -1.0, -1.0
LOGITS[5, 6] = 2.0
BATCHES = [(LOGITS[:4], LABELS[:4]), (LOGITS[4:], LABELS[4:])]
Named = namedtuple("Named", ["logits", "aux_logits2", "aux_logits1"])


@dataclass
class Output:
    logits: torch.Tensor
    hidden: None = None


class Wrapped(nn.Module):
    """Gives its input back in some form."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: torch.Tensor) -> Any:
        return self.form(x)


def test_top1_top5_and_loss_by_hand() -> None:
    found = evaluate(nn.Identity(), BATCHES)
    assert found.top1 == pytest.approx(3 / 7)
    assert found.top5 == pytest.approx(5 / 7)  # also images 3 and 5; 4 and 6 have label last
    losses = [
        math.log(sum(map(math.exp, row))) - row[label]
        for row, label in zip(LOGITS.tolist(), LABELS.tolist())
    ]
    assert found.loss == pytest.approx(sum(losses) / 7)
    assert found.images == 7


def test_fewer_than_five_classes() -> None:
    found = evaluate(nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))])
    assert (found.top1, found.top5) == (pytest.approx(2 / 3), 1.0)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, None),
        lambda x: [x],
        lambda x: Named(x, None, None),
        Output,
        lambda x: OrderedDict(logits=x),
        lambda x: x.double(),
    ],
)
def test_logits_in_other_forms(form: Any) -> None:
    assert evaluate(Wrapped(form), BATCHES).top1 == pytest.approx(3 / 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataloader(workers: int) -> None:
    data = DataLoader(TensorDataset(LOGITS, LABELS), 3, shuffle=True, num_workers=workers)
    found = evaluate(nn.Identity(), data)
    assert (found.images, found.top1) == (7, pytest.approx(3 / 7))


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(7), nn.Dropout(0.5))
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = evaluate(model, BATCHES), evaluate(model, BATCHES)
    assert first == second
    assert [m.training for m in model.modules()] == [True, False, True]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_is_put_back_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(DataError):
        evaluate(model, [(LOGITS, LABELS + 7)])
    assert model.training


def test_progress() -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(nn.Identity(), BATCHES, progress=lambda *step: told.append(step))
    assert told == [("evaluating", 1, 2), ("evaluating", 2, 2)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "the data has no batches"),
        ([(LOGITS[:0], LABELS[:0])], "there is no image to evaluate on"),
        ([LOGITS], r"batch 0 of the data is a Tensor; pairs of tensors \(images, labels\)"),
        ([BATCHES[0], (LOGITS, "x")], "batch 1 of the data is a tuple of Tensor, str; pairs"),
        ([(LOGITS, None)], "batch 0 of the data has no labels"),
        (LOGITS, "data of type Tensor cannot be trained or evaluated on"),
        (3, "data of type int cannot be"),
        (iter(BATCHES), "can be gone through only once"),
        ([BATCHES[0], (LOGITS, LABELS + 1)], "batch 1: label 7 is out of range; the model has 7"),
        ([(LOGITS, LABELS - 1)], "batch 0: label -1 is out of range; .* labels are 0 .. 6"),
        ([(LOGITS, LABELS[:3])], r"labels of shape \(3,\) and torch.int64 for 7 images"),
        ([(LOGITS, LABELS.float())], "torch.float32 for 7 images; one whole number"),
    ],
)
def test_bad_data(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        evaluate(nn.Identity(), data)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (lambda x: x / 0 * 0, "batch 0: the model gives logits that are not finite"),
        (lambda x: {"out": x}, "the model returned a dict with 'out'; logits are needed"),
        (lambda x: "text", "the model returned an object of type str"),
        (lambda x: x[:, :, None, None], r"of shape \(4, 7, 1, 1\); logits of shape"),
        (lambda x: x.argmax(1), r"torch.int64 of shape \(4,\); logits of shape"),
    ],
)
def test_bad_outputs(form: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        evaluate(Wrapped(form), BATCHES)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(OptionError, match="device 'warp' cannot be used"):
        evaluate(nn.Identity(), BATCHES, device="warp")


def test_data_without_a_length_is_counted() -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    assert evaluate(nn.Identity(), Endless()).images == 7
