"""From what the library's verbs return to the rows of a report."""

from __future__ import annotations

from collections.abc import Sequence

from thinet.prune import PruneReport
from thinet.report.data import Group
from thinet.types import ChannelGroup


def found_groups(groups: Sequence[ChannelGroup]) -> tuple[Group, ...]:
    """A row for each group that `find_groups` gave."""
    return tuple(
        Group(
            group.name,
            group.channels,
            locked=group.locked,
            producers=group.producers,
            consumers=group.consumers,
        )
        for group in groups
    )


def pruned_groups(report: PruneReport) -> tuple[Group, ...]:
    """A row for each group that `prune` looked at, cut or not."""
    return tuple(
        Group(
            group.name,
            group.channels,
            kept=group.kept,
            locked=group.locked,
            producers=group.producers,
            consumers=group.consumers,
        )
        for group in report.groups
    )


def pruned_notes(report: PruneReport) -> tuple[str, ...]:
    """What a user must know about how it went: the budget first."""
    reached = f"{report.budget}: asked {report.target:.4g}, reached {report.reached:.4g}"
    skipped = [f"{layer} was not refitted: {why}" for layer, why in report.not_refitted.items()]
    return (reached, *skipped, *report.notes)


def pruned_facts(report: PruneReport) -> tuple[tuple[str, str], ...]:
    """How it was made, name and value."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    return (("criterion", report.criterion), ("repair", report.repair), ("seconds", seconds))
