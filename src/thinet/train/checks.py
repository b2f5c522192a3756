"""Numbers of options, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def out_of_range(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Iterator[str]:
    """One line that names the option and its limits, if the value is no number within them."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number and math.isfinite(value)
    fits = fits and (least is None or value >= least) and (above is None or value > above)
    fits = fits and (below is None or value < below) and (most is None or value <= most)
    if not fits:
        limits = [("at least", least), ("above", above), ("below", below), ("at most", most)]
        words = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
        yield f"{name} must be {words}, got {value!r}"
