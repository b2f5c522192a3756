"""What a report says, as frozen data: whoever measured fills it in, this folder shows it.

Accuracies are fractions of 1, latencies milliseconds of one forward pass, costs as in
`thinet.types.Counts`. `to_dict` and `from_dict` are the JSON form, the same in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from thinet.cells import Point, Spread
from thinet.errors import OptionError


@dataclass(frozen=True)
class Network:
    """One network that was measured: the dense one, or a smaller one.

    Attributes:
        name: what to call it in a table, unique in its report.
        macs: multiply-adds of one example.
        params: elements of all parameters.
        latency_ms: milliseconds of one forward pass, None if it was not measured.
        top1: accuracy with no training after the cut, None if it was not measured.
        top1_tuned: accuracy after fine-tuning, None if there was none.
        curve: accuracy after each epoch of fine-tuning.
        top5: the label among the five likeliest, with no training; None if it was not measured.
    """

    name: str
    macs: int
    params: int
    latency_ms: float | None = None
    top1: float | None = None
    top1_tuned: float | None = None
    curve: tuple[float, ...] = ()
    top5: float | None = None

    @property
    def best(self) -> float | None:
        """The accuracy that counts: after fine-tuning where there was some."""
        return self.top1 if self.top1_tuned is None else self.top1_tuned


@dataclass(frozen=True)
class Group:
    """One group of channels: how wide it was and is, or why it may not be cut.

    `macs` and `params` are what the channels take part in, in producers and consumers alike.
    """

    name: str
    channels: int
    kept: int | None = None
    locked: str | None = None
    producers: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    macs: int | None = None
    params: int | None = None


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Attributes:
        title: one line.
        summary: one or two sentences under it.
        networks: what was measured, the network that all others are compared with first.
        chosen: name of the network that the big numbers are about; None takes the last.
        groups: the groups, in the order of the network.
        points: methods over budgets and seeds, compared with the first network.
        notes: sentences that a reader must not miss.
        facts: how it was made (command, seed, device, versions), name and value.
        steps: the networks were cut and trained step by step: `curve` is over steps, and `top1`
            of a smaller one was measured after its last cut.
    """

    title: str
    summary: str = ""
    networks: tuple[Network, ...] = ()
    chosen: str | None = None
    groups: tuple[Group, ...] = ()
    points: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    steps: bool = False

    def __post_init__(self) -> None:
        names = [network.name for network in self.networks]
        if len(set(names)) != len(names):
            raise OptionError(f"a report needs networks of different names, got {names}")
        if self.chosen is not None and self.chosen not in names:
            raise OptionError(f"no network {self.chosen!r} in the report; it has {names}")

    @property
    def dense(self) -> Network | None:
        """The network that the others are compared with."""
        return self.networks[0] if self.networks else None

    @property
    def headline(self) -> Network | None:
        """The smaller network that the big numbers are about, None where there is none."""
        if len(self.networks) < 2:
            return None
        return next((n for n in self.networks if n.name == self.chosen), self.networks[-1])


def to_dict(report: Report) -> dict[str, Any]:
    """The report as what JSON can hold."""
    plain = asdict(report)
    plain["facts"] = dict(report.facts)
    return plain


def from_dict(data: Mapping[str, Any]) -> Report:
    """The report that `to_dict` wrote; names beside those of a report are passed over.

    Raises:
        OptionError: a value is missing or of the wrong type.
    """
    try:
        return Report(
            title=str(data["title"]),
            summary=str(data.get("summary", "")),
            networks=tuple(_network(n) for n in data.get("networks", ())),
            chosen=data.get("chosen"),
            groups=tuple(_group(g) for g in data.get("groups", ())),
            points=tuple(_point(p) for p in data.get("points", ())),
            notes=tuple(str(n) for n in data.get("notes", ())),
            facts=tuple((str(k), str(v)) for k, v in dict(data.get("facts", {})).items()),
            steps=bool(data.get("steps", False)),
        )
    except KeyError as error:
        raise OptionError(f"not a report of thinet: it has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"not a report of thinet: {error}") from error


def _network(data: Mapping[str, Any]) -> Network:
    values: dict[str, Any] = {**data, "curve": tuple(data.get("curve", ()))}
    network = Network(**values)
    _check_types(network.name, network)
    return network


def _group(data: Mapping[str, Any]) -> Group:
    values: dict[str, Any] = {
        **data,
        "producers": tuple(data.get("producers", ())),
        "consumers": tuple(data.get("consumers", ())),
    }
    group = Group(**values)
    _check_types(group.name, group)
    if group.channels < 1:
        raise OptionError(f"not a report of thinet: {group.name!r} has {group.channels} channels")
    return group


def _point(data: Mapping[str, Any]) -> Point:
    spreads = {k: Spread(**v) for k, v in data.items() if isinstance(v, Mapping)}
    values: dict[str, Any] = {**data, **spreads}
    point = Point(**values)
    for part in (point, *spreads.values()):
        _check_types(f"{point.method}, {point.budget}", part)
    return point


TYPES = {
    "str": (str,), "int": (int,), "float": (int, float), "None": (type(None),), "Spread": (Spread,)
}  # fmt: skip


def _check_types(name: object, made: Any) -> None:
    """See that the fields hold what they say, finite numbers among them."""
    for field in fields(made):
        value, inner = getattr(made, field.name), field.type.removeprefix("tuple[")
        values = value if isinstance(value, tuple) else (value,)
        known = tuple(t for name in inner.removesuffix(", ...]").split(" | ") for t in TYPES[name])
        for one in values:
            fits = isinstance(one, known) and not isinstance(one, bool)
            if not fits or (isinstance(one, float) and not math.isfinite(one)):
                raise OptionError(f"not a report of thinet: {name!r} has {one!r} for {field.name}")
