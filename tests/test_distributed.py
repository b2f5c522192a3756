"""Two processes under `accelerate launch` are one run: same weights, one count, one writer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.two_processes import CONFIG, Branching, loader
from thinet.errors import OptionError
from thinet.train.evaluate import evaluate
from thinet.train.feed import Feed
from thinet.train.finetune import finetune

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"),
        *("--main_process_port", str(port), "-m", "tests.two_processes", str(folder)),
    ]
    root = Path(__file__).parents[1]
    # accelerate starts several processes under this name; without a visible GPU they use gloo
    path = os.pathsep.join([str(root / "src"), str(root)])
    done = subprocess.run(
        command,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,  # a process that is not told of the other's failure waits for a day
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_both_ran(answers: Answers) -> None:
    assert [answer["world"] for answer in answers] == [2, 2]


def test_gradients_are_those_of_one_process_that_accumulates(answers: Answers) -> None:
    assert answers[0]["weights"] == answers[1]["weights"]
    config = replace(CONFIG, accumulate=2)
    alone = finetune(Branching(False), loader(shuffle=True), epochs=2, config=config).model
    for name, tensor in alone.state_dict().items():
        found = torch.tensor(answers[0]["weights"][name], dtype=torch.float64)
        assert torch.allclose(found, tensor, rtol=1e-10, atol=1e-12), name
    untouched = Branching(False).unused.weight.tolist()
    assert answers[0]["weights"]["unused.weight"] == untouched


def test_the_model_statistics_and_history_are_the_same_in_both(answers: Answers) -> None:
    assert answers[0]["digest"] == answers[1]["digest"]
    figures = [[{**record, "seconds": 0} for record in answer["history"]] for answer in answers]
    assert figures[0] == figures[1]
    assert figures[0][0]["validation"]["images"] == 26


def test_only_the_main_process_writes_and_reports(answers: Answers) -> None:
    assert answers[0]["writers"] == [0, 0, 0]  # at the start and after each epoch
    assert answers[1]["writers"] == []
    assert [answer["told"] for answer in answers] == [2, 0]


def test_whatever_fails_in_the_main_process_ends_both(answers: Answers) -> None:
    main = ["DataError", "OutOfMemoryError", "KeyboardInterrupt", "ZeroDivisionError"]
    assert [answer["failed"] for answer in answers] == [main, ["TrainingError"] * 4]


def test_each_image_is_counted_once(answers: Answers) -> None:
    alone = asdict(evaluate(Branching(False), loader()))
    for answer in answers:
        assert answer["evaluation"]["images"] == 26
        assert answer["evaluation"] == pytest.approx(alone)


def test_a_device_against_the_launch_is_refused(answers: Answers) -> None:
    assert "accelerate started 2 processes on cpu; leave device out" in answers[0]["refused"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_are_shared_out_without_loss(world: int) -> None:
    data = loader(shuffle=True)
    feeds = [Feed(data, seed=1, rank=rank, world=world) for rank in range(world)]
    found = {n: labels.tolist() for feed in feeds for n, _, labels in feed.epoch(4)}
    whole = {n: labels.tolist() for n, _, labels in Feed(data, seed=1, rank=0, world=1).epoch(4)}
    assert found == whole
    assert sorted(found) == list(range(7))


def test_data_that_is_already_divided_is_refused() -> None:
    sampler = torch.utils.data.DistributedSampler([0, 1], num_replicas=2, rank=0)
    with pytest.raises(OptionError, match=r"already divides its data .*DistributedSampler"):
        Feed(loader(sampler=sampler), seed=0, rank=0, world=2)
