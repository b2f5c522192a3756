"""Numbers kept in module attributes that must follow a cut, found by trying and not by name.

An attribute such as `num_heads` or `attn_dim` counts channels. Which ones is not written anywhere:
where the forward code does not follow a cut, each integer attribute that equals the length of an
axis there is taken to count that axis, and the cut is traced again. What makes the trace go on
further is accepted, for all modules of the class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from thinet.paths import named_modules
from thinet.trace.groups import Analysis, Followed
from thinet.trace.labels import Vector

NEAR = 4
"""How many operations on from the one that does not follow an attribute's axis is looked for."""


Where = tuple[str, int, int, int]
"""Name of an operation, which one of that name in its module, which tensor of it, dimension."""


@dataclass(frozen=True)
class Guess:
    """An attribute of a class of modules and the axis that it may count.

    `inside` is the path, from the module that has the attribute, of the one whose operations have
    the axis; `where` says at which operation, tensor and dimension. `taken` if it is what is taken
    to be so already.
    """

    kind: type[nn.Module]
    attribute: str
    place: int | None
    inside: str
    where: Where
    taken: bool = False


def guesses(analysis: Analysis, model: nn.Module, module: str, index: int) -> list[Guess]:
    """What might count the channels that a module's operations work on from number `index` on."""
    found: list[Guess] = []
    axes = _axes(analysis, module)
    taken = {(f.module, f.attribute, f.place): f.labels for f in analysis.followed}
    owner, inside = module, ""
    while True:
        holder = model.get_submodule(owner)
        for attribute, place, value in integers(holder):
            met: set[bytes] = set()
            for where, (number, labels) in axes.items():
                if len(labels) != value:
                    continue
                if not index <= number < index + NEAR:
                    continue
                roots = analysis.labeller.classes.find(labels).tobytes()
                if roots not in met:
                    met.add(roots)
                    same = labels is taken.get((owner, attribute, place))
                    found.append(Guess(type(holder), attribute, place, inside, where, same))
        if not owner:
            return found
        owner, _, last = owner.rpartition(".")
        inside = f"{last}.{inside}" if inside else last


def integers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Attributes that are integers above one, and such elements of lists: (name, place, value)."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield name, None, value
        elif isinstance(value, (list, tuple)) and len(value) <= 64:
            for place, element in enumerate(value):
                if type(element) is int and element > 1:
                    yield name, place, element


def assume(analysis: Analysis, model: nn.Module, chosen: Sequence[Guess]) -> Analysis:
    """The analysis with these guesses taken for true in all modules of their classes."""
    known = {(f.module, f.attribute, f.place): f for f in analysis.followed}
    for guess in chosen:
        for path, module in named_modules(model).items():
            if type(module) is not guess.kind:
                continue
            value = {(n, p): v for n, p, v in integers(module)}.get((guess.attribute, guess.place))
            inside = ".".join(part for part in (path, guess.inside) if part)
            _, labels = _axes(analysis, inside).get(guess.where, (0, ()))
            if value is not None and isinstance(labels, np.ndarray) and len(labels) == value:
                key = path, guess.attribute, guess.place
                known[key] = Followed(*key, labels)
    return replace(analysis, followed=tuple(known.values()))


NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def bare_norms(analysis: Analysis, model: nn.Module) -> Analysis:
    """The analysis with the widths of norms that have no parameters to tell them."""
    known = {(f.module, f.attribute, f.place): f for f in analysis.followed}
    for path, module in named_modules(model).items():
        if not isinstance(module, NORMS) or [*module.parameters(), *module.buffers()]:
            continue
        axes = _axes(analysis, path).values()
        for attribute, place, value in integers(module):
            if attribute in ("num_features", "num_channels", "normalized_shape"):
                for labels in (a for _, a in axes if len(a) == value):
                    key = path, attribute, place
                    known.setdefault(key, Followed(*key, labels))
    return replace(analysis, followed=tuple(known.values()))


def _axes(analysis: Analysis, module: str) -> dict[Where, tuple[int, Vector]]:
    """Axes of the module's own operations that may lose entries, by where they are.

    Each with the number of its operation, those of the training forward after the others.
    """
    if module in analysis.axes:
        return analysis.axes[module]
    labeller = analysis.labeller
    free = np.zeros(labeller.classes.count, dtype=bool)
    for group in analysis.groups:
        if group.locked is None:
            free[analysis.roots[group.name]] = True
    found: dict[Where, tuple[int, Vector]] = {}
    seen: dict[int, bool] = {}  # the same axis is met many times
    for walk in (labeller, analysis.training):
        if walk is None:
            continue
        first = 0 if walk is labeller else len(labeller.program.ops)
        times: Counter[str] = Counter()
        for op in walk.program.by_module.get(module, ()):
            times[op.name] += 1
            for number, value in enumerate([*op.inputs(), *op.outputs()]):
                for dim, axis in enumerate(walk.of(value)):
                    if not isinstance(axis, np.ndarray) or len(axis) < 2:
                        continue
                    if id(axis) not in seen:
                        seen[id(axis)] = bool(free[labeller.classes.find(axis)].any())
                    if seen[id(axis)]:
                        where = op.name, times[op.name], number, dim
                        found.setdefault(where, (first + op.index, axis))
    analysis.axes[module] = found
    return found
