"""Make trained PyTorch networks physically smaller.

Whole channels go, chosen by what the next layer loses (ThiNet, Luo, Wu, Lin, ICCV 2017); the next
layer is refitted by least squares; the result is an ordinary module of smaller layers. What needs
more than torch and numpy is loaded on first use, so that `import thinet` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Verbs that share their file's name are loaded here, so that the name is always the verb.
from thinet import errors as errors
from thinet.budget import Budget as Budget
from thinet.calibrate.batchnorm import recalibrate_bn as recalibrate_bn
from thinet.checkpoint import load as load
from thinet.checkpoint import load_plan as load_plan
from thinet.checkpoint import save as save
from thinet.compare import compare as compare
from thinet.count import count as count
from thinet.cut import cut as cut
from thinet.cut import plan_cut as plan_cut
from thinet.errors import BudgetError as BudgetError
from thinet.errors import CalibrationError as CalibrationError
from thinet.errors import CheckpointError as CheckpointError
from thinet.errors import DataError as DataError
from thinet.errors import ExportError as ExportError
from thinet.errors import IndicesError as IndicesError
from thinet.errors import LockedGroupError as LockedGroupError
from thinet.errors import MissingExtraError as MissingExtraError
from thinet.errors import ModelError as ModelError
from thinet.errors import NothingLeftError as NothingLeftError
from thinet.errors import OptionError as OptionError
from thinet.errors import RecipeError as RecipeError
from thinet.errors import RepairError as RepairError
from thinet.errors import ThinetError as ThinetError
from thinet.errors import TraceError as TraceError
from thinet.errors import TrainingError as TrainingError
from thinet.errors import UnknownGroupError as UnknownGroupError
from thinet.errors import UnsupportedOpError as UnsupportedOpError
from thinet.errors import VerificationError as VerificationError
from thinet.iterate import iterate as iterate
from thinet.plan import Plan as Plan
from thinet.prune import prune as prune
from thinet.recipes.apply import prune_by_recipe as prune_by_recipe
from thinet.repair import RepairSettings as RepairSettings
from thinet.thin import read_channels as read_channels
from thinet.thin import thin as thin
from thinet.timing import Latency as Latency
from thinet.timing import latencies as latencies
from thinet.timing import latency as latency
from thinet.trace.analyse import find_groups as find_groups
from thinet.types import ChannelGroup as ChannelGroup
from thinet.types import Counts as Counts
from thinet.types import Slice as Slice

if TYPE_CHECKING:
    from thinet import export as export
    from thinet.train.config import FinetuneConfig as FinetuneConfig
    from thinet.train.evaluate import evaluate as evaluate
    from thinet.train.finetune import finetune as finetune
    from thinet.train.group_sparsity import GroupSparsity as GroupSparsity

__version__ = "0.1.0"

_LAZY = {
    "FinetuneConfig": "thinet.train.config",
    "GroupSparsity": "thinet.train.group_sparsity",
    "evaluate": "thinet.train.evaluate",
    "export": "thinet.export",
    "finetune": "thinet.train.finetune",
}
"""Names that are loaded on first use, and where they are defined."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'thinet' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    found = getattr(module, name, module)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
