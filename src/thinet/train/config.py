"""What a fine-tuning run does, as frozen data that is checked when made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from os import PathLike
from typing import Any, Literal, get_args

import torch

from thinet.errors import OptionError
from thinet.train.checks import out_of_range
from thinet.train.group_sparsity import GroupSparsity

Schedule = Literal["cosine", "step", "one-cycle", "constant"]
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Options of `finetune`. The defaults of SGD are the paper's (ThiNet, ICCV 2017, section 4).

    Attributes:
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        nesterov: Nesterov's momentum.
        schedule: `cosine` (to zero), `step` (times `gamma` at each milestone), `one-cycle` (up for
            30 % of the run, down to 1e-4 of the start), or `constant`.
        milestones: epochs after which `step` lowers the rate, increasing.
        gamma: factor of `step`.
        warmup_epochs: the rate first grows linearly over so many epochs (not for `one-cycle`).
        label_smoothing: share of the target that is spread over all classes.
        distill_weight: weight of the teacher's term, 1 minus it that of the labels. Of effect only
            where a teacher is given.
        temperature: of the distillation (Hinton et al. 2015).
        ema_decay: None, or the decay per step of an average of the weights, which is then what is
            validated and returned.
        clip_norm: None, or the largest norm of the gradient of all parameters.
        accumulate: batches whose gradients make one step.
        mixed_precision: `no`, `bf16` or `fp16` (with loss scaling).
        decay_norm_and_bias: whether weight decay also acts on normalisation weights and biases, as
            in the paper; False leaves out all parameters of fewer than two dimensions.
        group_sparsity: None, or how whole kernel taps are driven to zero and held there.
        seed: of everything random in the run.
        log_dir: None, or a folder for TensorBoard logs. Does not change the run.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    distill_weight: float = 0.5
    temperature: float = 2.0
    ema_decay: float | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    mixed_precision: Precision = "no"
    decay_norm_and_bias: bool = True
    group_sparsity: GroupSparsity | None = None
    seed: int = 0
    log_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.milestones, Iterable) and not isinstance(self.milestones, str):
            object.__setattr__(self, "milestones", tuple(self.milestones))
        faults = list(self._faults())
        if faults:
            raise OptionError("fine-tuning options: " + "; ".join(faults))

    def _faults(self) -> Iterator[str]:
        yield from out_of_range("lr", self.lr, above=0)
        if isinstance(self.lr, (int, float)) and torch.finfo(torch.float32).max < self.lr:
            yield f"lr must be a float32, got {self.lr!r}"
        yield from out_of_range("momentum", self.momentum, least=0, below=1)
        yield from out_of_range("weight_decay", self.weight_decay, least=0)
        yield from out_of_range("gamma", self.gamma, above=0, below=1)
        yield from out_of_range("warmup_epochs", self.warmup_epochs, least=0)
        yield from out_of_range("label_smoothing", self.label_smoothing, least=0, below=1)
        yield from out_of_range("distill_weight", self.distill_weight, least=0, most=1)
        yield from out_of_range("temperature", self.temperature, above=0)
        if self.ema_decay is not None:
            yield from out_of_range("ema_decay", self.ema_decay, above=0, below=1)
        if self.clip_norm is not None:
            yield from out_of_range("clip_norm", self.clip_norm, above=0)
        for name, least in (("accumulate", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{name} must be a whole number of at least {least}, got {value!r}"
        for name, known in (("schedule", Schedule), ("mixed_precision", Precision)):
            value = getattr(self, name)
            if value not in get_args(known):
                yield f"{name} must be one of {', '.join(get_args(known))}, got {value!r}"
        for name in ("nesterov", "decay_norm_and_bias"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} must be true or false, got {getattr(self, name)!r}"
        if not isinstance(self.log_dir, (str, PathLike, type(None))):
            yield f"log_dir must be a folder or None, got {self.log_dir!r}"
        if not _are_epochs(self.milestones):
            yield f"milestones must be increasing epochs from 1 on, got {self.milestones!r}"
            return
        if self.schedule == "step" and not self.milestones:
            yield "schedule step needs milestones, such as (4, 8)"
        if self.schedule != "step" and self.milestones:
            yield f"milestones belong to schedule step, not to {self.schedule}"
        if self.schedule == "one-cycle" and self.warmup_epochs:
            yield "one-cycle warms up by itself; leave warmup_epochs at 0"
        if not isinstance(self.group_sparsity, (GroupSparsity, type(None))):
            yield f"group_sparsity must be a GroupSparsity or None, got {self.group_sparsity!r}"
        if self.nesterov and self.momentum == 0:
            yield "nesterov needs a momentum above 0"

    def to_json(self) -> str:
        """All options as a JSON object."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> FinetuneConfig:
        """The options of `to_json`; left out ones have their defaults.

        Raises:
            OptionError: not a JSON object, an unknown option, or one out of its range.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise OptionError(f"fine-tuning options are not JSON: {error}") from error
        if not isinstance(values, dict):
            raise OptionError(f"fine-tuning options must be a JSON object, got {text[:60]!r}")
        _check_names(values, cls)
        inner = values.get("group_sparsity")
        if isinstance(inner, dict):
            _check_names(inner, GroupSparsity)
            if "strength" not in inner:
                raise OptionError("group sparsity: strength must be given")
            values["group_sparsity"] = GroupSparsity(**inner)
        return cls(**values)


def _are_epochs(given: Any) -> bool:
    whole = isinstance(given, tuple) and all(type(m) is int and m > 0 for m in given)
    return whole and all(a < b for a, b in pairwise(given))


def _check_names(values: dict[str, Any], kind: Any) -> None:
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise OptionError(
            f"unknown fine-tuning options: {', '.join(unknown)}; known are {', '.join(known)}"
        )
