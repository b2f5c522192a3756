"""Every error that thinet raises on purpose.

Each message says what was seen, where (the module path), and what to do about it.
"""


class ThinetError(Exception):
    """Base of all errors raised by thinet."""


class OptionError(ThinetError, ValueError):
    """An option, name or number that the caller gave is not usable."""


class IndicesError(OptionError):
    """Keep indices that are empty, repeated or out of range."""


class NothingLeftError(IndicesError):
    """Indices that leave nothing of a slice, or of a piece of a split."""


class UnknownGroupError(ThinetError, LookupError):
    """A group name that is not in the model."""


class LockedGroupError(ThinetError):
    """A cut was asked of a group that may not be cut."""


class UnsupportedOpError(ThinetError):
    """The model runs an operation for which there is no rule."""


class TraceError(ThinetError):
    """The model could not be run to be traced."""


class VerificationError(ThinetError):
    """A cut model does not compute what the silenced original computes."""


class CalibrationError(ThinetError):
    """The calibration data is empty, not finite, or does not fit the model."""


class CriterionError(OptionError, CalibrationError):
    """A criterion of the caller's own failed, or returned no order of the units."""


class RepairError(ThinetError):
    """A least-squares system cannot be solved."""


class BudgetError(OptionError):
    """A budget that cannot be met."""


class CheckpointError(ThinetError):
    """A file that cannot be written, read, or matched with the model."""


class DataError(ThinetError):
    """Images or labels that cannot be used."""


class ModelError(ThinetError):
    """A model name that cannot be resolved, or weights that do not fit it."""


class MissingExtraError(ThinetError, ImportError):
    """An optional package is needed for what was asked."""


class TrainingError(ThinetError):
    """Training that cannot go on, such as a loss that is no longer a number."""


class RecipeError(ThinetError):
    """A recipe that is not known, or that does not fit the model."""


class ExportError(ThinetError):
    """A model that cannot be exported, or a written file that does not compute what it does."""
