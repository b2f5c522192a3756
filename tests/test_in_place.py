"""What may be written over is, and gives the same bits; everything else is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracle import randomise
from thinet.trace.in_place import overwriting
from thinet.trace.interpret import Execution
from thinet.trace.record import record


class Net(nn.Module):
    """A convolution, a BatchNorm and a ReLU, put together in different ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        if self.way == "input":
            return functional.relu(x)
        y = self.conv(x)
        if self.way == "chain":
            return functional.relu(self.bn(y))
        if self.way == "read twice":
            return functional.relu(self.bn(y)) + y
        if self.way == "returned":
            return functional.relu(self.bn(y)), y
        if self.way == "viewed":
            flat = y.flatten(2)
            return functional.relu(self.bn(y)).flatten(2) + flat
        return functional.relu(self.bn(y[:, :, 1:]))  # "part"


@torch.no_grad()
@pytest.mark.parametrize(
    ("way", "over"),
    [
        ("chain", ["aten.native_batch_norm", "aten.relu"]),
        ("read twice", ["aten.relu"]),
        ("returned", ["aten.relu"]),
        ("viewed", ["aten.relu"]),
        ("part", ["aten.relu"]),
        ("input", []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_what_nobody_else_reads_is_written_over(
    way: str, over: list[str], dtype: torch.dtype
) -> None:
    model = randomise(Net(way)).eval().to(dtype)
    batches = [torch.randn(4, 3, 6, 6).to(dtype) for _ in range(2)]
    program = record(model, batches[0])
    assert [program.ops[index].name for index in sorted(overwriting(program))] == over
    given = [batch.clone() for batch in batches]
    answers = [model(batch) for batch in batches]
    outputs = Execution(model).run(batches)
    for answer, output in zip(answers, outputs, strict=True):
        torch.testing.assert_close(output, answer)
    assert all(torch.equal(a, b) for a, b in zip(batches, given, strict=True))


@torch.no_grad()
def test_a_batchnorm_by_the_batch_and_one_of_another_precision_make_new_tensors() -> None:
    model = Net("chain").eval()
    model.bn = nn.BatchNorm2d(5, track_running_stats=False)
    batch = torch.randn(4, 3, 6, 6)
    program = record(model, batch)
    assert [program.ops[i].name for i in overwriting(program)] == ["aten.relu"]
    model = randomise(Net("chain")).eval()
    model.to(torch.bfloat16).bn.float()
    (output,) = Execution(model).run([batch.bfloat16()])
    torch.testing.assert_close(output, model(batch.bfloat16()))
