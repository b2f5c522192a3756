"""A plan: frozen data that says what stays. It decides nothing and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from thinet.errors import CheckpointError, OptionError
from thinet.types import Slice

FORMAT = 1

EXPLICIT = "explicit"
"""The builder that keeps a module and its weights, and lets it state its own sizes."""


@dataclass(frozen=True)
class AttributeChange:
    """A module attribute that follows the new shapes, such as `in_channels`."""

    module: str
    attribute: str
    value: int | tuple[int, ...]


@dataclass(frozen=True)
class Replacement:
    """A module that is replaced before anything is cut, by a named builder of `thinet.surgery`."""

    module: str
    builder: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What stays of a dense model.

    Attributes:
        keep: for each group that is cut, the units of the dense model that stay.
        kept: for each parameter dimension that is cut, the indices that stay.
        attributes: module attributes with their new values.
        replaced: modules that are replaced before the cut.
        settings: how the plan was made (criterion, repair, budget), for the record only.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kept: tuple[Slice, ...] = ()
    attributes: tuple[AttributeChange, ...] = ()
    replaced: tuple[Replacement, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def then(self, later: Plan) -> Plan:
        """This plan followed by one that was made for the model it gives.

        Modules are replaced first: what was cut in a module that the later plan replaces is
        forgotten, its replacement has its own sizes. A group whose units are others in the cut
        model (a grouped convolution may be tied in another way once it is narrow) has no entry in
        `keep`; `kept` says all.

        Raises:
            OptionError: the later plan keeps what this one does not leave.
        """
        gone = tuple(r.module for r in later.replaced if r.builder != EXPLICIT)
        keep = {g: u for g, u in self.keep.items() if not _within(_layer(g), gone)}
        for name, units in later.keep.items():
            if _same_units(name, self, later):
                keep[name] = _picked(keep[name], units, name) if name in keep else units
            else:
                keep.pop(name, None)
        kept = {
            (s.parameter, s.dim): s.indices for s in self.kept if not _within(s.parameter, gone)
        }
        for piece in later.kept:
            key = (piece.parameter, piece.dim)
            kept[key] = (
                _picked(kept[key], piece.indices, piece.parameter) if key in kept else piece.indices
            )
        before = [a for a in self.attributes if not _within(a.module, gone)]
        attributes = {(a.module, a.attribute): a for a in (*before, *later.attributes)}
        return Plan(
            keep=keep,
            kept=tuple(Slice(name, dim, indices) for (name, dim), indices in kept.items()),
            attributes=tuple(attributes.values()),
            replaced=(*self.replaced, *later.replaced),
            settings={**self.settings, **later.settings},
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives an equal plan back."""
        return {
            "format": FORMAT,
            "keep": {name: list(units) for name, units in self.keep.items()},
            "kept": [[s.parameter, s.dim, list(s.indices)] for s in self.kept],
            "attributes": [
                [a.module, a.attribute, list(a.value) if isinstance(a.value, tuple) else a.value]
                for a in self.attributes
            ],
            "replaced": [[r.module, r.builder, dict(r.options)] for r in self.replaced],
            "settings": dict(self.settings),
        }

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Raises: CheckpointError: this is not a plan, or one of a newer version."""
        try:
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"the plan has format {data['format']}, this version of thinet reads format "
                    f"{FORMAT}; use the version that wrote it"
                )
            return Plan(
                keep={str(k): _indices(v) for k, v in data["keep"].items()},
                kept=tuple(Slice(str(p), int(d), _indices(i)) for p, d, i in data["kept"]),
                attributes=tuple(
                    AttributeChange(str(m), str(a), _ints(v) if isinstance(v, list) else int(v))
                    for m, a, v in data["attributes"]
                ),
                replaced=tuple(
                    Replacement(str(m), str(b), dict(o)) for m, b, o in data["replaced"]
                ),
                settings=dict(data["settings"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is not a thinet plan ({error!r})") from error


def _layer(group: str) -> str:
    """The module that a group is named for; a number tells its second group."""
    return group.partition(":")[0]


def _same_units(group: str, first: Plan, later: Plan) -> bool:
    """Whether as many filters make a unit of the group in both plans."""
    name = f"{_layer(group)}.weight"
    before, after = (
        next((len(s.indices) for s in plan.kept if (s.parameter, s.dim) == (name, 0)), None)
        for plan in (first, later)
    )
    if group not in first.keep:
        return before is None
    if before is None or after is None:
        return True
    return before * len(later.keep[group]) == after * len(first.keep[group])


def _within(name: str, modules: Sequence[str]) -> bool:
    """Whether a dotted name is one of the modules or lies in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _picked(first: tuple[int, ...], later: tuple[int, ...], name: str) -> tuple[int, ...]:
    if later and max(later) >= len(first):
        raise OptionError(
            f"the later plan keeps entry {max(later)} of {name}, of which this plan leaves "
            f"{len(first)}; it was made for another model"
        )
    return tuple(first[i] for i in later)


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(int(v) for v in values)


def _indices(values: Any) -> tuple[int, ...]:
    found = _ints(values)
    if not found or found[0] < 0 or any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"indices {values} do not rise from 0 or more")
    return found
