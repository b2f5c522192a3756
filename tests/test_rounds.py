"""A budget in several rounds: the same as one `prune` after the other, reported as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinet
from tests.nets import PlainVGG
from tests.oracle import randomise
from thinet.errors import OptionError, UnknownGroupError
from thinet.outcome import PruneResult
from thinet.refine import refine
from thinet.repair import RepairSettings


def vgg() -> PlainVGG:
    torch.manual_seed(3)
    return randomise(PlainVGG()).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(6, *PlainVGG.shape[1:], generator=generator) for _ in range(2)]


def pruned(model: torch.nn.Module, macs: float, rounds: int | None, **settings: int) -> PruneResult:
    return thinet.prune(
        model,
        images()[0][:1],
        images(),
        budget=thinet.Budget(macs=macs),
        rounds=rounds,
        divisor=1,
        repair_settings=RepairSettings(**settings),
    )


def test_two_rounds_are_one_after_the_other() -> None:
    model = vgg()
    both = pruned(model, 0.3, 2)
    first = pruned(model, 0.3**0.5, 1, every=2, refine=3)  # a start need not be exact
    last = pruned(first.model, 0.3 / first.report.reached, 1, refine=0)
    # The joint refit looks at the dense network, not at what the first round left.
    refined = refine(last.model, model, first.plan.then(last.plan), images())
    assert both.report.refined == refined.errors
    for (name, ours), (_, theirs) in zip(
        both.model.state_dict().items(), last.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_report_and_the_plan_are_those_of_the_dense_network(tmp_path: Path) -> None:
    model, x = vgg(), torch.randn(2, *PlainVGG.shape[1:])
    result = pruned(model, 0.3, 2)
    report = result.report
    dense, small = thinet.count(model, x[:1]), thinet.count(result.model, x[:1])
    assert (report.macs_before, report.macs_after) == (dense.macs, small.macs)
    assert (report.params_before, report.params_after) == (dense.params, small.params)
    assert report.target == 0.3
    assert report.reached == pytest.approx(small.macs / dense.macs)
    assert report.reached == pytest.approx(0.3, abs=0.01)
    groups = {g.name: g for g in thinet.find_groups(model, x[:1])}
    assert {g.name: g.channels for g in report.groups} == {n: g.channels for n, g in groups.items()}
    for group in report.groups:
        assert group.kept == len(result.plan.keep.get(group.name, range(group.channels)))
    assert result.plan.settings["budget"] == {"macs": 0.3}
    thinet.save(tmp_path / "small.safetensors", result.model, result.plan)
    loaded = thinet.load(tmp_path / "small.safetensors", model)
    assert torch.equal(loaded(x), result.model(x))


def test_small_budgets_take_two_rounds_where_layers_are_refitted_together() -> None:
    model = vgg()
    assert same(pruned(model, 0.3, None), pruned(model, 0.3, 2))
    assert same(pruned(model, 0.6, None), pruned(model, 0.6, 1))
    assert not same(pruned(model, 0.3, None), pruned(model, 0.3, 1))


def same(a: PruneResult, b: PruneResult) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return all(ours[n].shape == t.shape and torch.equal(ours[n], t) for n, t in theirs.items())


def test_no_round_at_all_is_refused() -> None:
    with pytest.raises(OptionError, match="rounds"):
        pruned(vgg(), 0.5, 0)


def test_fixed_widths_are_kept_through_both_rounds() -> None:
    model, x = vgg(), torch.randn(1, *PlainVGG.shape[1:])
    free = [g for g in thinet.find_groups(model, x) if g.locked is None]
    name = free[0].name
    result = thinet.prune(
        model, x, [torch.randn(6, *PlainVGG.shape[1:])], budget=thinet.Budget(macs=0.35),
        fixed={name: 0.75}, divisor=1, rounds=2,
    )  # fmt: skip
    (group,) = [g for g in result.report.groups if g.name == name]
    assert (group.kept, group.channels) == (int(free[0].channels * 0.75), free[0].channels)
    with pytest.raises(UnknownGroupError, match="nothing_like_it"):
        thinet.prune(model, x, [x], budget=thinet.Budget(macs=0.5), fixed={"nothing_like_it": 3})
    with pytest.raises(OptionError, match="shared out by error"):
        thinet.prune(model, x, [x], budget=thinet.Budget(keep=0.5), fixed={name: 3})


class Narrow(torch.nn.Sequential):
    def __init__(self, width: int) -> None:
        conv = torch.nn.Conv2d
        super().__init__(conv(3, width, 3), torch.nn.ReLU(), conv(width, width, 3),
                         torch.nn.ReLU(), conv(width, 4, 3))  # fmt: skip


def narrow(fraction: float, **options: object) -> PruneResult:
    torch.manual_seed(0)
    model, x = Narrow(5).eval(), torch.randn(4, 3, 9, 9)
    return thinet.prune(
        model, x[:1], [x], budget=thinet.Budget(macs=fraction), divisor=1, **options
    )  # type: ignore[arg-type]


def test_rounds_that_cannot_meet_a_budget_are_given_up_with_a_note() -> None:
    given_up, again = narrow(0.26, rounds=2), narrow(0.26, rounds=1)
    (note,) = given_up.report.notes
    assert note.startswith("2 rounds cannot meet macs=0.26")
    assert same(given_up, again) and not again.report.notes


def test_a_step_on_the_way_need_not_be_met_exactly() -> None:
    result = narrow(0.3, rounds=2)  # no widths leave within a hundredth of its root
    assert not result.report.notes and result.report.reached == pytest.approx(0.3, abs=0.01)
    assert not same(result, narrow(0.3, rounds=1))


def test_a_group_fixed_at_one_channel_is_left_alone_by_the_second_round() -> None:
    result = narrow(0.25, fixed={"0": 1}, rounds=2)
    first, second = (g for g in result.report.groups if g.locked is None)
    assert (first.name, first.kept, first.channels, first.skipped) == ("0", 1, 5, None)
    assert (second.kept, second.channels) == (4, 5)
    assert first.error is not None and first.error > 0
    only_first = narrow(0.3, fixed={"0": 1}, rounds=2)  # reached by the first round alone
    assert not only_first.report.notes and only_first.report.reached < 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"budget": thinet.Budget(macs=0.5), "widths": "uniform"},
        {"budget": thinet.Budget(keep=0.5)},
        {"budget": thinet.Budget(macs=0.5), "sampling": "paper", "criterion": "thinet"},
    ],
)
def test_rounds_that_would_do_nothing_are_refused(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(OptionError, match="rounds are steps of a budget that is shared out by err"):
        thinet.prune(model, x, [x], rounds=2, **options)
