"""Names and patterns that are no group's: what they likely meant is said."""

from __future__ import annotations

import re

import pytest

from thinet.errors import LockedGroupError, UnknownGroupError
from thinet.selection import check_names, named_groups, select_groups
from thinet.types import ChannelGroup


def group(
    name: str, producers: tuple[str, ...], consumers: tuple[str, ...], locked: str | None = None
) -> ChannelGroup:
    return ChannelGroup(name, 4, locked, producers, consumers, ())


GROUPS = (
    group("stem", ("stem", "layer1.conv2"), ("layer1.conv1", "fc")),
    group("layer1.conv1", ("layer1.conv1",), ("layer1.conv2",)),
    group("fc", ("fc",), (), "it is an output of the model"),
)
SOME = "(stem, layer1.conv1, fc)"


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (
            "layer1.conv2",
            f"the pattern 'layer1.conv2' matches none of the 3 groups {SOME}; layer1.conv2 makes "
            "the channels of group 'stem'; layer1.conv2 mixes the channels of group "
            "'layer1.conv1'; thinet inspect lists them all",
        ),
        ("*.conv2", "layer1.conv2 makes the channels of group 'stem'; layer1.conv2 mixes"),
        ("layer1.conv3", f"3 groups {SOME}; near it: 'layer1.conv1'; thinet inspect lists them"),
        ("block", f"3 groups {SOME}; thinet inspect lists them all"),
    ],
)
def test_a_pattern_without_a_group_is_told_what_is_near(pattern: str, says: str) -> None:
    with pytest.raises(UnknownGroupError, match=re.escape(says)):
        select_groups(GROUPS, only=pattern)
    with pytest.raises(UnknownGroupError, match=re.escape(says)):
        select_groups(GROUPS, skip=pattern)


def test_names_without_a_group_are_told_what_names_them() -> None:
    says = f"--width names the group 'layer9', which is none of the 3 groups {SOME}; "
    with pytest.raises(UnknownGroupError, match=re.escape(says)):
        check_names("--width", ["stem", "layer9"], GROUPS)
    check_names("--width", ["stem"], GROUPS)
    with pytest.raises(UnknownGroupError, match="the budget names the group 'stm', .*: 'stem'"):
        named_groups(GROUPS, {"stm": 2}, None, None)
    with pytest.raises(LockedGroupError, match="'fc' may not be cut: it is an output"):
        named_groups(GROUPS, {"fc": 2}, None, None)
