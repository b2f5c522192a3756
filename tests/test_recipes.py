"""Recipes find what they cut by structure, and say why they do not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thinet
from tests.chains import (
    WIDTHS,
    DeepStem,
    FixedViewVgg,
    FlatVgg,
    PreActivation,
    SmallVgg,
    images,
)
from thinet import recipes
from thinet.errors import LockedGroupError, OptionError, RecipeError
from thinet.plan import Replacement
from thinet.recipes.recipe import Recipe, Step, Tuning
from thinet.vision import torchvision

X = torch.zeros(1, 3, 16, 16)


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(torchvision().models, name)()


def resolved(name: str, model: nn.Module, **options: Any) -> Recipe:
    if next(model.parameters()).is_meta:
        return recipes.resolve(name, model, torch.empty(1, 3, 64, 64, device="meta"), **options)
    return recipes.resolve(name, model, X, **options)


def test_vgg16_conv_halves_the_first_ten_layers_in_24_epochs() -> None:
    recipe = resolved("vgg16-conv", on_meta("vgg16"))
    layers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21]
    halves = [32, 32, 64, 64, 128, 128, 128, 256, 256, 256]
    assert recipe.keep == {f"features.{n}": k for n, k in zip(layers, halves, strict=True)}
    assert recipe.replaced == ()
    short, long, last = Tuning(1, 1e-3), Tuning(2, 1e-3, (1,)), Tuning(12, 1e-3, (4, 8))
    tunings = [step.tuning for step in recipe.steps]
    assert tunings == [short, long, short, long, short, short, long, short, short, last]
    assert sum(tuning.epochs for tuning in tunings) == 24


def test_vgg16_gap_takes_the_head_after_the_layers_also_with_batchnorm() -> None:
    recipe = resolved("vgg16-gap", on_meta("vgg16_bn"))
    assert list(recipe.keep)[-1] == "features.30"
    assert [step.name for step in recipe.steps][-2:] == ["features.30", "classifier"]
    assert recipe.steps[-1] == Step(
        "classifier",
        {},
        Tuning(12, 1e-3, (4, 8)),
        (
            Replacement("features.43", "identity"),
            Replacement("avgpool", "global-average-pool"),
            Replacement("classifier", "linear", {"in_features": 512, "out_features": 1000}),
        ),
    )


def test_vgg16_tiny_has_the_papers_widths_and_cuts_the_last_layers_for_the_new_head() -> None:
    recipe = resolved("vgg16-tiny", on_meta("vgg16"))
    assert list(recipe.keep.values()) == [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 256]
    names = [step.name for step in recipe.steps]
    assert names[9:] == ["features.21", "classifier", "features.24", "features.26", "features.28"]


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet50-70", (44, 89, 179, 358)),
        ("resnet50-50", (32, 64, 128, 256)),
        ("resnet50-30", (19, 38, 76, 153)),
    ],
)
def test_resnet50_keeps_rounded_down_widths_inside_of_its_sixteen_blocks(
    name: str, widths: tuple[int, ...]
) -> None:
    recipe = resolved(name, on_meta("resnet50"))
    blocks = [
        (f"layer{stage}.{block}", width)
        for stage, (count, width) in enumerate(zip((3, 4, 6, 3), widths, strict=True), start=1)
        for block in range(count)
    ]
    assert [(step.name, dict(step.keep)) for step in recipe.steps] == [
        (block, {f"{block}.conv1": width, f"{block}.conv2": width}) for block, width in blocks
    ]
    tunings = [step.tuning for step in recipe.steps]
    assert tunings == [Tuning(1, 1e-4)] * 15 + [Tuning(9, 1e-3, (3, 6))]


def test_a_recipe_takes_a_fraction_where_it_has_one_for_all() -> None:
    recipe = resolved("vgg16-conv", SmallVgg(), keep=0.4)
    assert list(recipe.keep.values()) == [3, 3, 3, 3, 4, 4, 4, 6, 6, 6]
    assert resolved(recipe, SmallVgg()) is recipe  # type: ignore[arg-type]
    one = resolved("resnet", DeepStem(), keep=0.01)
    assert set(one.keep.values()) == {1}


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ("resnet18", 8),
        ("resnet101", 33),
        ("resnext50_32x4d", 16),
    ],
)
def test_the_generic_strategy_leaves_the_last_convolution_of_each_block(
    model: str, steps: int
) -> None:
    recipe = resolved("resnet", on_meta(model))
    assert len(recipe.steps) == steps
    inner = ("conv1", "conv2") if model != "resnet18" else ("conv1",)
    assert {name.rpartition(".")[2] for name in recipe.keep} <= set(inner)
    assert all(name.startswith("layer") for name in recipe.keep)


def test_blocks_are_found_without_names_and_a_deep_stem_is_none() -> None:
    recipe = resolved("resnet", DeepStem())
    assert [(step.name, dict(step.keep)) for step in recipe.steps] == [
        ("a", {"a.reduce": 4, "a.spatial": 4}),
        ("b", {"b.reduce": 6, "b.spatial": 6}),
    ]


def test_the_two_layers_of_a_grouped_bottleneck_are_one_group() -> None:
    recipe = resolved("resnet", DeepStem(groups=4))
    assert [step.name for step in recipe.steps] == ["a", "b"]
    small = thinet.cut(
        DeepStem(groups=4), X, {name: range(kept) for name, kept in recipe.keep.items()}
    )
    assert small.a.spatial.out_channels < 8  # type: ignore[union-attr]


def test_blocks_with_norms_first_in_place_sums_and_gates() -> None:
    recipe = resolved("resnet", PreActivation())
    assert recipe.keep == {"convs.0": 4, "convs.2": 4}


def test_what_a_recipe_names_can_be_cut_exactly() -> None:
    for name, model in (("vgg16-conv", SmallVgg()), ("resnet", PreActivation())):
        keep = resolved(name, model).keep
        small = thinet.cut(model, images(2), {g: range(n) for g, n in keep.items()})
        made = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
        assert {n: made[n] for n in keep} == keep


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        ("vgg16-conv", SmallVgg(WIDTHS[:8]), r"needs 13 convolutions .* SmallVgg has 8$"),
        ("vgg16-tiny", PreActivation(), "PreActivation has 5$"),
        ("resnet", SmallVgg(), "this SmallVgg has none that can be cut inside"),
        ("resnet50-50", DeepStem(), "this DeepStem has 2 blocks of 2 inner convolutions"),
        ("resnet50-70", SmallVgg(), "this SmallVgg has 0 blocks. The recipe resnet takes any"),
        ("vgg16-gap", FixedViewVgg(), "does not run with a global average pool at head"),
        ("vgg-conv", SmallVgg(), "'vgg-conv'; did you mean vgg16-conv.* there are vgg16-conv, "),
    ],
)
def test_a_model_that_does_not_fit_is_told_what_is_missing(
    name: str, model: nn.Module, text: str
) -> None:
    with pytest.raises(RecipeError, match=text):
        resolved(name, model)


class Twice(nn.Module):
    """Thirteen convolutions, the second of which reads two."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.rest = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(12))
        self.out = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        y = self.rest[0](x) + x
        for layer in self.rest[1:]:
            y = layer(y)
        return self.out(y.mean((2, 3)))


def test_a_chain_that_branches_is_refused() -> None:
    with pytest.raises(RecipeError, match="in this Twice a does not feed rest.0 alone but"):
        resolved("vgg16-conv", Twice())


def test_options_of_recipes_are_checked() -> None:
    with pytest.raises(OptionError, match="resnet50-50 fixes how much stays; leave keep out"):
        resolved("resnet50-50", DeepStem(), keep=0.5)
    with pytest.raises(OptionError, match="above 0 and at most 1; got 1.5"):
        resolved("resnet", DeepStem(), keep=1.5)
    with pytest.raises(OptionError, match="cuts the group 'a' in two steps"):
        Recipe("mine", (Step("x", {"a": 1}, Tuning(1, 1.0)), Step("y", {"a": 1}, Tuning(1, 1.0))))
    with pytest.raises(OptionError, match="the recipe mine does nothing"):
        Recipe("mine", ())


class OutputBlock(nn.Module):
    """The inner channels of its block are an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        y = self.one(x)
        return x + self.two(y), y


def test_a_locked_block_is_an_error_and_not_left_out() -> None:
    with pytest.raises(LockedGroupError, match="'one' may not be cut: it is an output"):
        resolved("resnet", OutputBlock())


def test_a_recipe_of_ones_own_is_known_by_its_name() -> None:
    @recipes.register("only-first")
    def only_first(net: recipes.Network, keep: float | None) -> Recipe:
        group = net.analysis.groups[0]
        return Recipe("only-first", (Step(group.name, {group.name: 2}, Tuning(1, 1e-3)),))

    try:
        assert resolved("only-first", SmallVgg()).keep == {"body.0": 2}
        with pytest.raises(OptionError, match="there is a recipe 'only-first' already"):
            recipes.register("only-first")(only_first)
    finally:
        del recipes.RECIPES["only-first"]


@pytest.mark.parametrize(
    ("given", "factor", "expected"),
    [
        (Tuning(12, 1e-3, (4, 8)), 0.5, Tuning(6, 1e-3, (2, 4))),
        (Tuning(12, 1e-3, (4, 8)), 0.25, Tuning(3, 1e-3, (1, 2))),
        (Tuning(12, 1e-3, (4, 8)), 0.1, Tuning(1, 1e-3)),
        (Tuning(9, 1e-3, (3, 6)), 2.0, Tuning(18, 1e-3, (6, 12))),
        (Tuning(1, 1e-3), 0.01, Tuning(1, 1e-3)),
    ],
)
def test_schedules_scale_to_whole_epochs(given: Tuning, factor: float, expected: Tuning) -> None:
    assert given.scaled(factor) == expected


@pytest.mark.parametrize("arguments", [(0, 1e-3), (1, 0.0), (3, 1.0, (2, 1)), (3, 1.0, (3,))])
def test_a_schedule_that_cannot_be_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(OptionError, match="fine-tuning of a step needs"):
        Tuning(*arguments)


def test_one_shot_by_recipe_is_prune_with_its_widths() -> None:
    model, data = SmallVgg(), [images()]
    by_name = thinet.prune_by_recipe(model, X, data, "vgg16-conv")
    budget = thinet.Budget(keep=resolved("vgg16-conv", model).keep)
    by_hand = thinet.prune(model, X, data, budget=budget)
    assert by_name.plan.keep == by_hand.plan.keep
    assert by_name.plan.settings["recipe"] == "vgg16-conv"
    for ours, theirs in zip(by_name.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("late", [False, True])
def test_both_layers_of_a_sum_are_refitted_where_each_is_the_others_shortcut(late: bool) -> None:
    """A block with a projection, which runs before or after the convolutions beside it."""
    result = thinet.prune_by_recipe(DeepStem(late=late), X, [images(8)], "resnet")
    assert result.report.not_refitted == {}
    assert {"b.project", "b.expand", "out"} <= set(result.report.refitted)


def test_group_by_group_follows_a_budget() -> None:
    recipe = recipes.group_by_group(SmallVgg(), X, thinet.Budget(keep=0.5), only="body.*")
    assert len(recipe.steps) == 13
    assert list(recipe.keep.values()) == [w // 2 for w in WIDTHS]
    assert [s.tuning.epochs for s in recipe.steps] == [1] * 12 + [12]
    with pytest.raises(OptionError, match="leaves every group as it is"):
        recipes.group_by_group(SmallVgg(), X, thinet.Budget(keep=1.0))


def test_a_head_that_is_part_of_a_list_keeps_its_place() -> None:
    recipe = resolved("vgg16-gap", FlatVgg())
    assert [(r.module, r.builder) for r in recipe.replaced] == [
        ("28", "global-average-pool"),
        ("30", "identity"),
        ("32", "identity"),
        ("33", "linear"),
    ]


def test_the_recipes_of_the_page_on_recipes_work() -> None:
    page = Path(__file__).parents[1] / "docs" / "adding-a-recipe.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    written = [block for block in blocks if "Step(" in block]
    assert len(written) == 2
    scope: dict[str, Any] = {}
    try:
        for block in written:
            exec(block, scope)
        assert scope["mine"].keep == {"conv1": 24, "layer1.0.conv1": 32, "layer1.1.conv1": 32}
        keep = resolved("wide-layers", SmallVgg(), keep=0.25).keep
        assert list(keep.values()) == [3, 3, 3, 4, 4, 4, 4, 4, 4, 5]
        with pytest.raises(RecipeError, match="this PreActivation has no group of 12 channels"):
            resolved("wide-layers", PreActivation())
    finally:
        recipes.RECIPES.pop("wide-layers", None)
