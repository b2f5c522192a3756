"""The paper's strategy for ResNets (ThiNet, ICCV 2017, section 4.3): inside of the blocks only."""

from __future__ import annotations

from thinet.budget import units
from thinet.errors import LockedGroupError, RecipeError
from thinet.recipes.recipe import Recipe, Step, Tuning
from thinet.recipes.structure import Block, Network, residual_blocks

BLOCKS, INNER = 16, 2
BLOCK = Tuning(1, 1e-4)
LAST = Tuning(9, 1e-3, (3, 6))
SOURCE = "ThiNet, ICCV 2017, section 4.3"


def generic(net: Network, keep: float | None) -> Recipe:
    """`resnet`: in each block all convolutions but the last, `keep` of their channels (half).

    What the shortcut carries stays whole: the last convolutions, the projections, the stem.
    """
    blocks = residual_blocks(net)
    if not blocks:
        raise RecipeError(
            f"the recipe resnet needs blocks of convolutions with a shortcut around them; this "
            f"{net.kind} has none that can be cut inside"
        )
    return Recipe("resnet", _steps(blocks, 0.5 if keep is None else keep), SOURCE)


def resnet50(name: str, keep: float, net: Network) -> Recipe:
    """`resnet50-70`, `-50`, `-30`: the generic strategy on ResNet-50's bottlenecks alone."""
    blocks = residual_blocks(net)
    shapes = {len(block.inner) for block in blocks}
    if len(blocks) != BLOCKS or shapes != {INNER}:
        inner = " or ".join(map(str, sorted(shapes)))
        seen = f"{len(blocks)} blocks" + (f" of {inner} inner convolutions" if shapes else "")
        raise RecipeError(
            f"the recipe {name} needs {BLOCKS} residual blocks of {INNER} inner convolutions each, "
            f"as in ResNet-50; this {net.kind} has {seen}. The recipe resnet takes any"
        )
    return Recipe(name, _steps(blocks, keep), SOURCE)


def _steps(blocks: tuple[Block, ...], fraction: float) -> tuple[Step, ...]:
    """One step a block."""
    for group in (group for block in blocks for group in block.inner):
        if group.locked is not None:
            raise LockedGroupError(f"group {group.name!r} may not be cut: {group.locked}")
    return tuple(
        Step(
            block.name or block.inner[0].name,
            {group.name: units(group, fraction) for group in block.inner},
            LAST if block is blocks[-1] else BLOCK,
        )
        for block in blocks
    )
