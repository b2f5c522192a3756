"""The learning rate as a function of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math

from thinet.train.config import FinetuneConfig

RISE = 0.3
"""Share of a one-cycle run in which the rate goes up (Smith and Topin 2018, as in torch)."""

START, END = 1 / 25, 1e-4
"""Of a one-cycle run: first rate / peak, and last rate / first rate."""


def learning_rate(config: FinetuneConfig, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of step `step` (from 0) of a run of `epochs` epochs."""
    total = epochs * steps_per_epoch
    if config.schedule == "one-cycle":
        return config.lr * _one_cycle(step, total)
    warm = config.warmup_epochs * steps_per_epoch
    if step < warm:
        return config.lr * (step + 1) / (math.floor(warm) + 1)
    if config.schedule == "cosine":
        return config.lr * _cosine((step - warm) / max(1.0, total - warm))
    if config.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.lr * config.gamma**passed
    return config.lr


def _one_cycle(step: int, total: int) -> float:
    peak = RISE * total - 1
    if step <= peak:
        return 1 + (START - 1) * _cosine(step / max(1.0, peak))
    floor = START * END
    return floor + (1 - floor) * _cosine((step - peak) / max(1.0, total - 1 - peak))


def _cosine(share: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return (1 + math.cos(math.pi * min(1.0, share))) / 2
