"""One row an operation: how its labels meet. To add one, see docs/adding-an-op.md."""

from collections.abc import Callable

from thinet.trace.labels import Labeller
from thinet.trace.program import Op
from thinet.trace.rules import (
    attention,
    contract,
    indexing,
    join,
    norm,
    patches,
    pointwise,
    reduce,
    reshape,
)
from thinet.trace.rules import windows as windows_

Rule = Callable[[Labeller, Op], None]

RULES: dict[str, Rule] = {
    **contract.RULES,
    **norm.RULES,
    **pointwise.RULES,
    **reduce.RULES,
    **windows_.RULES,
    **patches.RULES,
    **join.RULES,
    **indexing.RULES,
    **reshape.RULES,
    **attention.RULES,
}
"""Operation name (`aten.convolution`) to its rule. An operation that is not here is refused."""


def add_rule(name: str, rule: Rule) -> None:
    """Teach thinet an operation of your own, such as `mylib.fancy_relu`."""
    RULES[name] = rule
