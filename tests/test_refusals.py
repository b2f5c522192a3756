"""Input that nothing good can come of is refused in words, and what a result is not is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from thinet.errors import CalibrationError, ModelError, OptionError, TraceError, VerificationError

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


FIVE = torch.randn(4, 5, 8, 8)
RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "evaluate": lambda model, x: thinet.evaluate(model, [(x, LABELS)]),
    "finetune": lambda model, x: thinet.finetune(model, [(x, LABELS)], epochs=1),
    "latency": thinet.latency,
}


@pytest.mark.parametrize("name", sorted(RUNS))
def test_images_that_do_not_fit_are_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"Sequential does not run on .*\(?4, 5, 8, 8\)?.*: "):
        RUNS[name](net(), FIVE)


def test_a_teacher_that_does_not_fit_is_named() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(7, 4))
    config = thinet.FinetuneConfig(distill_weight=0.5)
    with pytest.raises(ModelError, match="the teacher: Sequential does not run"):
        thinet.finetune(net(), [(X, LABELS)], epochs=1, teacher=teacher, config=config)


@pytest.mark.parametrize("name", [*sorted(RUNS), "thin", "recalibrate_bn"])
def test_what_is_no_module_is_named(name: str) -> None:
    runs = RUNS | {
        "thin": lambda model, x: thinet.thin(model),
        "recalibrate_bn": lambda model, x: thinet.recalibrate_bn(model, [x]),
    }
    with pytest.raises(OptionError, match="the model is a torch.nn.Module; got str"):
        runs[name]("resnet50", X)


@pytest.mark.parametrize("where", ["inputs", "weights"])
def test_a_cut_that_cannot_be_compared_is_not_called_verified(where: str) -> None:
    model, x = net(), X.clone()
    if where == "inputs":
        x[:] = torch.nan
    else:
        model[6].weight.data[:] = torch.nan
    with pytest.raises(VerificationError, match="gives no finite number to compare"):
        thinet.cut(model, x, {"0": [0, 1]})
    small = thinet.cut(model, x, {"0": [0, 1]}, verify=False)
    assert small[0].out_channels == 2


class Scaled(nn.Module):
    """Two inputs, one of which may be without axes or entries."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.net(x) * scale.sum()


def test_an_empty_example_batch_is_refused() -> None:
    normed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)).eval()
    for model, x in ((normed, X[:0]), (normed, X[..., :0]), (Scaled(), (X[:0], torch.ones(())))):
        runs: tuple[Callable[[], Any], ...] = (
            lambda model=model, x=x: thinet.find_groups(model, x),
            lambda model=model, x=x: thinet.cut(model, x, {"0": [0]}),
            lambda model=model, x=x: thinet.prune(model, x, [X], budget=thinet.Budget(keep=0.5)),
            lambda model=model, x=x: thinet.count(model, x),
        )
        for run in runs:
            with pytest.raises(
                TraceError, match=r"holds no entry \(shapes \([04], 3, 8, .*a batch"
            ):
                run()
    assert thinet.find_groups(normed, X[:1])[0].locked is None
    assert thinet.find_groups(Scaled(), (X, torch.ones(0)))[0].locked is None


def test_one_bad_image_leaves_the_others_to_compare() -> None:
    x = X.clone()
    x[0] = torch.nan
    assert thinet.cut(net(), x, {"0": [0, 1]})[0].out_channels == 2


@pytest.mark.parametrize("budget", [thinet.Budget(keep=1.0), thinet.Budget(macs=1.0)])
def test_a_prune_that_cuts_nothing_says_so(budget: thinet.Budget) -> None:
    report = thinet.prune(net(), X, [X], budget=budget).report
    assert report.notes == ("nothing was cut: every group keeps all of its channels",)


class Normed(nn.Module):
    """A hidden width under a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def test_a_cut_under_a_normalisation_is_said_not_to_be_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    budget = thinet.Budget(keep={"up": 4})
    report = thinet.prune(Normed().eval(), x, [x], budget=budget, normalised=True).report
    (note,) = report.notes
    assert note.startswith("up: it is normalised over by ")
    assert note.endswith("this cut is not exact and was not verified")


def test_a_batchnorm_that_passes_nothing_makes_up_for_nothing() -> None:
    """As in a ResNet whose blocks begin as identities."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.b, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.out = nn.Conv2d(8, 4, 1)
            nn.init.zeros_(self.bn.weight)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x).relu()
            return self.out(h + self.bn(self.b(self.a(h).relu()))).mean((2, 3))

    torch.manual_seed(0)
    model = Block().eval()
    small = thinet.prune(model, X, [X], budget=thinet.Budget(keep={"a": 4})).model
    assert small.a.out_channels == 4
    assert torch.allclose(small(X), model(X), atol=1e-4)  # nothing that was cut reached an output


def test_a_criterion_without_its_statistics_is_told_what_would_help() -> None:
    with pytest.raises(CalibrationError, match="choose another criterion or exact sampling: 0: "):
        thinet.prune(
            net(), X, [X], budget=thinet.Budget(keep=0.5), criterion="block-obs", sampling="paper"
        )


def test_autocast_around_it_is_refused() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TraceError, match="leave that block"):
        thinet.find_groups(net(), X)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_entries_are_cut(mode: str) -> None:
    from tests.oracle import check

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.EmbeddingBag(20, 6, mode=mode), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.table(x)))

    model, x = Bags().eval(), torch.randint(0, 20, (5, 3))
    groups = thinet.find_groups(model, x)
    assert [(g.name, g.channels, g.locked is None) for g in groups] == [
        ("table", 6, True), ("fc", 3, False),
    ]  # fmt: skip
    check(model, x, groups, {"table": [0, 3]}, thinet.cut)


def test_a_compiled_model_is_given_without_its_wrapper() -> None:
    compiled = torch.compile(net(), backend="eager")
    for run in (
        lambda: thinet.find_groups(compiled, X),
        lambda: thinet.cut(compiled, X, {"0": [0]}),
    ):
        with pytest.raises(OptionError, match="give model._orig_mod"):
            run()


def test_a_model_of_several_processes_is_given_without_its_wrapper(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(OptionError, match="give model.module"):
            thinet.find_groups(wrapped, X)
    finally:
        torch.distributed.destroy_process_group()
