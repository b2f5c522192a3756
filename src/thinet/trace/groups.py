"""From labels to groups: classes of indices that go together, bundled by what they touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from torch import nn

from thinet.trace.labels import Axis, Classes, Labeller, Mixing, Vector
from thinet.trace.program import Program
from thinet.types import ChannelGroup, Member, Role, Site


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer; its labels are `start` and the n - 1 after it."""

    parameter: str
    dim: int
    start: int
    size: int

    @property
    def labels(self) -> Vector:
        return np.arange(self.start, self.start + self.size, dtype=np.int64)


@dataclass(frozen=True)
class Size:
    """How many indices of an axis stay: `fixed` + sum over groups of units kept x `per_unit`.

    Where the units of a group have unequally many indices, `per_unit` is their mean.
    """

    fixed: int
    per_unit: tuple[tuple[str, float], ...]

    def at(self, widths: Mapping[str, float], full: Mapping[str, int]) -> float:
        return self.fixed + sum(n * widths.get(name, full[name]) for name, n in self.per_unit)


@dataclass(frozen=True)
class CostTerm:
    """`times` x the product of the sizes: MACs of an operation or elements of a parameter."""

    module: str
    times: int
    sizes: tuple[Size, ...]

    def at(self, widths: Mapping[str, float], full: Mapping[str, int]) -> float:
        return self.times * prod(size.at(widths, full) for size in self.sizes)


@dataclass(frozen=True)
class Costs:
    """Costs of the model for any number of units kept in each group, without cutting it.

    Exact where all units of a group are alike, as they nearly always are.
    """

    full: Mapping[str, int]
    macs_terms: tuple[CostTerm, ...]
    params_terms: tuple[CostTerm, ...]

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-adds with `widths[group name]` units kept; groups not named are whole."""
        return round(sum(term.at(widths, self.full) for term in self.macs_terms))

    def params(self, widths: Mapping[str, int]) -> int:
        """Elements of all parameters, buffers not counted."""
        return round(sum(term.at(widths, self.full) for term in self.params_terms))


@dataclass(frozen=True, eq=False)
class Followed:
    """A number in a module's attribute (or one element of it) that counts these labels."""

    module: str
    attribute: str
    place: int | None
    labels: Vector


@dataclass(frozen=True, eq=False)
class Analysis:
    """All that is known of a model's channels before anything is cut.

    Attributes:
        program: the traced operations.
        labeller: the axes of every value.
        training: the same for the training forward, where that uses parameters of its own.
        groups: what can go together, locked ones included.
        roots: for each group name, the class of each unit.
        slots: the labelled dimensions of parameters and buffers.
        costs: MACs and parameters as functions of the widths.
        followed: attributes that were seen to count channels.
        axes: for each module asked about, where its operations have labels (a cache).
    """

    program: Program
    labeller: Labeller
    training: Labeller | None
    groups: tuple[ChannelGroup, ...]
    roots: Mapping[str, Vector]
    slots: tuple[Slot, ...]
    costs: Costs
    followed: tuple[Followed, ...] = ()
    axes: dict[str, dict[tuple[str, int, int, int], tuple[int, Vector]]] = field(
        default_factory=dict, repr=False
    )

    def group(self, name: str) -> ChannelGroup:
        return next(group for group in self.groups if group.name == name)


def never_run(analysis: Analysis, model: nn.Module) -> tuple[str, ...]:
    """A sentence on layers whose weights no operation reads on the example inputs, in either mode:
    what they do with channels is not known, and they are left as they are."""
    unread = set(analysis.program.unused)
    if analysis.training is not None:
        unread &= set(analysis.training.program.unused)
    weights = [name for name, p in model.named_parameters() if p.ndim > 1 and name in unread]
    layers = list(dict.fromkeys(map(layer_name, weights)))
    if not layers:
        return ()
    named = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
    return (
        f"{named}: not run on the example inputs and left unchanged; another way through the model "
        "that brings channels there will not fit where these are cut",
    )


def slots_of(program: Program) -> tuple[Slot, ...]:
    """Parameter dimensions in the order in which the labeller numbers them."""
    slots: list[Slot] = []
    start = 0
    for value_id, value in program.parameters.items():
        for dim, size in enumerate(value.shape):
            slots.append(Slot(program.names[value_id], dim, start, size))
            start += size
    return tuple(slots)


def layer_name(parameter: str) -> str:
    """The module that a parameter makes a layer of: `features.0` for `features.0.weight`."""
    path, _, leaf = parameter.partition(".parametrizations.")[0].rpartition(".")
    return path or leaf


def build(
    labeller: Labeller,
    trainable: frozenset[str],
    *,
    training: Labeller | None = None,
    normalised: bool = False,
    refused: Sequence[tuple[Vector, str]] = (),
    followed: Sequence[Followed] = (),
) -> Analysis:
    """Bundle the labels of a finished walk.

    Args:
        training: a walk over the training forward in the same classes, where it uses more.
        trainable: names of parameters (the rest of the slots are buffers).
        normalised: whether channels that a normalisation couples may be cut.
        refused: labels that tracing again showed not to follow a cut, with the reason.
        followed: attributes that tracing again showed to count channels.
    """
    program, classes = labeller.program, labeller.classes
    slots = slots_of(program)
    owner = np.full(classes.count, -1, dtype=np.int64)
    for number, slot in enumerate(slots):
        owner[slot.start : slot.start + slot.size] = number
    mixings = [*labeller.mixings, *(training.mixings if training else ())]
    producing, consuming = _roles(mixings, owner)
    every = np.arange(sum(slot.size for slot in slots), dtype=np.int64)
    roots = classes.find(every)
    locks = _first_reason(classes, [*classes.locks, *refused])
    norms = _first_reason(classes, classes.normalised)
    reasons = [reason for _, reason in [*classes.locks, *refused]]
    norm_reasons = [reason for _, reason in classes.normalised]

    # Classes that touch the same slots, for the same reasons, are one group.
    touch = np.zeros(classes.count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        # Each slot once: a unit may have several entries in it, not always equally many.
        pairs = np.sort(roots * np.int64(len(slots) + 1) + owner[: len(every)])
        pairs = pairs[np.diff(pairs, prepend=-1) != 0]
        marks = _scramble((pairs % np.int64(len(slots) + 1)).astype(np.uint64))
        np.add.at(touch, pairs // np.int64(len(slots) + 1), marks)
    first_seen = np.full(classes.count, np.iinfo(np.int64).max)
    order = {number: place for place, number in enumerate(producing)}
    mixed = {number: place for place, number in enumerate(consuming)}
    rank = np.array([order.get(number, len(order)) for number in range(len(slots))] or [0])
    # A unit stands where its first producer's filter stands.
    position = rank[owner[: len(every)]] * np.int64(1 << 40) + every
    produced = np.isin(owner[: len(every)], producing)
    np.minimum.at(first_seen, roots[produced], position[produced])
    made = np.array(_present(roots[produced]), dtype=np.int64)
    made = made[np.argsort(first_seen[made], kind="stable")]
    bundles: dict[tuple[int, str | None, str | None], list[int]] = {}
    for root in made.tolist():
        lock = reasons[locks[root]] if locks[root] >= 0 else None
        norm = norm_reasons[norms[root]] if norms[root] >= 0 else None
        bundles.setdefault((int(touch[root]), lock, norm), []).append(root)

    unit_of = np.full(classes.count, -1, dtype=np.int64)
    group_of = np.full(classes.count, -1, dtype=np.int64)
    for number, members in enumerate(bundles.values()):
        unit_of[members] = np.arange(len(members))
        group_of[members] = number
    by_group = _members(slots, classes, group_of, unit_of, producing, consuming)
    sites = _sites(labeller, group_of, unit_of)
    groups: list[ChannelGroup] = []
    names: dict[str, int] = {}
    group_roots: dict[str, Vector] = {}
    for number, ((_, lock, norm), members) in enumerate(bundles.items()):
        found = by_group[number]
        held = {slot for slot, _ in found}
        producers = _layers(slots, held, order)
        name = producers[0]
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:
            name = f"{name}:{names[name]}"
        if lock is None and norm is not None and not normalised:
            lock = f"{norm}; ask for normalised groups to cut it all the same"
        consumers = _layers(slots, held, mixed)
        mixers = _unique(site.module for site in sites.get(number, ()) if site.parameter is None)
        groups.append(
            ChannelGroup(
                name=name,
                channels=len(members),
                locked=lock,
                producers=producers,
                consumers=_unique((*consumers, *mixers)),
                members=tuple(member for _, member in found),
                sites=tuple(sites.get(number, ())),
                normalised_over=norm,
            )
        )
        group_roots[name] = np.array(members, dtype=np.int64)
    ordered = tuple(groups)
    return Analysis(
        program=program,
        labeller=labeller,
        training=training,
        groups=ordered,
        roots=group_roots,
        slots=slots,
        costs=_costs(labeller, slots, trainable, ordered, group_of),
        followed=tuple(followed),
    )


def _roles(mixings: Sequence[Mixing], owner: Vector) -> tuple[list[int], list[int]]:
    """Slots whose labels a layer makes, and slots whose labels a layer mixes, as they run."""
    producing: dict[int, None] = {}
    consuming: dict[int, None] = {}
    for mixing in mixings:
        for axis, roles in ((mixing.out, producing), (mixing.weight, consuming)):
            if isinstance(axis, np.ndarray):
                for slot in _present(owner[axis]):
                    roles.setdefault(slot)
    return list(producing), list(consuming)


def _layers(slots: Sequence[Slot], held: set[int], order: Mapping[int, int]) -> tuple[str, ...]:
    """The layers of those slots that have a place in the order, as they run."""
    placed = sorted(held & order.keys(), key=order.__getitem__)
    return _unique(layer_name(slots[slot].parameter) for slot in placed)


def _present(numbers: Vector) -> list[int]:
    """Which numbers from zero are there, in order."""
    return np.flatnonzero(np.bincount(numbers[numbers >= 0])).tolist()


def _first_reason(classes: Classes, marked: Sequence[tuple[Vector, str]]) -> Vector:
    """For each root, the index of the first mark on its class, -1 where there is none."""
    first = np.full(classes.count, -1, dtype=np.int64)
    for number in range(len(marked) - 1, -1, -1):
        first[classes.find(marked[number][0])] = number
    return first


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """A fixed 64-bit hash (splitmix64), so that sums of it tell sets apart."""
    with np.errstate(over="ignore"):
        z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _members(
    slots: Sequence[Slot],
    classes: Classes,
    group_of: Vector,
    unit_of: Vector,
    producing: Sequence[int],
    consuming: Sequence[int],
) -> dict[int, list[tuple[int, Member]]]:
    made, mixed = set(producing), set(consuming)
    found: dict[int, list[tuple[int, Member]]] = {}
    for number, slot in enumerate(slots):
        roots = classes.find(slot.labels)
        touched = group_of[roots]
        role: Role = "consumes" if number in mixed else "produces" if number in made else "follows"
        for group in _present(touched):
            units = np.where(touched == group, unit_of[roots], -1)
            member = Member(slot.parameter, slot.dim, role, tuple(units.tolist()))
            found.setdefault(group, []).append((number, member))
    return found


def _sites(labeller: Labeller, group_of: Vector, unit_of: Vector) -> dict[int, list[Site]]:
    classes, program = labeller.classes, labeller.program
    names = {start: name for name, start in _starts(program)}
    starts = np.array(sorted(names), dtype=np.int64)
    found: dict[int, list[Site]] = {}
    for mixing in labeller.mixings:
        if not isinstance(mixing.source, np.ndarray):
            continue
        roots = classes.find(mixing.source)
        parameter = None
        if isinstance(mixing.weight, np.ndarray) and mixing.weight[0] < classes.count:
            place = int(np.searchsorted(starts, mixing.weight[0], side="right")) - 1
            parameter = names[int(starts[place])] if place >= 0 else None
        touched = group_of[roots]
        for group in _present(touched):
            units = np.where(touched == group, unit_of[roots], -1)
            found.setdefault(group, []).append(
                Site(mixing.op.index, mixing.op.module, parameter, tuple(units.tolist()))
            )
    return found


def _starts(program: Program) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    start = 0
    for value_id, value in program.parameters.items():
        if value.shape:
            found.append((program.names[value_id], start))
        start += sum(value.shape)
    return found


def _costs(
    labeller: Labeller,
    slots: Sequence[Slot],
    trainable: frozenset[str],
    groups: Sequence[ChannelGroup],
    group_of: Vector,
) -> Costs:
    classes = labeller.classes
    free = {n: g for n, g in enumerate(groups) if g.locked is None}

    def size(axis: Vector) -> Size:
        touched = group_of[classes.find(axis)]
        counts = np.bincount(touched[touched >= 0])
        held = {n: int(counts[n]) for n in np.flatnonzero(counts).tolist() if n in free}
        per_unit = tuple(
            (free[n].name, _whole(count / free[n].channels)) for n, count in held.items()
        )
        return Size(len(axis) - sum(held.values()), per_unit)

    def term(module: str, times: int, axes: Sequence[Axis]) -> CostTerm:
        sizes = [size(axis) for axis in axes if isinstance(axis, np.ndarray)]
        moving = tuple(s for s in sizes if s.per_unit)
        return CostTerm(module, times * prod(s.fixed for s in sizes if not s.per_unit), moving)

    by_parameter: dict[str, list[Axis]] = {}
    for value_id in labeller.program.parameters:
        by_parameter[labeller.program.names[value_id]] = []
    for slot in slots:
        by_parameter[slot.parameter].append(slot.labels)
    return Costs(
        full={group.name: group.channels for group in groups},
        macs_terms=tuple(term(m.op.module, m.times, m.factors) for m in labeller.mixings),
        params_terms=tuple(
            term(layer_name(name), 1, axes)
            for name, axes in by_parameter.items()
            if name in trainable
        ),
    )


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _unique(names: object) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))  # type: ignore[call-overload]
