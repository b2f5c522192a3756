"""The main verb: every way through it, what it reports, and everything it refuses."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinet
from tests.more_nets import DictInputNet, TupleInputNet
from tests.nets import BasicResidualNet, ConcatNet, DepthwiseNet, GroupedNet, Net, SENet
from tests.oracle import randomise
from thinet.calibrate.rows import Rows
from thinet.criteria import base
from thinet.criteria.base import criteria
from thinet.errors import (
    BudgetError,
    CalibrationError,
    LockedGroupError,
    OptionError,
    ThinetError,
    TraceError,
    UnknownGroupError,
)
from thinet.outcome import PruneResult
from thinet.prune_options import Repair
from thinet.selection import select_groups
from thinet.trace.analyse import analyse

HALF = thinet.Budget(keep=0.5)


class Tiny(nn.Module):
    """stem (8) -> block.conv1 (10) + shortcut -> flatten -> fc (7) -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.block = nn.ModuleDict(
            {"conv1": nn.Conv2d(8, 10, 3, padding=1), "conv2": nn.Conv2d(10, 8, 3, padding=1)}
        )
        self.fc, self.head = nn.Linear(8 * 4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.block["conv2"](F.relu(self.block["conv1"](x))))
        return self.head(F.relu(self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))))


def model() -> Tiny:
    return randomise(Tiny()).eval()  # type: ignore[return-value]


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def pruned(net: nn.Module | None = None, calibration: Any = None, **options: Any) -> PruneResult:
    options = {"budget": HALF} | options
    calibration = [images()[:8], images()[8:]] if calibration is None else calibration
    return thinet.prune(model() if net is None else net, images(1), calibration, **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# --- every way through ----------------------------------------------------------------------


@pytest.mark.parametrize("repair", get_args(Repair))
@pytest.mark.parametrize("criterion", [name for name in criteria() if not name.startswith("test")])
def test_every_criterion_with_every_repair(criterion: str, repair: Any) -> None:
    result = pruned(criterion=criterion, repair=repair)
    report, small = result.report, result.model
    counts = thinet.count(small, images(1))
    assert (report.macs_after, report.params_after) == (counts.macs, counts.params)
    dense = thinet.count(model(), images(1))
    assert (report.macs_before, report.params_before) == (dense.macs, dense.params)
    assert (report.criterion, report.repair) == (criterion, repair)
    with torch.no_grad():
        assert bool(torch.isfinite(small(images())).all())
    kept = {g.name: g.kept for g in report.groups if g.locked is None}
    assert kept == {"stem": 4, "block.conv1": 5, "fc": 3}
    assert {n: len(u) for n, u in result.plan.keep.items()} == kept
    assert bool(report.refitted) == (repair != "none")
    assert not report.not_refitted
    assert len(report.notes) == (2 if criterion == "bn-scale" else 0)  # only one group has a norm
    assert result.plan.settings["criterion"] == criterion
    assert result.plan.settings["repair"] == repair


@pytest.mark.parametrize("sampling", ["exact", "paper"])
@pytest.mark.parametrize("budget", [HALF, thinet.Budget(macs=0.5), thinet.Budget(params=0.5)])
def test_every_budget_with_every_sampling(sampling: Any, budget: thinet.Budget) -> None:
    report = pruned(sampling=sampling, budget=budget, widths="uniform").report
    assert report.budget == budget.kind
    assert report.target == 0.5
    if budget.kind != "keep":
        assert abs(report.reached - 0.5) <= 0.01
    assert set(report.seconds) == {"groups", "measuring", "choosing", "cutting", "repairing"}


@pytest.mark.parametrize("cls", [BasicResidualNet, ConcatNet, DepthwiseNet, GroupedNet, SENet])
def test_coupled_channels(cls: type[Net]) -> None:
    net = randomise(cls()).eval()
    x = torch.cat([net.example(), 2 * net.example()])
    result = thinet.prune(net, x[:1], [x], budget=HALF)
    assert result.report.macs_after == thinet.count(result.model, x[:1]).macs
    assert result.report.macs_after < result.report.macs_before


def test_dict_and_tuple_inputs() -> None:
    net = randomise(DictInputNet()).eval()
    inputs = net.example()
    result = thinet.prune(net, inputs, [inputs, inputs], budget=HALF)
    assert result.report.refitted
    net = randomise(TupleInputNet()).eval()
    a, b = net.example()
    first = thinet.prune(net, (a, b), [((a, b), torch.zeros(2))], budget=HALF)
    assert first.report.refitted
    with pytest.raises(CalibrationError, match="takes 3 positional arguments but 5"):
        thinet.prune(net, (a, b), [(a, torch.zeros(2), b, b)], budget=HALF)


@torch.no_grad()
def test_better_repairs_lose_less() -> None:
    net, x = model(), torch.randn(64, 3, 6, 6)
    gaps = {}
    for repair in get_args(Repair):
        small = pruned(net, [x], repair=repair).model
        gaps[repair] = float(F.mse_loss(small(x), net(x)))
    assert gaps["full"] < gaps["scale"]
    assert gaps["full"] < 0.5 * gaps["none"]


def test_statistics_can_be_estimated_anew_at_the_end() -> None:
    bare, fresh = (pruned(repair="none", recalibrate=flag).model for flag in (False, True))
    assert not torch.equal(bare.bn.running_mean, fresh.bn.running_mean)
    y = bare.stem(images()).movedim(1, 0).flatten(1)
    torch.testing.assert_close(fresh.bn.running_mean, y.mean(1), rtol=1e-3, atol=1e-4)
    assert torch.equal(bare.stem.weight, fresh.stem.weight)


def test_progress_is_told() -> None:
    told: list[str] = []
    pruned(progress=lambda what, done, of: told.append(what))
    assert {"measuring the dense network", "repairing"} <= set(told)


# --- which groups ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "skip", "cut"),
    [
        (None, None, {"stem", "block.conv1", "fc"}),
        ("block.*", None, {"block.conv1"}),
        (["f?", "stem"], None, {"stem", "fc"}),
        (None, "stem", {"block.conv1", "fc"}),
        ("*", ["fc", "b*"], {"stem"}),
    ],
)
def test_patterns_choose_groups(only: Any, skip: Any, cut: set[str]) -> None:
    result = pruned(only=only, skip=skip, repair="none")
    assert set(result.plan.keep) == cut
    for group in result.report.groups:
        left = group.locked is None and group.name not in cut
        assert group.skipped == ("not chosen" if left else None)
        assert (group.kept < group.channels) == (group.name in cut)


@pytest.mark.parametrize(
    ("only", "skip", "error", "text"),
    [
        (
            "layer*",
            None,
            UnknownGroupError,
            r"the pattern 'layer\*' matches none of the 4 groups \(s",
        ),
        (None, "nothing", UnknownGroupError, "the pattern 'nothing' matches none"),
        (["stem", "fcc"], None, UnknownGroupError, "the pattern 'fcc' matches none"),
        (
            "head",
            None,
            LockedGroupError,
            "nothing can be cut:\n  head: it is an output of the model",
        ),
        ("stem", "stem", LockedGroupError, "nothing can be cut; none of the 4 groups is chosen"),
        ([], None, LockedGroupError, "nothing can be cut; none of the 4 groups is chosen"),
        (3, None, OptionError, "only and skip are glob patterns, one or several strings; got 3"),
        ([3], None, OptionError, r"one or several strings; got \[3\]"),
    ],
)
def test_patterns_that_choose_nothing(only: Any, skip: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        pruned(only=only, skip=skip)


def test_nothing_to_cut_says_why_for_each_group() -> None:
    class Locked(nn.Module):
        """One group is the output, one is read by its position, one has a single channel."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.rest = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1)
            self.fixed, self.out = nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fixed(self.rest(self.one(x)).sort(1).values)
            return self.out(x.mean((2, 3)).view(-1, 6) + torch.arange(6))

    with pytest.raises(LockedGroupError, match="nothing can be cut") as raised:
        pruned(Locked())
    groups = thinet.find_groups(Locked(), images(1))
    lines = str(raised.value).splitlines()[1:]
    assert [line.strip().partition(": ")[0] for line in lines] == [g.name for g in groups]
    assert "  one: it has a single channel" in lines
    assert "it is an output of the model" in str(raised.value)
    assert all(g.locked is None or g.locked in str(raised.value) for g in groups)


def test_a_model_without_channels_is_refused() -> None:
    with pytest.raises(LockedGroupError, match="nothing can be cut"):
        pruned(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_a_second_group_of_one_producer_is_chosen_by_its_layer() -> None:
    groups = analyse(model(), images(1)).groups
    twice = (
        (*groups, copy.replace(groups[0], name="stem:1")) if hasattr(copy, "replace") else groups
    )
    assert {g.name for g in select_groups(twice, "stem")} >= {"stem"}


# --- the same again, and the model as it was ------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"criterion": "random"}, {"sampling": "paper"}])
def test_the_same_seed_gives_the_same_bits(options: dict[str, Any]) -> None:
    options = options | {"rows": Rows(per_column=0, least=100)}
    first = pruned(seed=5, **options)
    torch.randn(7)
    again = pruned(seed=5, **options)
    assert first.plan == again.plan
    assert equal(first.model, again.model)
    other = pruned(seed=6, **options)
    assert first.plan.keep != other.plan.keep or not equal(first.model, other.model)


def test_the_model_is_left_as_it_was() -> None:
    net = model().train()
    net.bn.eval()
    net.stem.bias.requires_grad_(False)  # type: ignore[union-attr]
    net(images()).sum().backward()
    fired: list[int] = []
    net.fc.register_forward_hook(lambda *_: fired.append(1))
    state = copy.deepcopy(net.state_dict())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    tensors = {n: id(p) for n, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    rng = torch.get_rng_state()
    for repair in get_args(Repair):
        result = pruned(net, repair=repair, recalibrate=True)
        assert torch.equal(rng, torch.get_rng_state())
        assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
        assert {n: id(p) for n, p in net.named_parameters()} == tensors
        for name, parameter in net.named_parameters():
            old = grads[name]
            assert parameter.grad is None if old is None else torch.equal(parameter.grad, old)
        assert [m.training for m in net.modules()] == modes
        assert [m.training for m in result.model.modules()] == modes
        assert not result.model.stem.bias.requires_grad
        assert len(net.fc._forward_hooks) == 1
        assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.is_grad_enabled()
    fired.clear()
    net.eval()(images())
    assert fired == [1]


def test_calibration_is_left_as_it_was_and_may_be_a_generator() -> None:
    batches = [images()[:8], images()[8:]]
    listed = pruned(calibration=batches)
    drawn = pruned(calibration=((b, torch.zeros(len(b))) for b in batches))
    assert torch.equal(torch.cat(batches), images())
    assert equal(listed.model, drawn.model)


def test_inference_mode_is_refused_and_images_made_in_it_are_not() -> None:
    net = model()
    with torch.inference_mode():
        x = images() * 1
        with pytest.raises(TraceError, match=r"cannot be traced inside torch.inference_mode\(\)"):
            pruned(net)
        with pytest.raises(TraceError, match="leave that block"):
            thinet.find_groups(net, x)
    assert equal(pruned(net, [x]).model, pruned(net, [images()]).model)


def test_half_precision_stays_what_it_is() -> None:
    net = model().to(torch.bfloat16)
    x = images().bfloat16()
    result = thinet.prune(net, x[:1], [x], budget=HALF)
    assert {t.dtype for t in result.model.state_dict().values()} == {torch.bfloat16, torch.int64}
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(x)).all())


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"criterion": "thinnet"},
            OptionError,
            "unknown criterion 'thinnet'; did you mean 'thinet'",
        ),
        ({"criterion": None}, OptionError, "unknown criterion None; there are "),
        ({"repair": "best"}, OptionError, "unknown repair 'best'; choose one of none, scale, full"),
        ({"sampling": "all"}, OptionError, "unknown sampling 'all'; choose one of exact, paper"),
        (
            {"widths": "equal"},
            OptionError,
            "unknown widths 'equal'; choose one of error, dynamic, uniform",
        ),
        (
            {"budget": 0.5},
            OptionError,
            r"budget=0.5 does not say of what; give thinet.Budget\(macs",
        ),
        ({"seed": -1}, OptionError, r"seed is a whole number from 0 to 2\^32 - 1; got -1"),
        ({"seed": 0.5}, OptionError, "got 0.5"),
        ({"divisor": 0}, OptionError, "divisor is a whole number from 1; got 0"),
        ({"least": "2"}, OptionError, "least is a whole number from 1; got '2'"),
        ({"rows": 100}, OptionError, "rows is a thinet.calibrate.rows.Rows; got 100"),
        (
            {"repair_settings": {"ridge": 1}},
            OptionError,
            "repair_settings is a thinet.repair.Repair",
        ),
        ({"net": Tiny}, OptionError, "the model is a torch.nn.Module; got type"),
        ({"net": torch.compile(Tiny(), backend="eager")}, OptionError, "prune model._orig_mod and"),
        ({"net": Tiny().to("meta")}, OptionError, r"stem.weight has no data \(it is on the meta"),
        (
            {"criterion": "taylor", "calibration": [(images(2), torch.tensor([0, 9]))]},
            CalibrationError,
            r"targets of shape \(2,\) .* do not fit logits of shape \(2, 4\): Target 9 is out of",
        ),
        (
            {"criterion": "taylor-fo", "calibration": [(images(2), torch.rand(2))]},
            CalibrationError,
            r"targets of shape \(2,\) \(torch.float32\) do not fit .*give one class index for each",
        ),
        ({"budget": thinet.Budget(macs=0.001)}, BudgetError, "macs=0.001 cannot be met"),
        ({"calibration": []}, CalibrationError, "the calibration data is empty; give at least one"),
        ({"calibration": 3}, CalibrationError, "must be an iterable of batches, got int"),
        (
            {"calibration": [images() / 0]},
            CalibrationError,
            "calibration batch 0 holds NaN or infinite values; check how the images are read",
        ),
        (
            {"calibration": [torch.ones(2, 4, 6, 6)]},
            CalibrationError,
            r"Tiny does not run on a calibration batch \(shapes \(2, 4, 6, 6\)\): .*3 channels",
        ),
        (
            {"calibration": [torch.ones(3, 6)]},
            CalibrationError,
            r"\(shapes \(3, 6\)\): .*; give batches like the example inputs",
        ),
        (
            {"calibration": [images().double()]},
            CalibrationError,
            r"\(shapes \(12, 3, 6, 6\)\): .*(double|Double)",
        ),
        (
            {"calibration": [torch.ones(2, 3, 6, 6, dtype=torch.uint8)]},
            CalibrationError,
            r"\(shapes \(2, 3, 6, 6\)\): .*unsigned char",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        pruned(**options)


def test_options_are_looked_at_before_any_image_is_read() -> None:
    def unread() -> Any:
        raise AssertionError("the calibration data was read")
        yield

    for options in ({"only": "no"}, {"repair": "no"}, {"budget": thinet.Budget(macs=0.001)}):
        with pytest.raises(ThinetError):
            pruned(calibration=unread(), **options)


def test_example_inputs_that_do_not_fit_say_their_shape() -> None:
    with pytest.raises(
        TraceError, match=r"does not run on the example inputs \(shapes \(1, 4, 6, 6"
    ):
        thinet.prune(model(), torch.randn(1, 4, 6, 6), [images()], budget=HALF)
    with pytest.raises(TraceError, match="example_inputs holds no tensor"):
        thinet.prune(model(), "image.jpg", [images()], budget=HALF)  # type: ignore[arg-type]


@pytest.mark.parametrize("repair", ["none", "scale", "full"])
def test_weights_that_are_not_finite_name_the_layer(repair: Any) -> None:
    net = model()
    with torch.no_grad():
        net.stem.weight[1] = float("nan")
    with pytest.raises(CalibrationError, match=r"^block.conv1 .*: .*NaN, infinite"):
        pruned(net, repair=repair)


def test_a_criterion_that_can_judge_nothing_is_no_silent_weight_sum() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    text = "criterion 'bn-scale' can judge none of the chosen groups; choose another criterion: 0: "
    with pytest.raises(CalibrationError, match=text):
        pruned(net, criterion="bn-scale")


def test_a_group_that_cannot_be_judged_is_noted() -> None:
    net = randomise(
        nn.Sequential(
            *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        )
    ).eval()
    result = pruned(net, criterion="bn-scale", repair="none")
    assert result.report.notes == (
        "3: what bn-scale looks at could not be measured (bn_scale), so its channels were chosen "
        "by weight sum",
    )
    largest = net[3].weight.abs().sum((1, 2, 3)).argsort()[2:]
    assert result.plan.keep["3"] == tuple(sorted(largest.tolist()))


@torch.no_grad()
def test_larger_calibration_batches_than_the_example_are_measured_at_the_same_layers() -> None:
    """One image is reshaped by a view where two take a copy: other operations, same layers."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x)).transpose(0, 1).flatten(0, 1)
            return self.c(F.relu(self.b(x)))

    net, x = randomise(Turned()), torch.randn(16, 5, 4)
    one, many = (thinet.prune(net, x[:n], [x], budget=HALF) for n in (1, 16))
    assert one.plan.keep == many.plan.keep
    assert equal(one.model, many.model)
    assert one.report.refitted == ("b", "c")


def test_half_precision_with_a_layer_too_wide_for_its_moments() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6400, 4))
    x = torch.randn(4, 3, 12, 12)
    options: dict[str, Any] = {"budget": HALF, "only": "0"}
    exact = thinet.prune(model, x[:1], [x], **options)
    half = model.bfloat16()
    found = thinet.prune(half, x[:1].bfloat16(), [x.bfloat16()], **options)
    assert found.model[0].weight.dtype == torch.bfloat16
    ours, theirs = set(found.plan.keep["0"]), set(exact.plan.keep["0"])
    assert len(ours & theirs) > 24  # of 32: rounding moves few


def test_a_criterion_that_works_in_place_leaves_the_model_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "_TABLE", dict(base._TABLE))

    @base.criterion("spoiler", needs={"weights", "filters", "gram", "hessians"})
    def spoil(stats: base.GroupStatistics) -> base.Order:
        tensors = [*stats.filters, stats.gram]
        tensors += [t for c in stats.consumers for t in (c.weight, c.second)]
        for tensor in tensors:
            assert tensor is not None
            tensor.mul_(10)
        return base.by_score(stats, torch.arange(stats.channels).double())

    model, x = randomise(Tiny()).eval(), images()
    before = copy.deepcopy(model.state_dict())
    found = thinet.prune(model, x[:1], [x], budget=HALF, criterion="spoiler")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())

    @base.criterion("first", needs={"weights", "filters", "gram", "hessians"})
    def first(stats: base.GroupStatistics) -> base.Order:
        return base.by_score(stats, torch.arange(stats.channels).double())

    same = thinet.prune(model, x[:1], [x], budget=HALF, criterion="first")
    for name, tensor in same.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_repair_with_as_many_images_as_columns_does_not_fit_noise() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 128, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    x, test = torch.randn(64, 3, 8, 8), torch.randn(500, 3, 8, 8)

    def lost(repair: Repair) -> float:
        budget = thinet.Budget(keep={"2": 64})
        small = thinet.prune(model, x[:1], x.split(32), budget=budget, repair=repair).model
        with torch.no_grad():
            wanted, found = model(test), small(test)
        return float((wanted - found).square().sum() / (wanted - wanted.mean(0)).square().sum())

    assert lost("full") < lost("scale") < lost("none")


def test_two_positional_inputs_are_calibrated_in_the_form_of_the_example() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(5, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
            y = self.a(x)
            return self.c(torch.relu(y if condition is None else y + self.b(condition)))

    torch.manual_seed(0)
    model, x, y = Two().eval(), torch.randn(64, 6), torch.randn(64, 5)
    plain, nested, labelled = (
        thinet.prune(model, (x[:2], y[:2]), [batch], budget=HALF).model.state_dict()
        for batch in ((x, y), ((x, y), torch.zeros(64)), (x, y, torch.zeros(64)))
    )
    assert all(
        torch.equal(plain[n], nested[n]) and torch.equal(plain[n], labelled[n]) for n in plain
    )


def test_the_precision_of_products_is_full_and_comes_back() -> None:
    seen: set[str] = set()
    model, x = randomise(Tiny()).eval(), images()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        thinet.prune(
            model, x[:1], [x], budget=HALF,
            progress=lambda *_: seen.add(torch.get_float32_matmul_precision()),
        )  # fmt: skip
        with pytest.raises(CalibrationError):
            thinet.prune(model, x[:1], [], budget=HALF)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"highest"}
