"""What a caller can choose where a layout leaves a choice, and what is said of a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from thinet.errors import OptionError

KINDS: Mapping[str, tuple[str, str]] = {
    "groups": ("whole", "within"),
    "layout": ("outer", "inner"),
    "split": ("free", "tied"),
}
"""Kind of choice to its two values: groups of a convolution or GroupNorm, the factor of a reshaped
axis that stays prunable, and pieces of a split that lose channels each by itself or alike."""

OTHER = {a: b for pair in KINDS.values() for a, b in (pair, pair[::-1])}
"""What else can be chosen where a first choice does not follow a cut."""


def check_choices(given: Mapping[str, str], made: Mapping[str, str]) -> None:
    """See that every choice that was given is one that the model leaves.

    Args:
        given: "module.path:kind" to a value, as the caller wrote it.
        made: the same for every choice that tracing met.

    Raises:
        OptionError: an unknown value, or a choice that was not met.
    """
    for key, value in given.items():
        kind = key.rpartition(":")[2] if isinstance(key, str) else ""
        if key in made and value not in KINDS[kind]:
            raise OptionError(
                f"choices[{key!r}] is {' or '.join(map(repr, KINDS[kind]))}; got {value!r}"
            )
        if key not in made:
            near = difflib.get_close_matches(str(key), list(made), n=3) or sorted(made)[:5]
            there = f"it leaves {len(made)}, such as {', '.join(map(repr, near))}"
            raise OptionError(
                f"choices names {key!r}, which this model does not leave to choose; "
                + (there if made else "it leaves nothing to choose")
            )
