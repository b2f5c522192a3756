"""Running a recorded program is running the model, whatever the order, and nothing is kept."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.more_nets import (
    AttentionNet,
    DictInputNet,
    DictOutputNet,
    FusedAttentionNet,
    MultiheadAttentionNet,
    TiedEmbeddingNet,
    TupleInputNet,
)
from tests.nets import (
    BasicResidualNet,
    BatchNormVariantsNet,
    BatchNormVGG,
    ChannelShuffleNet,
    ConcatNet,
    Conv1dNet,
    DenseNet,
    DepthwiseNet,
    GLUNet,
    Net,
    OptionANet,
    PixelShuffleNet,
    SENet,
    SharedConvNet,
    UnfoldNet,
    WeightNormNet,
)
from tests.oracle import outputs, randomise
from thinet.errors import CalibrationError
from thinet.store import Store
from thinet.trace.environment import peak_bytes
from thinet.trace.interpret import Execution, dependencies
from thinet.trace.program import Program, values_of
from thinet.types import call


class InPlaceNet(Net):
    """Views, slices and sums that are written in place; later readers see what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        left = y[:, :2]  # a view
        copy = y.clone()
        left.mul_(2)  # y changes
        y.relu_()
        y += copy
        y[:, 3:] = copy[:, :1].sigmoid()
        copy.zero_()
        return torch.cat([self.head(y), left, copy.exp_()], 1)


class WrittenBeforeReadNet(Net):
    """The old value is read, then overwritten, then the new one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        old = y + 1
        y.fill_(5)
        return old * y


class CountingNet(Net):
    """Forward writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count[0].add_(1)
        return self.conv(x) * self.count[0]


class LiveStatisticsNet(Net):
    """Batch statistics in evaluation too, and running ones that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.batch_norm(y, self.bn.running_mean, self.bn.running_var, training=True)


class LooseTensorNet(Net):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.scale = torch.tensor([0.5, 2.0, 3.0]).view(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) * self.scale
        return self.conv(x) + torch.arange(3.0).view(3, 1, 1)


class LooseWrittenNet(Net):
    """A loose tensor that the forward writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.seen = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return self.conv(x) * self.seen


class AsksForNumbersNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / float(x.abs().max())


class DropsOutAlwaysNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=True)


NETS = [
    AttentionNet, BasicResidualNet, BatchNormVGG, BatchNormVariantsNet, ChannelShuffleNet,
    ConcatNet, Conv1dNet, DenseNet, DepthwiseNet, DictInputNet, DictOutputNet, FusedAttentionNet,
    GLUNet, InPlaceNet, LooseTensorNet, MultiheadAttentionNet, OptionANet, PixelShuffleNet, SENet,
    SharedConvNet, TiedEmbeddingNet, TupleInputNet, UnfoldNet, WeightNormNet, WrittenBeforeReadNet,
]  # fmt: skip


def prepared(cls: type[Net]) -> tuple[Any, Any]:
    model = randomise(cls()).eval()
    return model, model.example()


def flat(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [t for value in tree.values() for t in flat(value)]
    return [t for v in tree for t in flat(v)] if isinstance(tree, (tuple, list)) else [tree]


def close(found: Any, model: nn.Module, inputs: Any) -> None:
    with torch.no_grad():
        expected = outputs(model, inputs)
    ours = flat(found)
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def random_order(program: Program, seed: int) -> list[int]:
    """A random topological order of `dependencies`."""
    needs, rng = dependencies(program), random.Random(seed)
    order: list[int] = []
    while len(order) < len(needs):
        done = set(order)
        order.append(rng.choice([i for i, n in enumerate(needs) if i not in done and n <= done]))
    return order


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_running_the_program_is_running_the_model(cls: type[Net]) -> None:
    model, inputs = prepared(cls)
    before = [t.clone() for t in flat(inputs)]
    close(Execution(model).run([inputs])[0], model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, flat(inputs), strict=True))


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_any_order_that_the_dependencies_allow_gives_the_same(cls: type[Net]) -> None:
    model, inputs = prepared(cls)
    execution = Execution(model)
    program = execution.program(inputs)
    moved = 0
    for seed in range(3):
        order = random_order(program, seed)
        moved += order != sorted(order)
        close(execution.run([inputs], order=order)[0], model, inputs)
    assert moved or all(i - 1 in n for i, n in enumerate(dependencies(program)) if i)


@pytest.mark.parametrize("cls", NETS, ids=lambda c: c.__name__)
def test_batches_that_rest_in_a_file_between_stretches_give_the_same(cls: type[Net]) -> None:
    model, inputs = prepared(cls)
    execution, store = Execution(model), Store()
    store.limit = 0
    program = execution.program(inputs)
    met: list[int] = []

    def before(op: Any, envs: Any) -> None:
        met.append(op.index)
        given = [value for value in op.inputs() if value.id in envs[0]]
        assert all(envs[0][v.id].shape == v.shape for v in given)  # resting ones can be read

    meet = range(0, len(program.ops), 3)
    found = execution.run([inputs, inputs], before=before, meet=meet, store=store)
    assert met == list(meet) and store.spilled and not store.held
    for out in found:
        close(out, model, inputs)


def test_between_meetings_each_batch_goes_alone() -> None:
    model = randomise(BatchNormVGG()).eval()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    execution, met = Execution(model), []
    found = execution.run(batches, before=lambda op, envs: met.append(op.index), meet={4, 2})
    assert met == [2, 4]
    for out, batch in zip(found, batches, strict=True):
        close(out, model, batch)


def test_images_keep_their_layout_where_a_view_is_written_into() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y.view(-1)[:5] = 7.0
            return y

    model, x = Written(), torch.randn(2, 3, 4, 4)
    close(Execution(model).run([x])[0], model, x)


def test_images_have_their_channels_together_otherwise() -> None:
    turned: list[bool] = []

    def after(op: Any, envs: Any) -> None:
        if op.name == "aten.convolution":
            y = envs[0][op.outputs()[0].id]
            turned.append(y.is_contiguous(memory_format=torch.channels_last))

    Execution(BatchNormVGG()).run([torch.randn(2, 3, 8, 8)], after=after)
    assert turned and all(turned)


def test_the_most_memory_of_one_batch() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.thin = nn.Linear(4, 100, bias=False), nn.Linear(100, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.thin(self.wide(x).relu_()) + x.sum(1, keepdim=True)

    program = Execution(Deep()).program(torch.randn(10, 4))
    assert peak_bytes(program) == 4 * 10 * (4 + 100 + 1)  # x stays, 100 columns meet the one


def test_several_batches_of_different_sizes_move_together() -> None:
    model = randomise(BatchNormVGG()).eval()
    batches: list[Any] = [torch.randn(n, 3, 8, 8) for n in (1, 4, 2)]
    execution, met = Execution(model), []
    found = execution.run(batches, before=lambda op, envs: met.append((op.index, len(envs))))
    for out, batch in zip(found, batches, strict=True):
        close(out, model, batch)
    assert met == [(i, 3) for i in range(len(execution.program(batches[0]).ops))]


def test_a_weight_that_is_replaced_on_the_way_is_used() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x, execution = torch.randn(5, 3), Execution(model)

    def before(op: Any, _: Any) -> None:
        if op.module == "2":
            execution.tensors["2.weight"] = torch.ones(2, 4)

    found = execution.run([x], before=before)[0]
    with torch.no_grad():
        assert torch.allclose(found, model[1](model[0](x)).sum(1, keepdim=True) + model[2].bias)
    assert not torch.equal(model[2].weight, torch.ones(2, 4))


def test_a_dependency_is_kept_where_memory_is_written() -> None:
    program = Execution(WrittenBeforeReadNet()).program(torch.randn(1, 3, 2, 2))
    at = {op.name: op.index for op in program.ops}
    needs = dependencies(program)
    assert at["aten.add"] in needs[at["aten.fill_"]]  # the old value is read first
    assert at["aten.fill_"] in needs[at["aten.mul"]]


def test_what_no_later_operation_reads_is_freed() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(20))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).sigmoid()
            return x

    alive: list[int] = []
    Execution(Deep()).run([torch.randn(2, 4)], after=lambda _, envs: alive.append(len(envs[0])))
    assert max(alive) <= 4  # x, the transposed weight, the layer's output, the sum
    assert alive[-1] <= 3


@pytest.mark.parametrize("cls", [CountingNet, LiveStatisticsNet, LooseTensorNet])
def test_the_model_is_left_as_it_was(cls: type[Net]) -> None:
    model = cls()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 3, 4, 4)
    execution = Execution(model)
    first = execution.run([x, x])
    again = execution.run([x, x])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    close(first[0], model.eval(), x)


def test_a_loose_tensor_that_forward_writes_into_is_left_as_it_was() -> None:
    model, x = LooseWrittenNet(), torch.randn(2, 3, 4, 4)
    execution = Execution(model)
    (first,), (again,) = execution.run([x]), execution.run([x])
    assert torch.equal(first, again)
    assert not model.seen.any()


def test_the_random_state_is_left_and_what_is_drawn_repeats() -> None:
    model, x = DropsOutAlwaysNet(), torch.randn(2, 3, 4, 4)
    before = torch.get_rng_state()
    first, again = Execution(model).run([x])[0], Execution(model).run([x])[0]
    assert torch.equal(first, again)
    assert (first == 0).any()
    assert torch.equal(before, torch.get_rng_state())


def test_values_of_outputs_are_alive_at_the_end() -> None:
    model = randomise(DictOutputNet()).eval()
    program = Execution(model).program(model.example())
    assert values_of(program.outputs)
    close(Execution(model).run([model.example()])[0], model, model.example())
    with torch.no_grad():
        assert call(model, model.example()).keys() == program.outputs.keys()


# --- what cannot be run ---------------------------------------------------------------------


def test_a_batch_of_the_wrong_shape_is_named_with_its_shape() -> None:
    text = r"BatchNormVGG does not run on a calibration batch \(shapes \(2, 4, 8, 8\)\): .*expected"
    with pytest.raises(CalibrationError, match=text):
        Execution(BatchNormVGG()).run([torch.randn(2, 4, 8, 8)])


def test_a_batch_of_the_wrong_type_is_named_with_the_reason() -> None:
    with pytest.raises(CalibrationError, match=r"shapes \(2, 3, 8, 8\)\): .*unsigned char"):
        Execution(BatchNormVGG()).run([torch.randint(255, (2, 3, 8, 8), dtype=torch.uint8)])


def test_numbers_that_an_operation_cannot_take_are_named_with_it() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(CalibrationError, match=r"aten.embedding in 0 cannot run on .*out of range"):
        Execution(model).run([torch.tensor([[1, 7]])])


def test_a_batch_that_takes_another_way_is_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1) if x.shape[1] > 4 else x.sum(1)

    with pytest.raises(CalibrationError, match=r"\(shapes \(2, 3\)\) takes another way"):
        Execution(Halves()).run([torch.randn(2, 5), torch.randn(2, 3)])


def test_numbers_that_differ_between_batches_are_refused() -> None:
    model, x = AsksForNumbersNet(), torch.randn(2, 3, 4, 4)
    close(Execution(model).run([x])[0], model, x)
    with pytest.raises(CalibrationError, match=r"_local_scalar_dense .* asks for a number"):
        Execution(model).run([x, 3 * x])


def test_a_kernel_that_wants_its_input_in_one_piece_gets_it() -> None:
    """As attention over the positions of a map does (diffusers)."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).flatten(2))

    model, x = randomise(Flat()), torch.randn(2, 3, 4, 4)
    close(Execution(model).run([x])[0], model, x)


class Positions(nn.Module):
    """A linear layer on the positions of a map, which torch views for one image and else copies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, 2)
        self.fc, self.out = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.out(F.relu(self.fc(x))).mean(1)


@pytest.mark.parametrize("sizes", [[4, 1, 3], [1, 4, 3], [1, 1, 6]])
def test_a_batch_of_one_image_goes_the_way_of_the_others(sizes: list[int]) -> None:
    model, x = randomise(Positions()).eval(), torch.randn(8, 3, 6, 6)
    batches = list(x.split(sizes))
    execution = Execution(model)
    programs = [execution.program(batch) for batch in batches]
    kinds = [[op.func for op in Execution(model).program(batch).ops] for batch in batches]
    assert any(kind != kinds[0] for kind in kinds)  # as torch has it
    for program in programs:
        names = ("aten.view", "aten._unsafe_view")
        assert [o.name for o in program.ops] == [o.name for o in programs[0].ops]
        assert [o.index for o in program.ops] == list(range(len(program.ops)))
        assert any(o.name in names for o in program.ops)
    for out, batch in zip(execution.run(batches), batches, strict=True):
        close(out, model, batch)
    uneven = thinet.prune(model, x[:1], batches, budget=thinet.Budget(keep=0.5))
    even = thinet.prune(model, x[:1], [x], budget=thinet.Budget(keep=0.5))
    assert uneven.plan.keep == even.plan.keep
    torch.testing.assert_close(uneven.model(x), even.model(x), rtol=1e-4, atol=1e-5)


def test_a_model_that_does_something_else_for_one_image_is_refused() -> None:
    class Another(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).tanh() if len(x) == 1 else self.fc(x)

    execution = Execution(Another().eval())
    execution.program(torch.randn(2, 3))
    with pytest.raises(CalibrationError, match="takes another way through the model"):
        execution.program(torch.randn(1, 3))
