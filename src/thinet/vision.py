"""Import torchvision, also where its compiled operators do not fit the installed torch.

A torchvision wheel built for another torch cannot load its C++ library; its Python code then stops
at two operators that it describes without having them. Models and transforms need neither, so the
two names are declared (no implementation: calling them still fails) and the import is tried again.
"""

from __future__ import annotations

from types import ModuleType

import torch

from thinet.errors import MissingExtraError

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")

_declared: list[torch.library.Library] = []  # a Library takes its operators with it when it dies


def torchvision() -> ModuleType:
    """The torchvision package.

    Raises:
        MissingExtraError: torchvision is not installed, or cannot be imported.
    """
    try:
        return _import()
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"torchvision is needed here and is not installed ({error}): pip install thinet[vision]"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise _broken(error) from error
    _declare_operators()
    try:
        return _import()
    except (RuntimeError, ImportError) as error:
        raise _broken(error) from error


def _import() -> ModuleType:
    import torchvision as package
    import torchvision.models  # pyright: ignore[reportUnusedImport]

    return package


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _declared.append(library)


def _broken(error: Exception) -> MissingExtraError:
    return MissingExtraError(
        f"torchvision is installed but cannot be imported with torch {torch.__version__}: {error}. "
        "Install the pair of versions that belong together (constraints.txt names one)"
    )
