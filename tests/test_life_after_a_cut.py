"""What users do with a cut model: compile, copy, pickle, wrap for several processes, train."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import thinet
from tests.more_nets import GRUNet, LSTMNet, MultiheadAttentionNet, TiedEmbeddingNet
from tests.nets import (
    BasicResidualNet,
    BatchNormVGG,
    ConvTransposeNet,
    DepthwiseNet,
    GroupedNet,
    Net,
    SharedConvNet,
    TwoConvNet,
    WeightNormNet,
)
from tests.oracle import as_double, call, check, distance, outputs, randomise
from thinet.vision import torchvision

torch.set_num_threads(1)
USUAL: tuple[type[Net], ...] = (
    BatchNormVGG,
    BasicResidualNet,
    DepthwiseNet,
    GroupedNet,
    SharedConvNet,
    ConvTransposeNet,
    TiedEmbeddingNet,
    MultiheadAttentionNet,
)


def halved(model: nn.Module, inputs: Any) -> Any:
    """A cut of every group that can be cut, to half."""
    free = [g for g in thinet.find_groups(model, inputs) if g.locked is None and g.channels > 1]
    assert free
    return thinet.cut(model, inputs, {g.name: range(0, g.channels, 2) for g in free})


def made(cls: Callable[[], nn.Module]) -> tuple[Any, Any]:
    model: Any = randomise(cls()).eval()
    inputs = model.example()
    return halved(model, inputs), inputs


def gradients(model: nn.Module, inputs: Any) -> list[Tensor]:
    model.zero_grad()
    call(model, inputs).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    return [g.clone() for g in found if g is not None]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  what was written a moment ago


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("cls", USUAL, ids=lambda c: c.__name__)
def test_it_is_copied_and_pickled(cls: type[Net]) -> None:
    small, inputs = made(cls)
    for twin in (copy.deepcopy(small), pickled(small)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in small.modules()]
        assert distance(outputs(twin, inputs), outputs(small, inputs)) == 0
        mine = {p.data_ptr() for p in small.parameters()}
        assert not mine & {p.data_ptr() for p in twin.parameters()}
        assert gradients(twin, inputs)


def test_it_goes_through_torch_save() -> None:
    """The user's own choice of a format; explicit attention is found again by its class."""
    small, inputs = made(MultiheadAttentionNet)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert distance(outputs(again, inputs), outputs(small, inputs)) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "cls", [BasicResidualNet, DepthwiseNet, MultiheadAttentionNet], ids=lambda c: c.__name__
)
def test_it_compiles(cls: type[Net], backend: str) -> None:
    small, inputs = made(cls)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend=backend, fullgraph=True)
    assert distance(outputs(compiled, inputs), outputs(small, inputs)) < 1e-5
    ours, theirs = gradients(small, inputs), gradients(compiled, inputs)
    assert len(ours) == len(theirs) > 0
    assert distance(theirs, ours) < 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "cls", [BatchNormVGG, SharedConvNet, MultiheadAttentionNet], ids=lambda c: c.__name__
)
def test_it_is_wrapped_for_several_processes(cls: type[Net], one_process: None) -> None:
    small, inputs = made(cls)
    alone = gradients(copy.deepcopy(small), inputs)
    wrapped = nn.parallel.DistributedDataParallel(small)
    assert distance(gradients(wrapped, inputs), alone) < 1e-6
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    before = [p.detach().clone() for p in small.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "cls", [DepthwiseNet, MultiheadAttentionNet, LSTMNet, GRUNet], ids=lambda c: c.__name__
)
def test_every_dtype_goes_all_the_way(cls: type[Net], dtype: torch.dtype) -> None:
    model: Any = randomise(cls()).eval().to(dtype)
    inputs = model.example().to(dtype)
    groups = thinet.find_groups(model, inputs)
    wide = [(g.name, g.channels, g.locked) for g in groups]
    single = model.float()
    again = thinet.find_groups(single, inputs.float())
    assert wide == [(g.name, g.channels, g.locked) for g in again]
    free = [g for g in groups if g.locked is None and g.channels > 1]
    model = model.to(dtype)
    small: Any = thinet.cut(
        model, inputs, {g.name: range(1, g.channels) for g in free}, verify=False
    )
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(inputs).dtype == dtype
    assert bool(small(inputs).isfinite().all())


@pytest.mark.parametrize("rank", [2, 3])
def test_a_channels_last_network_stays_one(rank: int) -> None:
    conv, norm, layout = {
        2: (nn.Conv2d, nn.BatchNorm2d, torch.channels_last),
        3: (nn.Conv3d, nn.BatchNorm3d, torch.channels_last_3d),
    }[rank]
    model = nn.Sequential(conv(3, 6, 3, padding=1), norm(6), nn.ReLU(), conv(6, 4, 3, padding=1))
    model: Any = randomise(model).eval().to(memory_format=layout)
    x = torch.randn(2, 3, *[5] * rank).to(memory_format=layout)
    small: Any = thinet.cut(model, x, {"0": [0, 2, 4]})
    assert all(small[i].weight.is_contiguous(memory_format=layout) for i in (0, 3))
    assert small(x).is_contiguous(memory_format=layout)


# --- modules that are not the plain ones ----------------------------------------------------


class MyConv(nn.Conv2d):
    """A user's class, with attributes of the class and of the object."""

    kind = "mine"
    widths = (6, 6)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = [self.out_channels]
        self.double = nn.Identity()

    @property
    def width(self) -> int:
        return self.out_channels


class OwnClassNet(TwoConvNet):
    def build(self) -> None:
        self.conv1 = MyConv(3, 6, 3, padding=1)


class SyncNet(TwoConvNet):
    def build(self) -> None:
        self.norm = nn.SyncBatchNorm(6)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class FrozenBatchNormNet(TwoConvNet):
    def build(self) -> None:
        self.norm = torchvision().ops.FrozenBatchNorm2d(6)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class NoGradNet(TwoConvNet):
    """Frozen and run without gradients, yet its channels can go."""

    def build(self) -> None:
        self.conv1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.conv1(x))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class NestedOutputsNet(TwoConvNet):
    """Nested inputs and outputs; what leaves the model stays."""

    def example(self) -> Any:
        return {"images": {"left": super().example(), "right": [super().example().flip(0)]}}

    def forward(self, images: dict[str, Any]) -> Any:
        both = images["left"] + images["right"][0]
        x = F.relu(self.conv2(F.relu(self.conv1(both))))
        return {"scores": (self.fc(x.mean((2, 3))), [x.amax((1, 2, 3))]), "size": 8}


MODULES: dict[type[Net], dict[str, int]] = {
    OwnClassNet: {"conv1": 6, "conv2": 5},
    SyncNet: {"conv1": 6, "conv2": 5},
    FrozenBatchNormNet: {"conv1": 6, "conv2": 5},
    NoGradNet: {"conv1": 6, "conv2": 5},
    NestedOutputsNet: {"conv1": 6},
}


@pytest.mark.parametrize("cls", MODULES, ids=lambda c: c.__name__)
def test_their_groups_are_exact(cls: type[Net]) -> None:
    model: Any = randomise(cls()).double().eval()
    if cls is FrozenBatchNormNet:
        for buffer in model.norm.buffers():
            buffer.copy_(0.5 + torch.rand(6, generator=torch.Generator().manual_seed(1)))
    inputs = as_double(model.example())
    groups = thinet.find_groups(model, inputs)
    free = {g.name: g.channels for g in groups if g.locked is None}
    assert free == MODULES[cls]
    for name in free:
        if cls is SyncNet:  # it trains on a GPU only
            small: Any = thinet.cut(model, inputs, {name: [0, 3]}, verify=True)
            assert type(small.norm) is nn.SyncBatchNorm
            assert small.norm.num_features == (2 if name == "conv1" else 6)
        else:
            assert check(model, inputs, groups, {name: [0, 3]}, thinet.cut).effect > 1e-6


def test_a_users_class_keeps_its_type_attributes_and_class() -> None:
    model = OwnClassNet().eval()
    small: Any = thinet.cut(model, model.example(), {"conv1": [0, 1]})
    assert type(small.conv1) is MyConv
    assert (MyConv.kind, MyConv.widths) == ("mine", (6, 6))
    assert small.conv1.width == small.conv1.out_channels == 2
    assert small.conv1.seen == [6]
    assert small.conv1.seen is not model.conv1.seen
    assert repr(small.conv1).startswith("MyConv(")
    assert "3, 2, kernel_size" in repr(small.conv1)


def test_a_synchronised_norm_is_made_from_a_cut_one() -> None:
    model: Any = randomise(BatchNormVGG()).eval()
    x = model.example()
    small = halved(model, x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(small))
    assert distance(outputs(synchronised, x), outputs(small, x)) == 0


# --- weights that are computed --------------------------------------------------------------


class Doubled(nn.Module):
    """An entry by entry parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "weight_norm": (parametrizations.weight_norm, True),
    "doubled": (lambda m: parametrize.register_parametrization(m, "weight", Doubled()), True),
    "old weight_norm": (old_weight_norm, True),
    "spectral_norm": (parametrizations.spectral_norm, False),
    "old spectral_norm": (nn.utils.spectral_norm, False),
    "orthogonal": (parametrizations.orthogonal, False),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_are_exact_or_refused(name: str) -> None:
    """The filters of a normed producer go one by one; where all are mixed, nothing may go."""
    change, free = COMPUTED[name]
    model = TwoConvNet().double().eval()
    change(model.conv1)
    model = randomise(model)
    inputs = as_double(model.example())
    groups = {g.name: g for g in thinet.find_groups(model, inputs)}
    thinet.cut(model, inputs, {"conv2": [0, 3]})
    outputs(model, inputs)  # without gradients, after which it can be copied by the judge
    first = groups.pop("conv1")
    if free:
        assert first.locked is None
        check(model, inputs, (first,), {"conv1": [0, 3]}, thinet.cut)
    else:
        assert first.locked is not None and "conv1" in first.locked
        with pytest.raises(thinet.LockedGroupError):
            thinet.cut(model, inputs, {"conv1": [0]})
    check(model, inputs, tuple(groups.values()), {"conv2": [1]}, thinet.cut)


def test_parametrizations_go_on_in_the_cut_model() -> None:
    model: Any = randomise(WeightNormNet()).eval()
    small = halved(model, model.example())
    assert parametrize.is_parametrized(small.conv1)
    parametrize.remove_parametrizations(small.conv1, "weight")
    assert small.conv1.weight.shape[0] == small.conv1.out_channels == 3


# --- hooks ----------------------------------------------------------------------------------


def test_hooks_of_every_kind_go_along_and_stay_apart() -> None:
    model: Any = randomise(TwoConvNet()).eval()
    x, log = model.example(), Log()
    layer = model.conv2
    layer.register_forward_pre_hook(log.before, with_kwargs=True)
    layer.register_forward_hook(log.after)
    layer.register_full_backward_hook(log.backward)
    model.register_load_state_dict_post_hook(log.loaded)
    small: Any = thinet.cut(model, x, {"conv1": [0, 2, 4]}, verify=False)
    assert log.said == []
    width = small.conv2.in_channels
    assert width < layer.in_channels
    small(x).sum().backward()
    small.load_state_dict(small.state_dict())
    twin = next(iter(small.conv2._forward_hooks.values())).__self__
    assert twin.said == [f"before {width}", "after", "backward", "loaded"]
    assert log.said == []


class Log:
    """A user's observer. The copy of a model has a copy of it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.said.append(f"before {args[0].shape[1]}")

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.said.append("after")

    def backward(self, module: nn.Module, into: Any, out: Any) -> None:
        self.said.append("backward")

    def loaded(self, module: nn.Module, keys: Any) -> None:
        self.said.append("loaded")


class Remembering(Net):
    """Attention biases that are kept once they are worked out, as several of timm's classes do."""

    shape = (2, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(5, 8))
        self.kept: dict[str, torch.Tensor] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.kept = {}
        return super()._apply(fn, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "cpu" not in self.kept or self.training:
            self.kept["cpu"] = self.table[:4].exp()
        return self.second(self.first(x) * self.kept["cpu"])


@pytest.mark.parametrize("grad", [False, True])
def test_what_a_model_has_worked_out_before_is_forgotten(grad: bool) -> None:
    model: Any = randomise(Remembering()).eval()
    x = model.example()
    with torch.set_grad_enabled(grad):
        dense = model(x)
    small: Any = thinet.cut(model, x, {"first": [0, 2, 5]})
    assert small(x).shape == dense.shape
    assert model.kept["cpu"].shape == (4, 8)  # the original's is as it was
    assert small.kept["cpu"].shape == (4, 3)


class Standardised(nn.Conv2d):
    """Weights of mean 0 and variance 1 for each output, as in norm-free networks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


def test_inputs_of_a_standardised_weight_are_normalised_over() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), Standardised(6, 5, 3), nn.Conv2d(5, 2, 1))
    x = torch.randn(2, 3, 6, 6)
    groups = {g.name: g for g in thinet.find_groups(model.eval(), x)}
    assert "normalised over" in (groups["0"].locked or "")
    macs = 2 * (4 * 4 * 6 * 27 + 4 * 4 * 5 * 54 + 4 * 4 * 2 * 5)
    assert thinet.count(model, x).macs == macs
    model, x = model.double(), x.double()  # its own outputs are each their own
    check(model, x, thinet.find_groups(model, x), {"2": [1, 4]}, thinet.cut)


def test_whole_groups_of_a_group_norm_can_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model, x = randomise(model).eval().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    groups = thinet.find_groups(model, x)
    assert (groups[0].name, groups[0].channels, groups[0].locked) == ("0", 4, None)
    check(model, x, groups, {"0": [1, 2]}, thinet.cut)
    small: Any = thinet.cut(model, x, {"0": [0, 3]})
    assert (small[1].num_groups, small[1].num_channels) == (2, 4)


class Cells(nn.Module):
    """Cells of recurrent networks behind a layer, and a bag of embeddings before one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.cells = nn.ModuleList([nn.GRUCell(8, 6), nn.LSTMCell(8, 6), nn.RNNCell(8, 6)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.a(x).relu()
        found = [cell(x) for cell in self.cells]
        return tuple(y[0] if isinstance(y, tuple) else y for y in found)


def test_sizes_of_cells_and_bags_follow() -> None:
    small: Any = thinet.cut(Cells(), torch.randn(2, 5), {"a": [0, 3, 5, 6]})
    assert [(cell.input_size, cell.hidden_size) for cell in small.cells] == [(4, 6)] * 3
    bags = nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 3))
    less: Any = thinet.cut(bags, torch.zeros(2, 3, dtype=torch.long), {"0": [0, 3, 5, 6]})
    assert less[0].embedding_dim == 4


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
def test_scripted_models_are_refused_everywhere(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    x = torch.randn(1, 3, 8, 8)
    result = thinet.prune(dense, x, x, budget=thinet.Budget(keep=0.5))
    path = thinet.save(tmp_path / "a.safetensors", result.model, result.plan)
    scripted = torch.jit.trace(dense, x)
    text = "the model is a TopLevelTracedModule, which cannot be changed; give the torch.nn.Module"
    with pytest.raises(thinet.OptionError, match=text):
        thinet.find_groups(scripted, x)
    with pytest.raises(thinet.OptionError, match=text):
        thinet.prune(scripted, x, x, budget=thinet.Budget(keep=0.5))
    with pytest.raises(thinet.CheckpointError, match=text):
        thinet.load(path, scripted)
