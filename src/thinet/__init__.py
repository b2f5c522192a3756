"""Make trained PyTorch networks physically smaller.

Whole channels go, chosen by what the next layer loses (ThiNet, Luo, Wu, Lin, ICCV 2017); the next
layer is refitted by least squares; the result is an ordinary module of smaller layers. Every name
below is loaded on first use, so that `import thinet` costs next to nothing beyond `import torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinet import errors as errors
    from thinet.errors import ThinetError as ThinetError
    from thinet.types import ChannelGroup as ChannelGroup
    from thinet.types import Counts as Counts
    from thinet.types import Slice as Slice

__version__ = "0.1.0"

_HOMES = {
    "ChannelGroup": "thinet.types",
    "Counts": "thinet.types",
    "Slice": "thinet.types",
    "ThinetError": "thinet.errors",
    "errors": "thinet",
}
"""Where each public name is defined: the whole list of them."""


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'thinet' has no attribute {name!r}")
    if home == __name__:
        return import_module(f"thinet.{name}")
    found = getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
