"""Timing: in turns, in evaluation mode, with honest summaries."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import thinet
from thinet.errors import OptionError
from thinet.report.rows import timed_where, timing_notes
from thinet.timing import Latency, latencies, latency


class SleepNet(nn.Module):
    """Takes as long as it is told, and writes down that it ran, and in which mode."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.name, self.seconds, self.log = name, seconds, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((self.name, self.training))
        time.sleep(self.seconds)
        return x


def test_models_take_turns_and_the_slow_one_is_slower() -> None:
    log: list[tuple[str, bool]] = []
    nets = {"slow": SleepNet("slow", 0.004, log), "fast": SleepNet("fast", 0.001, log)}
    timed = latencies(nets, torch.zeros(1), seconds=0.001)
    assert [name for name, _ in log] == ["slow"] * 3 + ["fast"] * 3 + ["slow", "fast"] * 10
    assert not any(training for _, training in log)
    assert all(net.training for net in nets.values())
    assert timed["slow"].median_ms > 4.0
    assert 1.0 < timed["fast"].median_ms < timed["slow"].median_ms
    for summary in timed.values():
        assert summary.runs == 10
        assert summary.best_ms <= summary.low_ms <= summary.median_ms <= summary.high_ms
        assert summary.device == "cpu"


def test_it_runs_as_long_as_asked() -> None:
    found = latency(SleepNet("net", 0.002, []), (torch.zeros(1),), seconds=0.1)
    assert 10 <= found.runs <= 50
    assert found.threads == torch.get_num_threads()


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(OptionError, match="must be above zero"):
        thinet.latency(nn.Identity(), torch.zeros(1), seconds=seconds)


class Disturbed(SleepNet):
    """Is held up in most of its runs, as on a machine with other work."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self.log) % 5:
            time.sleep(0.03)
        return super().forward(x)


def test_networks_are_compared_by_runs_that_nothing_disturbed() -> None:
    nets = {
        "dense": Disturbed("dense", 0.008, []),
        "small": SleepNet("small", 0.004, []),
    }
    timed = latencies(nets, torch.zeros(1), seconds=0.1)
    assert timed["dense"].median_ms / timed["small"].median_ms > 5
    assert 1.2 < timed["dense"].best_ms / timed["small"].best_ms < 3
    assert timed["dense"].scattered
    notes = timing_notes(timed)
    assert [note.split(":")[0] for note in notes] == ["dense", "small", "these timings scatter"]


def test_a_quiet_clock_has_no_warning() -> None:
    quiet = Latency(1.0, 1.2, 1.1, 1.6, runs=1, threads=1, device="cpu")
    assert not quiet.scattered
    told = "net: 1 ms at best, median 1.2, 1 run, most of them 1.1 to 1.6 ms"
    assert timing_notes({"net": quiet}) == (told,)
    assert timed_where(torch.zeros(2, 3)).startswith("batch 2, ")
