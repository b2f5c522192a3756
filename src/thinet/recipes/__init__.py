"""Named strategies: what is cut, in which order, and how long is trained in between.

A recipe is a function from a traced network to frozen data. `RECIPES` is the table; `register`
adds to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from torch import nn

from thinet.budget import Budget, uniform_widths
from thinet.errors import OptionError
from thinet.errors import RecipeError as RecipeError
from thinet.recipes import resnet, vgg
from thinet.recipes.recipe import Recipe, Step, Tuning
from thinet.recipes.structure import Network as Network
from thinet.recipes.structure import network
from thinet.selection import select_groups
from thinet.types import ExampleInputs

Maker = Callable[[Network, float | None], Recipe]
"""(traced network, fraction asked for or None) to a recipe for it."""

RECIPES: dict[str, Maker] = {
    "vgg16-conv": vgg.conv,
    "vgg16-gap": vgg.gap,
    "vgg16-tiny": vgg.tiny,
    "resnet50-70": lambda net, keep: resnet.resnet50("resnet50-70", 0.7, net),
    "resnet50-50": lambda net, keep: resnet.resnet50("resnet50-50", 0.5, net),
    "resnet50-30": lambda net, keep: resnet.resnet50("resnet50-30", 0.3, net),
    "resnet": resnet.generic,
}

FIXED = {"vgg16-tiny", "resnet50-70", "resnet50-50", "resnet50-30"}
"""Recipes whose widths are part of their name."""


def register(name: str) -> Callable[[Maker], Maker]:
    """Add a recipe under a name: decorates a function of a traced network and a fraction.

    Raises:
        OptionError: the name is taken.
    """

    def add(maker: Maker) -> Maker:
        if name in RECIPES:
            raise OptionError(f"there is a recipe {name!r} already; choose another name")
        RECIPES[name] = maker
        return maker

    return add


def resolve(
    recipe: str | Recipe,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    keep: float | None = None,
) -> Recipe:
    """A recipe by name, worked out for a model; one that is worked out is given back.

    Args:
        keep: fraction of the channels that stays, in place of the recipe's own, for recipes that
            have one fraction for all they cut (`vgg16-conv`, `vgg16-gap`, `resnet`).

    Raises:
        RecipeError: there is no such recipe, or the model is not of the structure that it needs.
        OptionError: `keep` is out of range, or the recipe fixes its own.
        LockedGroupError: a group that it needs may not be cut; says why.
    """
    if keep is not None and (isinstance(recipe, Recipe) or recipe in FIXED):
        name = recipe.name if isinstance(recipe, Recipe) else recipe
        raise OptionError(f"the recipe {name} fixes how much stays; leave keep out")
    number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
    if keep is not None and not (number and 0 < keep <= 1):
        raise OptionError(f"keep is the fraction that stays, above 0 and at most 1; got {keep!r}")
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise OptionError(f"a recipe is a name or a Recipe; got {type(recipe).__name__}")
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=2)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(f"no recipe is named {recipe!r}; {hint}there are {', '.join(RECIPES)}")
    return RECIPES[recipe](network(model, example_inputs), keep)


def group_by_group(
    model: nn.Module,
    example_inputs: ExampleInputs,
    budget: Budget,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    tuning: Tuning = vgg.LAYER,
    last: Tuning = vgg.LAST,
) -> Recipe:
    """One step for each group that a budget makes narrower, in the order in which they run.

    Raises: as `thinet.prune` does for its budget and patterns.
    """
    net = network(model, example_inputs)
    groups = select_groups(net.analysis.groups, only, skip)
    widths = uniform_widths(budget, groups, net.analysis.costs)
    cut = [group for group in groups if widths[group.name] < group.channels]
    if not cut:
        raise OptionError("the budget leaves every group as it is; there is nothing to do")
    return Recipe(
        "budget",
        tuple(
            Step(group.name, {group.name: widths[group.name]}, last if group is cut[-1] else tuning)
            for group in cut
        ),
    )
