"""Which groups a call is about: glob patterns, or the names in a budget."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from thinet.errors import LockedGroupError, OptionError, UnknownGroupError
from thinet.types import ChannelGroup


def select_groups(
    groups: Sequence[ChannelGroup],
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
) -> tuple[ChannelGroup, ...]:
    """The groups that may be cut and that the glob patterns choose.

    Raises:
        UnknownGroupError: a pattern matches no group.
        LockedGroupError: none of the chosen groups may be cut; says why for each.
    """
    chosen = [g for g in groups if only is None or _matches(g, _patterns(only))]
    for pattern in (*_patterns(only), *_patterns(skip)):
        if not any(_matches(g, (pattern,)) for g in groups):
            raise UnknownGroupError(
                f"the pattern {pattern!r} matches none of the {len(groups)} groups "
                f"{_hint(pattern, groups)}; thinet inspect lists them all"
            )
    chosen = [g for g in chosen if not _matches(g, _patterns(skip))]
    free = tuple(g for g in chosen if g.locked is None and g.channels > 1)
    if not free:
        reasons = "".join(
            f"\n  {g.name}: {g.locked or 'it has a single channel'}" for g in chosen[:40]
        )
        raise LockedGroupError(
            "nothing can be cut"
            + (":" + reasons if reasons else f"; none of the {len(groups)} groups is chosen")
        )
    return free


def named_groups(
    groups: Sequence[ChannelGroup],
    named: Mapping[str, object],
    only: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
) -> list[str]:
    """The names of a budget that names its groups; errors as `select_groups` raises them."""
    if only is not None or skip is not None:
        raise OptionError("this budget names its groups; leave only and skip out")
    check_names("the budget", named, groups)
    known = {group.name: group for group in groups}
    for name in named:
        if known[name].locked is not None:
            raise LockedGroupError(f"group {name!r} may not be cut: {known[name].locked}")
    return list(named)


def check_names(where: str, named: Iterable[str], groups: Sequence[ChannelGroup]) -> None:
    """See that each is the name of one of the groups.

    Args:
        where: what names them, for the message.

    Raises:
        UnknownGroupError: one is not; says which group the layer belongs to, or close names.
    """
    known = {group.name for group in groups}
    for name in named:
        if name not in known:
            raise UnknownGroupError(
                f"{where} names the group {name!r}, which is none of the {len(known)} groups "
                f"{_hint(name, groups)}; thinet inspect lists them all"
            )


def _hint(pattern: str, groups: Sequence[ChannelGroup]) -> str:
    """Some of the groups, and the groups that a layer of that name is in, or close names."""
    names = [group.name for group in groups]
    some = f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
    held: list[str] = []
    for group in groups:
        for layers, does in ((group.producers, "makes"), (group.consumers, "mixes")):
            layer = next((layer for layer in layers if fnmatchcase(layer, pattern)), None)
            if layer is not None:
                held.append(f"{layer} {does} the channels of group {group.name!r}")
    if held:
        return "; ".join((some, *held[:3]))
    close = difflib.get_close_matches(pattern, names, n=3)
    return f"{some}; near it: {', '.join(map(repr, close))}" if close else some


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise OptionError(f"only and skip are glob patterns, one or several strings; got {given!r}")
    return tuple(patterns)


def _matches(group: ChannelGroup, patterns: Sequence[str]) -> bool:
    """By the group's name, with or without the number of a second group of one producer."""
    names = (group.name, group.name.partition(":")[0])
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
