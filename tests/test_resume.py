"""A run that was stopped, in whatever way, ends with the weights of the run that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.interrupted_runs import CONFIG, digest, dropping_net, noisy_data, trained
from thinet.data import loader
from thinet.errors import CheckpointError
from thinet.train import state
from thinet.train.finetune import finetune
from thinet.train.identity import fingerprint


class Stopped(Exception):
    pass


def stop_after(steps: int) -> Callable[..., None]:
    """A progress callback that raises after so many steps of this call."""
    taken = 0

    def progress(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == steps:
            raise Stopped

    return progress


def stopped_and_resumed(folder: Path, stops: list[int], **options: Any) -> str:
    for steps in stops:
        with pytest.raises(Stopped):
            finetune(dropping_net(), checkpoint=folder, progress=stop_after(steps), **options)
    return digest(finetune(dropping_net(), checkpoint=folder, **options))


def test_killed_at_random_moments() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.interrupted_runs", "0", "3"]
    root = Path(__file__).parents[1]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    told = json.loads(out)
    assert [weights for weights, _ in told["rounds"]] == [told["whole"]] * 3
    assert sum(kills for _, kills in told["rounds"]) >= 3


@pytest.mark.parametrize("stops", [[1], [2, 1, 3], [5], [6, 6], [11, 1]])
def test_stopped_within_epochs_and_at_their_ends(tmp_path: Path, stops: list[int]) -> None:
    options: dict[str, Any] = {"epochs": 3, "config": CONFIG, "save_every": 2}
    whole = digest(finetune(dropping_net(), noisy_data(), **options))
    assert stopped_and_resumed(tmp_path, stops, data=noisy_data(), **options) == whole


class OnePass:
    """An iterable without a length or an index that draws while it is gone through."""

    def __iter__(self) -> Any:
        for _ in range(7):
            yield torch.randn(4, 2, 6, 6), torch.randint(3, (4,))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for k in range(12):
        path = tmp_path / "images" / "xyz"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["kept", "decoded", "workers", "one pass"])
def test_any_data_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, images: Path, kind: str
) -> None:
    def data() -> Any:
        if kind == "workers":
            return noisy_data(workers=1)
        if kind == "one pass":
            return OnePass()
        return loader(images, size=6, train=True, batch_size=2, preload=kind == "kept", workers=2)

    def model() -> nn.Module:
        net = dropping_net()
        return nn.Sequential(nn.Conv2d(3, 2, 1), net) if kind in ("kept", "decoded") else net

    torch.manual_seed(0)
    first = model()
    options: dict[str, Any] = {"epochs": 2, "config": replace(CONFIG, accumulate=1)}
    whole = digest(finetune(first, data(), **options))
    for steps in (3, 2):
        with pytest.raises(Stopped):
            finetune(
                first, data(), checkpoint=tmp_path / "run", save_every=1,
                progress=stop_after(steps), **options,
            )  # fmt: skip
    resumed = finetune(first, data(), checkpoint=tmp_path / "run", save_every=1, **options)
    assert digest(resumed) == whole


def test_with_an_optimizer_and_a_teacher_and_scaling(tmp_path: Path) -> None:
    config = replace(CONFIG, mixed_precision="fp16", ema_decay=None)

    def run(folder: Path | None, **more: Any) -> str:
        model, teacher = dropping_net(), dropping_net()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
        return digest(
            finetune(
                model, noisy_data(), epochs=2, config=config, teacher=teacher, save_every=1,
                optimizer=optimizer, checkpoint=folder, **more,
            )
        )  # fmt: skip

    whole = run(None)
    with pytest.raises(Stopped):
        run(tmp_path / "run", progress=stop_after(4))
    assert run(tmp_path / "run") == whole


def test_ctrl_c_saves_the_step_it_came_in(tmp_path: Path) -> None:
    taken = 0

    def progress(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    options: dict[str, Any] = {"epochs": 3, "config": CONFIG}
    with pytest.raises(KeyboardInterrupt):
        finetune(dropping_net(), noisy_data(), checkpoint=tmp_path, progress=progress, **options)
    assert signal.getsignal(signal.SIGINT) is before
    _, facts = state.read(tmp_path) or ({}, {})
    assert (facts["epoch"], facts["step"]) == (0, 6)  # 6 steps an epoch, 5 were done
    whole = digest(finetune(dropping_net(), noisy_data(), **options))
    assert stopped_and_resumed(tmp_path, [], data=noisy_data(), **options) == whole


def test_a_handler_that_python_did_not_set_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a handler, as of a program that holds Python within it, Python knows None."""
    given: list[Any] = []
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda _, handler: given.append(handler))
    trained(tmp_path)
    assert given == []


def test_a_finished_run_is_returned_at_once(tmp_path: Path) -> None:
    first = trained(tmp_path)
    again = trained(tmp_path, pause=3600.0)  # it would not return if it took a step
    assert digest(again) == digest(first)
    assert again.history == first.history


def test_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    trained(tmp_path)
    before = (tmp_path / state.NAME).read_bytes()
    changed = dropping_net()
    changed[0].bias.data.add_(1)
    cases: list[tuple[nn.Module, Any, dict[str, Any], str]] = [
        (dropping_net(), noisy_data(), {"config": replace(CONFIG, lr=0.1)}, "lr was 0.05 and is n"),
        (dropping_net(), noisy_data(), {"epochs": 4}, "epochs was 3 and is now 4"),
        (dropping_net(), [(torch.zeros(4, 2, 6, 6), torch.zeros(4).long())], {}, "batches was 12"),
        (changed, noisy_data(), {}, "model was '"),
        (dropping_net(), noisy_data(), {"teacher": changed}, "teacher was None"),
    ]
    for model, data, options, text in cases:
        given = {"epochs": 3, "config": CONFIG, **options}
        with pytest.raises(CheckpointError, match=f"started differently: .*{text}"):
            finetune(model, data, checkpoint=tmp_path, **given)
    assert (tmp_path / state.NAME).read_bytes() == before
    started_over = finetune(changed, noisy_data(), epochs=1, checkpoint=tmp_path, resume=False)
    assert len(started_over.history) == 1


def test_where_logs_go_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    monkeypatch.setattr("thinet.train.run.Logs", lambda *_: __import__("contextlib").nullcontext())
    trained(tmp_path, config=replace(CONFIG, log_dir="elsewhere"))


def test_a_disk_that_fills_up_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real, writes = digest(trained(None)), state.save_file, 0

    def fills_up(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == 4:
            path.write_bytes(b"half a file")
            raise OSError("No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(state, "save_file", fills_up)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*: No space left on device"):
        trained(tmp_path)
    assert digest(trained(tmp_path)) == whole


def test_files_that_are_no_training_state(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        trained(tmp_path / "file")
    (tmp_path / state.NAME).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"cannot be read .*delete it, or start over"):
        trained(tmp_path)
    state.save_file({"a": torch.ones(1)}, tmp_path / state.NAME)
    with pytest.raises(CheckpointError, match="is not a training state of this version"):
        trained(tmp_path)
    assert digest(trained(tmp_path, resume=False)) == digest(trained(None))


def test_fingerprints_see_values_shapes_names_and_freezing() -> None:
    base = dropping_net()
    prints = {fingerprint(base)}
    changes: list[Callable[[nn.Module], object]] = [
        lambda m: m[0].bias.data.add_(1e-6),
        lambda m: m[0].bias.requires_grad_(False),
        lambda m: m.append(nn.BatchNorm1d(3)),
        lambda m: m.double(),
    ]
    for change in changes:
        model = dropping_net()
        change(model)
        prints.add(fingerprint(model))
    assert len(prints) == 5
    assert fingerprint(dropping_net()) == fingerprint(base)


class Remembering(nn.Module):
    """A network with a running number that its state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dropping_net()
        self.register_buffer("centre", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x)
        if self.training:
            self.centre.mul_(0.9).add_(y.detach().mean(), alpha=0.1)
        return y * (1 + self.centre)


def test_buffers_that_a_state_dict_leaves_out_go_on_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = Remembering()
    options: dict[str, Any] = {"epochs": 2, "config": CONFIG}
    whole = finetune(first, noisy_data(), **options).model
    for steps in (3, 2):
        with pytest.raises(Stopped):
            finetune(
                first, noisy_data(), checkpoint=tmp_path, save_every=1,
                progress=stop_after(steps), **options,
            )  # fmt: skip
    resumed = finetune(first, noisy_data(), checkpoint=tmp_path, save_every=1, **options).model
    assert fingerprint(resumed) == fingerprint(whole)
    assert torch.equal(resumed.centre, whole.centre) and bool(whole.centre)
    first.centre.fill_(1)
    with pytest.raises(CheckpointError, match="model was '"):
        finetune(first, noisy_data(), checkpoint=tmp_path, **options)


def test_a_loader_without_batches_is_shuffled_by_the_seed_whatever_its_generator(
    tmp_path: Path,
) -> None:
    pairs = noisy_data()
    images = torch.stack([x for x, _ in pairs][:6])
    labels = torch.stack([y for _, y in pairs][:6])
    own = torch.Generator().manual_seed(4)
    data = DataLoader(TensorDataset(images, labels), batch_size=None, shuffle=True, generator=own)
    options: dict[str, Any] = {"epochs": 2, "config": replace(CONFIG, accumulate=1)}
    state_before = own.get_state()
    whole = digest(finetune(dropping_net(), data, **options))
    assert torch.equal(own.get_state(), state_before)
    own.manual_seed(5)  # another process begins with another state
    assert stopped_and_resumed(tmp_path, [4, 3], data=data, save_every=1, **options) == whole


def test_data_validation_and_optimizers_that_changed_are_refused(tmp_path: Path) -> None:
    pairs = list(noisy_data())
    later = [pairs[0], *((x + 1, y) for x, y in pairs[1:])]

    def run(name: str, data: Any = pairs, validation: Any = pairs, **sgd: float) -> None:
        model = dropping_net()
        optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **sgd})
        finetune(
            model, data, epochs=1, config=CONFIG, checkpoint=tmp_path / name,
            validation=validation, optimizer=optimizer,
        )  # fmt: skip

    run("list")
    run("list", lr=0.5)  # the schedule sets it
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": later}, "data all batches was"),
        ({"validation": later}, "validation data all batches was"),
        ({"momentum": 0.5}, "optimizer group 0 momentum was 0.9 and is now 0.5"),
        ({"weight_decay": 0.5}, "optimizer group 0 weight_decay was 0 and is now 0.5"),
    ]
    for options, text in cases:
        with pytest.raises(CheckpointError, match=f"started differently: {text}"):
            run("list", **options)

    def loaded(last: float) -> Any:
        images = torch.cat([x for x, _ in pairs])
        images[-1] += last
        return DataLoader(TensorDataset(images, torch.cat([y for _, y in pairs])), batch_size=4)

    run("loader", loaded(0.0))
    with pytest.raises(CheckpointError, match="differently: data first and last batch was"):
        run("loader", loaded(1.0))


class Counting(nn.Linear):
    """A layer that keeps more than tensors."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_a_state_that_is_no_tensor_is_refused_before_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), Counting(72, 3))
    with pytest.raises(CheckpointError, match=r"^1 \(Counting\) keeps a state that is no tensor"):
        finetune(model, noisy_data(), epochs=1, checkpoint=tmp_path / "run")
