"""Two processes never work in one folder, and a lock never outlives its process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thinet.errors import CheckpointError
from thinet.train.lock import NAME, locked

if sys.platform == "win32":
    pytest.skip("Windows has no such locks", allow_module_level=True)

import fcntl


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    command = [sys.executable, "-W", "error", "-m", "tests.overlapping_runs"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["tuned", "iterated", "compared"])
def test_a_second_process_is_refused_until_the_first_is_killed(
    told: dict[str, Any], kind: str
) -> None:
    found = told[kind]
    assert found["said"] == (
        f"another process works in {found['folder']}; wait for it, or give another folder"
    )
    assert found["untouched"]
    assert found["came out"] == found["whole"]
    assert found["left"] == []


def held_elsewhere(folder: Path) -> bool:
    """Whether another process is refused the folder."""
    child = os.fork()
    if child == 0:
        try:
            with locked(folder):
                os._exit(0)
        except CheckpointError:
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0


def test_it_is_held_within_the_block_only_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder):
        assert held_elsewhere(folder)
        assert (folder / NAME).exists()
    assert not list(folder.iterdir())
    assert not held_elsewhere(folder)


def test_one_that_waited_for_a_file_that_is_gone_takes_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder removes its file between the other's opening and locking it."""
    real, calls = fcntl.lockf, 0

    def late(handle: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            (tmp_path / NAME).unlink()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "lockf", late)
    with locked(tmp_path):
        assert calls == 2
        assert held_elsewhere(tmp_path)


def test_a_folder_that_was_removed_and_made_again_keeps_its_new_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / NAME).unlink()
        (tmp_path / NAME).touch()
    assert (tmp_path / NAME).exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_locks_it_goes_on(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", none)
    with locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_where_no_file_can_be_made_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file"):
        pass
    with locked(tmp_path / "file" / "folder"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
