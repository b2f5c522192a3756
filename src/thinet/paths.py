"""The modules of a model by their dotted paths."""

from __future__ import annotations

from torch import nn


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`dict(model.named_modules())`, in one loop and not in a generator for each level.

    Where a model is traced many times, the generators take a good part of the time.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[path] = module
            if module._modules:  # of most there are none
                before = f"{path}." if path else ""
                waiting += [
                    (before + name, child)
                    for name, child in reversed(module._modules.items())
                    if child is not None
                ]
    return found
