"""Where the logits are in what a model returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def find_logits(output: Any) -> torch.Tensor | None:
    """A tensor itself, the field `logits` of an output, or the first of a tuple; else None."""
    found = output
    if not isinstance(found, torch.Tensor):
        if isinstance(found, Mapping):
            found = found.get("logits")
        elif hasattr(found, "logits"):
            found = found.logits
        elif isinstance(found, (tuple, list)) and found:
            found = found[0]
    return found if isinstance(found, torch.Tensor) else None
