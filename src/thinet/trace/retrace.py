"""See by tracing again that each group follows a cut; lock those that do not.

Numbers hide in forward code: `x.view(n, 64, -1)`, `x[:, :32]`, a scale computed from a size. Labels
cannot see them, a second trace can (`thinet.trace.probe`). Where an attribute holds the number, it
is patched (`thinet.trace.follow`); else the group is locked with the operation as the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, permutations
from math import comb, factorial
from typing import TypeAlias

import numpy as np
from torch import nn

from thinet.paths import named_modules
from thinet.trace.comparison import Mismatch
from thinet.trace.follow import Guess, Where, assume, bare_norms, guesses, integers
from thinet.trace.groups import Analysis
from thinet.trace.labels import BY_NUMBER, Labeller
from thinet.trace.planning import left_empty
from thinet.trace.probe import Trial, probe, trial
from thinet.trace.replica import Call
from thinet.types import ChannelGroup


@dataclass(frozen=True, eq=False)
class Checked:
    """An analysis with the attributes that follow, and the groups that do not follow a cut."""

    analysis: Analysis
    refused: tuple[tuple[ChannelGroup, Mismatch], ...]


def check(
    analysis: Analysis,
    pristine: nn.Module,
    inputs: Call,
    *,
    worth: Callable[[Collection[str]], bool] = lambda refused: True,
    seed: int = 0,
) -> Checked | None:
    """See that every group follows a cut, and learn which attributes must be patched for it.

    Units go from all groups together: one each, then different numbers from neighbours, then
    random numbers from a random half of the groups. Along an axis that an operation counts along,
    errors can show for some units only or cancel: there the first, the last and random units are
    also tried, and any two groups one without the other. Where a try fails and no attribute
    helps, the groups at the failing operation are tried alone.

    None where it is no longer `worth` it with the groups that were refused.
    """
    analysis = bare_norms(analysis, pristine)
    suspects = {g.name: g for g in analysis.groups if g.locked is None and g.channels > 1}
    rng = np.random.default_rng(seed)
    counted = _counted_along(analysis.labeller, analysis)
    units = ("first", "last", "half", "half")
    parted = [_part(set(counted), each) for each in units if counted] + [
        _part({name for name, n in counted.items() if n in some}, each)
        for some in _one_without_other(1 + max(counted.values(), default=0))
        for each in units[:3]
    ]
    refused = _taken_alone(analysis, suspects)
    for group, _ in refused:
        del suspects[group.name]
    hopeless: set[tuple[type[nn.Module], str]] = set()
    for draw in (_one, _uneven, _random, *parted):
        tried: Trial | None = None  # the same again after something was learned from it
        while suspects:
            if not worth({group.name for group, _ in refused}):
                return None
            if tried is None or left_empty(analysis, tried.keep):
                keep = _with_some_left(analysis, draw(list(suspects.values()), rng))
                if not keep:
                    break
                tried = trial(analysis, pristine, keep)
            mismatch = probe(analysis, tried, inputs)
            if mismatch is None:
                break
            kind = (type(pristine.get_submodule(mismatch.module)), mismatch.kind)
            if kind not in hopeless:
                learned = learn(analysis, pristine, inputs, tried, mismatch)
                if learned is not None:
                    analysis = learned
                    continue
                hopeless.add(kind)
            keep, tried = tried.keep, None
            for group, found in _culprits(analysis, pristine, inputs, keep, mismatch):
                twins, alike = _twins(pristine, group, found.module, suspects)
                others = [name for name in alike if name in keep]
                if others and probe(
                    analysis, trial(analysis, pristine, {others[-1]: keep[others[-1]]}), inputs
                ):
                    twins += others
                for name in [group.name, *twins]:
                    if name in suspects:  # not yet as another culprit's twin
                        refused.append((suspects.pop(name), found))
    return Checked(analysis, tuple(refused))


def learn(
    analysis: Analysis,
    pristine: nn.Module,
    inputs: Call,
    cut: Trial,
    mismatch: Mismatch,
) -> Analysis | None:
    """The analysis with attributes that make the trace follow further, or None."""

    def progress(tried: Sequence[Guess]) -> Analysis | None:
        assumed = assume(analysis, pristine, tried)
        found = probe(assumed, cut, inputs, until=mismatch.index)
        return assumed if found is None or found.index > mismatch.index else None

    options = guesses(analysis, pristine, mismatch.module, mismatch.index)
    for guess in options:
        if not guess.taken and (better := progress([guess])) is not None:
            return better
    # Several attributes of one module may have to change together.
    for together in _all_at_once(options):
        if len(together) > 1 and progress(together) is not None:
            for guess in list(together):
                fewer = [g for g in together if g is not guess]
                if progress(fewer) is not None:
                    together = fewer
            return progress(together)
    return None


def _all_at_once(options: Sequence[Guess]) -> list[list[Guess]]:
    """A guess for each number; what equal numbers of one list count is tried in several orders.

    `x.split([8, 8, 16], 1)` has an axis for each: most often, the numbers are in their order.
    """
    by_number: dict[tuple[type[nn.Module], str, int | None], list[Guess]] = {}
    for guess in options:
        by_number.setdefault((guess.kind, guess.attribute, guess.place), []).append(guess)
    equal: dict[tuple[type[nn.Module], str, tuple[Where, ...]], list[list[Guess]]] = {}
    for (kind, attribute, _), some in by_number.items():
        axes = tuple(guess.where for guess in some)
        equal.setdefault((kind, attribute, axes), []).append(some)
    tries: list[list[Guess]] = []
    for n in range(min(ORDERS, factorial(max(map(len, equal.values()), default=0)))):
        chosen: list[Guess] = []
        for lists in equal.values():
            order = next(islice(permutations(range(len(lists))), n % factorial(len(lists)), None))
            chosen += [some[min(k, len(some) - 1)] for k, some in zip(order, lists, strict=True)]
        tries.append(chosen)
    first = [some[0] for some in by_number.values()]
    return tries if first in tries else [*tries, first]


ORDERS = 6
"""Orders of equal numbers that are tried, which are all of three."""


# A name of numpy's in quotes: its random numbers are loaded at the first draw, not on import.
Draw: TypeAlias = "Callable[[Sequence[ChannelGroup], np.random.Generator], dict[str, list[int]]]"


def _one(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> dict[str, list[int]]:
    # The first unit: all others move up, which shows whatever goes by position.
    return {g.name: list(range(1, g.channels)) for g in groups}


def _uneven(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> dict[str, list[int]]:
    return {g.name: _without(g, 1 + n % max(g.channels // 2, 1), rng) for n, g in enumerate(groups)}


def _random(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> dict[str, list[int]]:
    half = [g for g in groups if rng.random() < 0.5] or groups[:1]
    return {g.name: _without(g, int(rng.integers(1, g.channels)), rng) for g in half}


def _part(chosen: set[str], units: str) -> Draw:
    """Units of some groups only."""

    def draw(groups: Sequence[ChannelGroup], rng: np.random.Generator) -> dict[str, list[int]]:
        picked = [g for g in groups if g.name in chosen]
        if units == "half":
            return {g.name: _without(g, max(g.channels // 2, 1), rng) for g in picked}
        first = 1 if units == "first" else 0
        return {g.name: list(range(first, g.channels - 1 + first)) for g in picked}

    return draw


def _one_without_other(count: int) -> list[set[int]]:
    """The fewest sets of the numbers below `count` such that of any two each is without the other.

    Each number is in a different half of the sets, so that none is in all that another is in; more
    numbers than there are halves cannot be told apart (E. Sperner, 1928).
    """
    sets = 0
    while comb(sets, sets // 2) < count:
        sets += 1
    places = list(islice(combinations(range(sets), sets // 2), count))
    return [{n for n, among in enumerate(places) if each in among} for each in range(sets)]


def _taken_alone(
    analysis: Analysis, suspects: Mapping[str, ChannelGroup]
) -> list[tuple[ChannelGroup, Mismatch]]:
    """Groups with a unit that makes a slice or a piece by itself, so that it may never go."""
    classes = analysis.labeller.classes
    owner = {root: g for g in suspects.values() for root in analysis.roots[g.name].tolist()}
    found: dict[str, tuple[ChannelGroup, Mismatch]] = {}
    for op, labels in analysis.labeller.pieces:
        roots = classes.find(labels)
        if len(roots) and (roots == roots[0]).all():
            root = int(roots[0])
            group = owner.get(root)
            if group is not None and group.name not in found:
                reason = f"{op.where} takes one of it alone"
                found[group.name] = group, Mismatch(reason, op.module, frozenset((root,)), op.index)
    return list(found.values())


def _with_some_left(analysis: Analysis, keep: dict[str, list[int]]) -> dict[str, list[int]]:
    """With one unit more of whatever nothing would be left of, as no cut may do that."""
    for emptied in left_empty(analysis, keep):
        for name, some in emptied.units.items():
            if name in keep:
                keep[name] = sorted({*keep[name], some[0]})
    return keep


def _counted_along(labeller: Labeller, analysis: Analysis) -> dict[str, int]:
    """Groups on an axis that an operation counts along, numbered so that two on one axis differ."""
    owner = np.full(labeller.classes.count, -1, dtype=np.int64)
    for number, group in enumerate(analysis.groups):
        owner[analysis.roots[group.name]] = number
    together: set[tuple[int, ...]] = set()
    for op in labeller.program.ops:
        if op.name in BY_NUMBER:
            for before, axis in enumerate(labeller.of(op.args[0])):
                same = [labeller.of(out)[before : before + 1] for out in op.outputs()]
                passed = all(len(a) == 1 and a[0] is axis for a in same)
                if isinstance(axis, np.ndarray) and not passed:
                    met = np.unique(owner[labeller.classes.find(axis)])
                    together.add(tuple(met[met >= 0].tolist()))
    numbers: dict[int, int] = {}
    for group in sorted({g for met in together for g in met}):
        near = {numbers.get(other, -1) for met in together if group in met for other in met}
        numbers[group] = next(n for n in range(len(near) + 1) if n not in near)
    return {analysis.groups[group].name: n for group, n in numbers.items()}


def _without(group: ChannelGroup, count: int, rng: np.random.Generator) -> list[int]:
    """Units to keep: at least two, where there are three or more."""
    most = group.channels - (2 if group.channels > 2 else 1)
    gone = set(rng.choice(group.channels, size=min(count, most), replace=False).tolist())
    return [unit for unit in range(group.channels) if unit not in gone]


def _culprits(
    analysis: Analysis,
    pristine: nn.Module,
    inputs: Call,
    keep: Mapping[str, Sequence[int]],
    mismatch: Mismatch,
) -> list[tuple[ChannelGroup, Mismatch]]:
    """The groups that fail by themselves, or where none does, those that fail only together.

    First those that the failing operation works on are tried, then those that its module has
    parameters of, then all.
    """
    at = [name for name in keep if not mismatch.roots.isdisjoint(analysis.roots[name].tolist())]

    def fails(names: Sequence[str]) -> Mismatch | None:
        cut = trial(analysis, pristine, {name: keep[name] for name in names})
        return probe(analysis, cut, inputs, until=mismatch.index)

    path = f"{mismatch.module}."
    inside = [
        name
        for name in keep
        if any(member.parameter.startswith(path) for member in analysis.group(name).members)
    ]
    if len(at) == 1 and {*at, *inside} == {*at}:
        return [(analysis.group(at[0]), mismatch)]
    for names in (at, inside, list(keep)):
        found = (_alone(fails, names) or _together(fails, names, mismatch)) if names else []
        if found:
            return [(analysis.group(name), why) for name, why in found]
    return [(analysis.group(name), mismatch) for name in at or keep]


Fails = Callable[[Sequence[str]], Mismatch | None]


def _alone(fails: Fails, names: Sequence[str]) -> list[tuple[str, Mismatch]]:
    """The groups that fail by themselves; of many only those in halves that fail."""
    if len(names) <= FEW:
        return [(name, found) for name in names if (found := fails([name])) is not None]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [each for half in halves if fails(half) is not None for each in _alone(fails, half)]


FEW = 4


def _twins(
    model: nn.Module, group: ChannelGroup, module: str, suspects: Mapping[str, ChannelGroup]
) -> tuple[list[str], list[str]]:
    """Groups that touch the same parameters of a module with the same class and numbers.

    Then those that do so but for their places in lists of the module's, as the heads of an
    attention; something may be done at one place only.
    """

    def inside(other: ChannelGroup, path: str) -> list[tuple[str, int]]:
        own = [m for m in other.members if m.parameter.startswith(f"{path}.")]
        return sorted((m.parameter[len(path) :], m.dim) for m in own)

    def unnumbered(places: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return sorted((NUMBERS.sub(".#", name), dim) for name, dim in places)

    first = model.get_submodule(module)
    numbers, touched = sorted(integers(first), key=str), inside(group, module)
    if not module or len(touched) < len(group.members):
        return [], []
    by_module: dict[str, list[ChannelGroup]] = {}
    for other in suspects.values():
        for path in _holders(other.members[0].parameter):
            by_module.setdefault(path, []).append(other)
    near = [
        (other.name, inside(other, path))
        for path, holder in named_modules(model).items()
        if type(holder) is type(first) and path in by_module
        if sorted(integers(holder), key=str) == numbers
        for other in by_module[path]
        if other is not group and other.channels == group.channels
        if len(other.members) == len(group.members)
    ]
    same = [name for name, places in near if places == touched]
    like = unnumbered(touched)
    return same, [n for n, places in near if places != touched and unnumbered(places) == like]


NUMBERS = re.compile(r"\.\d+(?=\.)")
"""Places in lists, in a dotted name."""


def _holders(parameter: str) -> list[str]:
    """The dotted paths of all modules that a parameter lies in."""
    parts = parameter.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _together(fails: Fails, names: Sequence[str], mismatch: Mismatch) -> list[tuple[str, Mismatch]]:
    """Groups that fail only together: the smallest part of them that halving finds."""
    together = list(names)
    if fails(together) is None:
        return []
    while len(together) > 1:
        middle = len(together) // 2
        for part in (together[:middle], together[middle:]):
            found = fails(part)
            if found is not None:
                together, mismatch = part, found
                break
        else:
            break
    return [(name, mismatch) for name in together]
