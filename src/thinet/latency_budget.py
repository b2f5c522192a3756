"""Budgets of measured time: the widths at which a forward pass takes the wanted share of its time.

Multiply-adds and milliseconds shrink together but not alike, so widths are shared out under budgets
of multiply-adds, the cut network is timed beside the dense one, and the budget is moved until the
measured share is the wanted one. What is reached is what the clock says, on this machine, with the
example inputs' batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from thinet.budget import WITHIN, Budget
from thinet.errors import BudgetError
from thinet.timing import latencies
from thinet.types import ExampleInputs

TRIES = 10
"""Networks that are timed at most."""

SECONDS = 0.6
"""Of timed runs for each of the two networks at a try."""


def time_share(model: nn.Module, small: nn.Module, inputs: ExampleInputs) -> float:
    """Milliseconds of the small network for each of the dense one, run in turn."""
    found = latencies({"dense": model, "small": small}, inputs, seconds=SECONDS)
    return found["small"].best_ms / found["dense"].best_ms


def latency_widths(
    budget: Budget,
    widths_at: Callable[[Budget], dict[str, int]],
    share_of: Callable[[Mapping[str, int]], float],
) -> dict[str, int]:
    """Widths whose measured share of the dense network's time is the budget's, by bisection.

    Args:
        budget: of latency.
        widths_at: what a budget of multiply-adds makes of the groups; a `BudgetError` where it
            cannot be met.
        share_of: the measured share at these widths.

    Of the networks that were timed the one that takes the longest within the budget, as few widths
    may lie between it and the next.

    Raises:
        BudgetError: even the narrowest widths take longer; says what they take.
    """
    low, high = 0.0, 1.0
    tried: list[tuple[float, dict[str, int]]] = []
    for _ in range(TRIES):
        middle = (low + high) / 2
        try:
            widths = widths_at(Budget(macs=middle))
        except BudgetError:  # narrower than widths may be
            low = middle
            continue
        share = share_of(widths)
        tried.append((share, widths))
        if abs(share - budget.fraction) <= WITHIN / 2:
            return widths
        low, high = (low, middle) if share > budget.fraction else (middle, high)
    for room in (WITHIN, budget.fraction * ROOM):
        within = [(share, widths) for share, widths in tried if share <= budget.fraction + room]
        if within:
            return max(within, key=lambda found: found[0])[1]
    taken = f"{min(tried, key=lambda found: found[0])[0]:.3f}" if tried else "more"
    raise BudgetError(
        f"latency={budget.fraction:g} cannot be met: the fastest that these groups can takes "
        f"{taken} of the dense network's time here; ask for that, or allow more groups"
    )


ROOM = 0.1
"""How much longer than asked, relatively, the clock may say before the budget counts as missed:
timings of one network differ by some per cent from run to run."""
