"""Fine-tuning against loops written out, and its options one by one."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from thinet.errors import DataError, MissingExtraError, ModelError, OptionError, TrainingError
from thinet.trace.replica import copied
from thinet.train import state
from thinet.train.config import FinetuneConfig
from thinet.train.distill import distillation
from thinet.train.ema import Ema
from thinet.train.evaluate import evaluate
from thinet.train.finetune import finetune
from thinet.train.scratch import from_scratch

Batches = list[tuple[torch.Tensor, torch.Tensor]]
PLAIN: dict[str, Any] = {"lr": 0.1, "schedule": "constant", "momentum": 0.9, "weight_decay": 0.01}


def batches(count: int = 6, size: int = 4, classes: int = 3, seed: int = 0) -> Batches:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, 5, generator=random, dtype=torch.float64)
    labels = (images[..., :classes].argmax(-1)).long()
    return list(zip(images, labels))


def net(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, classes)).double()


def same(a: nn.Module, b: nn.Module, **tolerance: float) -> bool:
    one, two = a.state_dict(), b.state_dict()
    close = torch.equal if not tolerance else lambda x, y: torch.allclose(x, y, **tolerance)
    return list(one) == list(two) and all(close(one[k], two[k]) for k in one)


def written_out(model: nn.Module, data: Batches, epochs: int, loss: Any, **sgd: Any) -> nn.Module:
    """The loop that finetune replaces, with torch's own SGD."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    for _ in range(epochs):
        for images, labels in data:
            optimizer.zero_grad()
            loss(model, images, labels).backward()
            optimizer.step()
    return model


def cross_entropy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels)


def test_it_is_the_loop_written_out_and_leaves_the_model_alone() -> None:
    model, data = net().eval(), batches()
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    result = finetune(model, data, epochs=3, config=FinetuneConfig(**PLAIN), validation=data)
    wanted = written_out(model, data, 3, cross_entropy, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert same(result.model, wanted, rtol=1e-12, atol=1e-14)
    assert not same(result.model, model)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert not result.model.training
    assert all(p.grad is None for p in [*model.parameters(), *result.model.parameters()])
    assert [record.epoch for record in result.history] == [1, 2, 3]
    assert result.history[-1].validation == evaluate(result.model, data)
    assert result.history[0].loss > result.history[-1].loss
    assert result.history[0].lr == 0.1


def test_the_first_epochs_loss_and_top1_are_those_met_on_the_way() -> None:
    model, data = net(), batches(count=1)
    record = finetune(model, data, epochs=1, config=FinetuneConfig(**PLAIN)).history[0]
    images, labels = data[0]
    assert record.loss == pytest.approx(float(cross_entropy(model, images, labels).detach()))
    assert record.top1 == float((model(images).argmax(1) == labels).double().mean())


def test_nesterov_smoothing_and_sparing_biases() -> None:
    model, data = net(), batches()
    config = FinetuneConfig(**PLAIN, nesterov=True, label_smoothing=0.2, decay_norm_and_bias=False)
    copied = copy.deepcopy(model)
    groups = [
        {"params": [p for p in copied.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in copied.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for images, labels in data:
        optimizer.zero_grad()
        F.cross_entropy(copied(images), labels, label_smoothing=0.2).backward()
        optimizer.step()
    found = finetune(model, data, epochs=1, config=config).model
    assert same(found, copied, rtol=1e-12, atol=1e-14)


def test_accumulated_batches_are_one_large_batch_also_where_they_are_unequal() -> None:
    model = net()
    data = [*batches(4), *[(x[:1], y[:1]) for x, y in batches(1, seed=5)]]
    joined = [
        (torch.cat([x for x, _ in part]), torch.cat([y for _, y in part]))
        for part in (data[:2], data[2:4], data[4:])
    ]
    config = FinetuneConfig(**PLAIN)
    whole = finetune(model, joined, epochs=2, config=config)
    parts = finetune(model, data, epochs=2, config=FinetuneConfig(**PLAIN, accumulate=2))
    assert same(whole.model, parts.model, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_the_first_step() -> None:
    model, data = net(), batches(count=1)
    config = FinetuneConfig(lr=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.01)
    found = finetune(model, data, epochs=1, config=config).model
    pairs = zip(found.parameters(), model.parameters())
    moved = sum(float(((a - b) ** 2).sum().detach()) for a, b in pairs)
    assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-3)


def test_distillation_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[math.log(9.0), 0.0]])
    p = 0.75  # at temperature 2 the odds 9 become 3
    wanted = 4 * (p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5))
    assert float(distillation(student, teacher, 2.0)) == pytest.approx(wanted)
    assert float(distillation(teacher, teacher, 2.0)) == 0.0
    with pytest.raises(ModelError, match=r"teacher gives logits of shape \(1, 3\), the model"):
        distillation(student, torch.zeros(1, 3), 2.0)


def test_a_teacher_joins_the_loss_and_is_left_alone() -> None:
    model, teacher, data = net(), net().train(), batches()
    with torch.no_grad():
        teacher[0].weight += 1.0
    before = copy.deepcopy(teacher)

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            taught = teacher(images)
        return 0.7 * cross_entropy(model, images, labels) + 0.3 * distillation(
            model(images).float(), taught.float(), 3.0
        )

    config = FinetuneConfig(**PLAIN, distill_weight=0.3, temperature=3.0)
    found = finetune(model, data, epochs=2, config=config, teacher=teacher).model
    wanted = written_out(model, data, 2, loss, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert same(found, wanted, rtol=1e-5, atol=1e-6)
    assert not same(found, finetune(model, data, epochs=2, config=config).model, rtol=1e-3)
    assert same(teacher, before)
    assert teacher.training


def test_the_average_by_hand() -> None:
    model = nn.BatchNorm1d(1)
    average = Ema(model, 0.25)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked += 1
        average.update(model)
    first = 2 / 11 * 1.0 + 9 / 11 * 1.0
    assert float(average.model.weight.detach()) == pytest.approx(0.25 * first + 0.75 * 2.0)
    mean = 0.25 * (9 / 11) + 0.75 * 2.0
    assert float(average.model.running_mean) == pytest.approx(mean)
    assert int(average.model.num_batches_tracked) == 2


def test_the_average_is_what_is_validated_and_returned() -> None:
    model, data = net(), batches()
    plain = finetune(model, data, epochs=2, config=FinetuneConfig(**PLAIN))
    config = FinetuneConfig(**PLAIN, ema_decay=0.9)
    result = finetune(model, data, epochs=2, config=config, validation=data)
    assert not same(result.model, plain.model)
    assert result.history[-1].validation == evaluate(result.model, data)
    assert result.history[-1].loss == plain.history[-1].loss
    assert all(p.requires_grad for p in result.model.parameters())


def test_an_optimizer_goes_on_with_its_momentum() -> None:
    model, data = net(), batches()
    whole = written_out(model, data * 2, 1, cross_entropy, lr=0.1, momentum=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in data:
        optimizer.zero_grad()
        cross_entropy(model, images, labels).backward()
        optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    config = FinetuneConfig(lr=0.1, schedule="constant")
    found = finetune(model, data, epochs=1, config=config, optimizer=optimizer).model
    assert same(found, whole, rtol=1e-12, atol=1e-14)
    assert str(optimizer.state_dict()) == str(kept)
    stranger = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(OptionError, match="parameters that are not the model's"):
        finetune(model, data, epochs=1, optimizer=stranger)


def test_frozen_parameters_stay() -> None:
    model = net()
    model[0].requires_grad_(False)
    found = finetune(model, batches(), epochs=1, config=FinetuneConfig(**PLAIN)).model
    assert torch.equal(found[0].weight, model[0].weight)
    assert not torch.equal(found[2].weight, model[2].weight)
    assert not found[0].weight.requires_grad
    assert found[2].weight.requires_grad
    with pytest.raises(ModelError, match="there is nothing to train"):
        finetune(model.requires_grad_(False), batches(), epochs=1)


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    model[1].weight = model[0].weight
    found = finetune(model, batches(classes=5), epochs=1, config=FinetuneConfig(**PLAIN)).model
    assert found[0].weight is found[1].weight
    assert not torch.equal(found[0].weight, model[0].weight)


Two = namedtuple("Two", ["logits", "aux_logits2", "aux_logits1"])
One = namedtuple("One", ["logits", "aux_logits"])


class Heads(nn.Module):
    """A classifier with auxiliary heads in training only, as GoogLeNet and Inception."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(count)
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(count + 1)).double()

    def forward(self, x: torch.Tensor) -> Any:
        outputs = [head(x) for head in self.heads]
        if not self.training:
            return outputs[0]
        return {1: lambda: outputs[0], 2: lambda: One(*outputs), 3: lambda: Two(*outputs)}[
            len(outputs)
        ]()


@pytest.mark.parametrize(("count", "weight"), [(1, 0.4), (2, 0.3)])
def test_auxiliary_classifiers_are_trained_with_their_weight(count: int, weight: float) -> None:
    model, data = Heads(count), batches()

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first, *others = (F.cross_entropy(output, labels) for output in model(images))
        return first + weight * sum(others)

    found = finetune(model, data, epochs=1, config=FinetuneConfig(**PLAIN), validation=data).model
    wanted = written_out(model, data, 1, loss, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert same(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_nearly_the_same(precision: Any) -> None:
    data = [(x.float(), y) for x, y in batches(count=20)]
    model = net().float()
    config = FinetuneConfig(**PLAIN, mixed_precision=precision)
    found = finetune(model, data, epochs=3, config=config)
    exact = finetune(model, data, epochs=3, config=FinetuneConfig(**PLAIN))
    assert found.history[-1].loss == pytest.approx(exact.history[-1].loss, rel=0.05)
    assert found.history[-1].loss != exact.history[-1].loss
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    data = batches()
    data[3] = (data[3][0] * float("nan"), data[3][1])
    with pytest.raises(
        TrainingError, match=r"the loss is nan in step 4 \(epoch 1\); lower the lea"
    ):
        finetune(net(), data, epochs=2, config=FinetuneConfig(**PLAIN))
    with pytest.raises(TrainingError, match=r"checkpoint in .* is of an earlier step"):
        finetune(net(), data, epochs=2, checkpoint=tmp_path / "run", save_every=2)
    tensors, facts = state.read(tmp_path / "run") or ({}, {})
    assert facts["step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"epochs": 0}, OptionError, "epochs must be a whole number of at least 1, got 0"),
        ({"save_every": 1.5}, OptionError, "save_every must be a whole number"),
        ({"data": []}, DataError, "the data has no batches"),
        ({"data": batches(classes=5)}, DataError, "out of range; the model has 3 classes"),
        ({"data": iter(batches())}, DataError, "can be gone through only once"),
        ({"data": [(torch.zeros(0, 5).double(), torch.zeros(0).long())]}, DataError, "no images"),
        (
            {"teacher": net(), "config": FinetuneConfig(distill_weight=0)},
            OptionError,
            "distill_weight is 0",
        ),
        ({"teacher": net(classes=4)}, ModelError, "they must have the same classes"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], text: str) -> None:
    given = {"data": batches(), "epochs": 1, **options}
    with pytest.raises(error, match=text):
        finetune(net(), given.pop("data"), **given)


def test_a_single_image_and_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(DataError, match=r"batch 0 has a single image, .*drop_last=True"):
        finetune(model, batches(size=1), epochs=1)


def test_data_that_ends_early() -> None:
    class Shrinking:
        passes = 0

        def __len__(self) -> int:
            return 6

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(batches(6 if self.passes < 3 else 4))

    with pytest.raises(DataError, match="the data ended after 4 batches; it had 6"):
        finetune(net(), Shrinking(), epochs=3)


def test_progress_and_epochs_are_reported() -> None:
    told: list[tuple[str, int, int]] = []
    records: list[Any] = []
    result = finetune(
        net(), batches(2), epochs=2, on_epoch=records.append, progress=lambda *s: told.append(s)
    )
    assert told == [(f"epoch {e} of 2", s, 2) for e in (1, 2) for s in (1, 2)]
    assert tuple(records) == result.history


def test_a_dataloader_is_shuffled_by_the_seed_and_its_own_generator_is_left_alone() -> None:
    images, labels = zip(*batches())
    own = torch.Generator().manual_seed(5)
    state = own.get_state()

    def run(seed: int, generator: torch.Generator | None) -> nn.Module:
        dataset = TensorDataset(torch.cat(images), torch.cat(labels))
        data = DataLoader(dataset, 5, shuffle=True, generator=generator)
        return finetune(net(), data, epochs=2, config=FinetuneConfig(**PLAIN, seed=seed)).model

    assert same(run(0, None), run(0, None))
    assert same(run(0, own), run(0, own))
    assert not same(run(0, None), run(1, None))
    assert torch.equal(own.get_state(), state)


def test_logs_are_written_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = FinetuneConfig(**PLAIN, log_dir=str(tmp_path / "logs"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        finetune(net(), batches(), epochs=1, config=config)

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.lines = [("opened", folder == config.log_dir, purge_step)]

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.lines.append((name, value, step))

        def flush(self) -> None:
            written.extend(self.lines)
            self.lines = []

        def close(self) -> None:
            written.append(("closed", True, 0))

    written: list[tuple[str, Any, int]] = []
    fake = ModuleType("tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    result = finetune(net(), batches(), epochs=1, config=config, validation=batches())
    record = result.history[0]
    assert record.validation is not None
    assert written == [
        ("opened", True, 1),
        ("lr", record.lr, 6),
        ("train/loss", record.loss, 6),
        ("train/top1", record.top1, 6),
        ("validation/loss", record.validation.loss, 6),
        ("validation/top1", record.validation.top1, 6),
        ("closed", True, 0),
    ]


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finetune(net(), batches(), epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_the_state_is_json_and_tensors(tmp_path: Path) -> None:
    finetune(net(), batches(), epochs=1, checkpoint=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["training.safetensors"]
    raw = (tmp_path / "run" / "training.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    facts = json.loads(header["__metadata__"]["facts"])
    assert facts["epoch"] == 1
    assert facts["identity"]["option"]["lr"] == 1e-3
    assert header["model.0.weight"]["dtype"] == "F64"


class Rooted(nn.Module):
    """A finite loss whose gradient at weights of zero is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.abs().sqrt()


@pytest.mark.parametrize("every", [1, 1000])
def test_weights_that_are_no_longer_finite_are_told_and_not_kept(
    tmp_path: Path, every: int
) -> None:
    with pytest.raises(TrainingError, match="weight is no longer finite .* epoch 1; lower the lea"):
        finetune(
            Rooted(), batches(1), epochs=1, config=FinetuneConfig(**PLAIN), checkpoint=tmp_path,
            save_every=every,
        )  # fmt: skip
    saved = state.read(tmp_path)
    assert saved is not None
    assert saved[1]["step"] == saved[1]["epoch"] == 0
    assert saved[0]["model.weight"].isfinite().all()


def test_weights_drawn_anew_are_the_seeds_and_the_shapes_stay() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[1].running_mean.fill_(7)
    kept, drawn = copy.deepcopy(model), torch.get_rng_state()
    one, again, other = (from_scratch(model, seed=seed) for seed in (1, 1, 2))
    assert same(model, kept) and torch.equal(torch.get_rng_state(), drawn)
    assert same(one, again) and not same(one, other) and not same(one, model)
    assert not one[1].running_mean.any() and one[0].weight.shape == (8, 5)
    assert one[0].weight.abs().max() <= 5**-0.5  # as nn.Linear draws them


def test_weights_that_cannot_be_drawn_anew_are_named() -> None:
    with pytest.raises(ModelError, match=r"the model \(Rooted\) has parameters and no reset_param"):
        from_scratch(Rooted())


def weight_normed(inputs: int, outputs: int) -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(nn.Linear(inputs, outputs))


def test_weights_that_their_own_reset_leaves_are_named() -> None:
    normed = nn.Sequential(weight_normed(5, 8), nn.Linear(8, 3))
    with pytest.raises(
        ModelError, match=r"reset_parameters\(\) of 0 \(Linear\) leaves its weights"
    ):
        from_scratch(normed)
    rooted = Rooted().requires_grad_(False)
    with pytest.raises(ModelError, match=r"the model \(Rooted\) has parameters and no reset_param"):
        from_scratch(rooted)


def test_a_model_whose_weights_are_normed_before_each_forward_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(weight_normed(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model = model.double()
    model(batches()[0][0])  # the weight has a history now
    config = FinetuneConfig(**PLAIN, ema_decay=0.9)
    found = finetune(model, batches(), epochs=2, config=config, teacher=copied(model))
    assert found.history[1].loss < found.history[0].loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    given = finetune(
        model, batches(), epochs=1, config=FinetuneConfig(**PLAIN), optimizer=optimizer
    )
    fresh = finetune(model, batches(), epochs=1, config=FinetuneConfig(**PLAIN))
    assert same(given.model, fresh.model) and not same(given.model, model)


def test_an_auxiliary_loss_is_no_auxiliary_classifier() -> None:
    @dataclass
    class Routed:
        logits: torch.Tensor
        aux_loss: torch.Tensor

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(5, 3).double()

        def forward(self, x: torch.Tensor) -> Routed:
            y = self.fc(x)
            return Routed(y, y.square().mean())

    model, data = Router(), batches()
    found = finetune(model, data, epochs=1, config=FinetuneConfig(**PLAIN)).model

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images).logits, labels)

    wanted = written_out(model, data, 1, loss, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert same(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type(dtype: torch.dtype) -> None:
    data = [(x, y.to(dtype)) for x, y in batches()]
    found = finetune(net(), data, epochs=1, config=FinetuneConfig(**PLAIN), validation=data)
    assert found.history[0].validation == evaluate(found.model, batches())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"milestones": 3, "schedule": "step"}', "milestones must be increasing epochs"),
        ('{"milestones": [true, 2], "schedule": "step"}', "milestones must be increasing epochs"),
        ('{"milestones": null}', "milestones must be increasing epochs"),
        ('{"group_sparsity": {}}', "group sparsity: strength must be given"),
        ('{"nesterov": "x"}', "nesterov must be true or false"),
        ('{"log_dir": 3}', "log_dir must be a folder or None"),
    ],
)
def test_options_of_another_type(text: str, fault: str) -> None:
    with pytest.raises(OptionError, match=fault):
        FinetuneConfig.from_json(text)


def test_a_last_step_that_destroys_the_network_is_told(tmp_path: Path) -> None:
    config = FinetuneConfig(lr=1e30, schedule="constant")
    data = [(x.float(), y) for x, y in batches(1)]
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(TrainingError, match="no longer gives finite logits"):
        finetune(model, data, epochs=1, config=config, checkpoint=tmp_path)
    _, facts = state.read(tmp_path) or ({}, {})
    assert facts["step"] == 0  # what is kept is of before


def test_arguments_of_another_kind_are_refused() -> None:
    with pytest.raises(OptionError, match="config is a FinetuneConfig; got dict"):
        finetune(net(), batches(), epochs=1, config={"lr": 1})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"the model is a torch.nn.Module; got str"):
        finetune(net(), batches(), epochs=1, teacher="dense")  # type: ignore[arg-type]
