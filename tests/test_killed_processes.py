"""Two processes that are killed at random moments, and that cut and train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

Told = dict[str, Any]


@pytest.fixture(scope="module")
def told() -> Told:
    command = [sys.executable, "-W", "error", "-m", "tests.killed_processes", "0", "2"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["tuned", "iterated"])
def test_killed_at_random_moments_both_end_as_if_never_killed(told: Told, kind: str) -> None:
    first, second = told[kind]["whole"]
    assert first == second
    assert [answers for answers, _ in told[kind]["rounds"]] == [[first, first]] * 2
    assert all(kills >= 1 for _, kills in told[kind]["rounds"])


def test_two_processes_choose_and_train_as_one_that_accumulates(told: Told) -> None:
    alone = told["alone"]
    assert {name: len(units) for name, units in alone["keep"].items()} == {"one": 5, "two": 4}
    for answer in told["once"]:
        assert answer["keep"] == alone["keep"]
        assert answer["top1"] == alone["top1"]
        assert answer["weights"].keys() == alone["weights"].keys()
        for name, weights in answer["weights"].items():
            expected = torch.tensor(alone["weights"][name], dtype=torch.float64)
            found = torch.tensor(weights, dtype=torch.float64)
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), name


def test_only_the_main_process_writes_and_reports(told: Told) -> None:
    assert [answer["rank"] for answer in told["once"]] == [0, 1]
    assert [answer["writers"] for answer in told["once"]] == [4, 0]  # cut, trained, twice
    assert [answer["told"] for answer in told["once"]] == [["one", "two"], []]
    first, second = told["once"]
    assert first["seconds"] == second["seconds"]
    assert first["weights"] == second["weights"]


def test_what_differs_between_processes_is_refused_in_all(told: Told) -> None:
    for answer in told["once"]:
        assert answer["refused"][0].startswith(
            "OptionError: the 2 processes were not given the same: model. Seed what is random"
        )
    (_, main), (_, other) = (answer["refused"] for answer in told["once"])
    assert main.startswith("OptionError: unknown criterion 'l3'")
    assert other == "TrainingError: the main process failed; its own message says why"
