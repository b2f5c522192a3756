"""Learning rates against torch's own schedulers, and the options' checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from thinet.errors import OptionError
from thinet.train.config import FinetuneConfig
from thinet.train.schedule import learning_rate

STEPS, EPOCHS = 7, 6
TOTAL = STEPS * EPOCHS


def rates(**options: Any) -> list[float]:
    config = FinetuneConfig(lr=0.3, **options)
    return [learning_rate(config, step, STEPS, EPOCHS) for step in range(TOTAL)]


def torchs(make: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer)
    found = []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine() -> None:
    wanted = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL))
    assert rates(schedule="cosine") == pytest.approx(wanted)


def test_step() -> None:
    wanted = torchs(lambda o: lr_scheduler.MultiStepLR(o, [2 * STEPS, 4 * STEPS], gamma=0.2))
    assert rates(schedule="step", milestones=(2, 4), gamma=0.2) == pytest.approx(wanted)


def test_one_cycle() -> None:
    assert rates(schedule="one-cycle") == pytest.approx(torchs_one_cycle())


def torchs_one_cycle() -> list[float]:
    """With as many steps as the run: torch refuses the step after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=TOTAL, cycle_momentum=False)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(TOTAL - 1):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_constant_with_warmup_by_hand() -> None:
    found = rates(schedule="constant", warmup_epochs=4 / 7)
    assert found[:5] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3])
    assert set(found[4:]) == {0.3}


def test_cosine_after_warmup_ends_as_without() -> None:
    found = rates(schedule="cosine", warmup_epochs=1)
    assert found[STEPS] == pytest.approx(0.3)
    assert max(found) == pytest.approx(0.3)
    assert 0 < found[-1] < 0.001


@pytest.mark.parametrize("schedule", ["cosine", "step", "one-cycle", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_tiny_runs_have_usable_rates(schedule: Any, steps: int) -> None:
    config = FinetuneConfig(schedule=schedule, milestones=(1,) if schedule == "step" else ())
    found = [learning_rate(config, step, steps, 1) for step in range(steps)]
    assert all(0 < rate <= config.lr for rate in found)


def test_options_round_trip() -> None:
    config = FinetuneConfig(
        lr=0.02, nesterov=True, schedule="step", milestones=(4, 8), gamma=0.2, warmup_epochs=0.5,
        label_smoothing=0.1, distill_weight=0.7, temperature=4.0, ema_decay=0.99, clip_norm=1.0,
        accumulate=2, mixed_precision="bf16", decay_norm_and_bias=False, seed=3, log_dir="logs",
    )  # fmt: skip
    assert FinetuneConfig.from_json(config.to_json()) == config
    assert FinetuneConfig.from_json("{}") == FinetuneConfig()


def test_the_defaults_are_the_papers_sgd() -> None:
    config = FinetuneConfig()
    assert (config.momentum, config.weight_decay, config.decay_norm_and_bias) == (0.9, 5e-4, True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"lr": "0.1"}, "lr must be above 0, got '0.1'"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1"),
        ({"distill_weight": 2}, "distill_weight must be at least 0 and at most 1"),
        ({"ema_decay": 1.0}, "ema_decay must be above 0 and below 1"),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1, got 0"),
        ({"schedule": "linear"}, "schedule must be one of cosine, step, one-cycle, constant"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"schedule": "step"}, r"schedule step needs milestones, such as \(4, 8\)"),
        ({"milestones": (2,)}, "milestones belong to schedule step, not to cosine"),
        ({"schedule": "step", "milestones": (4, 4)}, "milestones must be increasing epochs"),
        ({"schedule": "one-cycle", "warmup_epochs": 1}, "one-cycle warms up by itself"),
        ({"nesterov": True, "momentum": 0}, "nesterov needs a momentum"),
    ],
)
def test_bad_options(options: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        FinetuneConfig(**options)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(OptionError, match=r"lr must .*; momentum must .*; seed must"):
        FinetuneConfig(lr=-1, momentum=2, seed=-1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "are not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"rate": 1}', "unknown fine-tuning options: rate; known are lr, momentum"),
    ],
)
def test_bad_json(text: str, wanted: str) -> None:
    with pytest.raises(OptionError, match=wanted):
        FinetuneConfig.from_json(text)
