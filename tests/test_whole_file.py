"""Files that are written whole: their mode, what is left of a stop, and the order of the steps."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from thinet import checkpoint, journal
from thinet.cli.files import write_report
from thinet.export.check import kept_if_right
from thinet.journal import Journal
from thinet.plan import Plan
from thinet.report.data import Report
from thinet.steps import Position, Store
from thinet.train import state
from thinet.train.finetune import finetune
from thinet.whole_file import tidy, whole_file, write_json, write_text


def exported(path: Path) -> None:
    with kept_if_right(path) as unfinished:
        program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, unfinished)


WRITERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": lambda path: checkpoint.save(path, nn.Linear(2, 2), Plan()),
    state.NAME: lambda path: state.write(path.parent, {"a": torch.zeros(2)}, {}),
    "settings.json": lambda path: write_json(path, {"a": 1}),
    "report.html": lambda path: write_report(Report(title="A report", summary="short"), path),
    "model.pt2": exported,
}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such modes")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("umask", [0o077, 0o002], indirect=True)
def test_the_mode_is_that_of_any_new_file(name: str, umask: int, tmp_path: Path) -> None:
    for _ in ("new", "in place of the old"):
        WRITERS[name](tmp_path / name)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_stop_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def stopped() -> None:
        with whole_file(path) as unfinished:
            unfinished.write_text("ne")
            raise error

    with pytest.raises(error):
        stopped()
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write_text("first")
        with whole_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    path = tmp_path / "file"

    def noted(handle: int) -> None:
        seen.append((os.fstat(handle).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
    assert seen == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_folder_that_cannot_be_synchronised_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refusing)
    write_json(tmp_path / "file", [1])
    assert (tmp_path / "file").read_text() == "[\n 1\n]"


def killed_while_writing(path: Path) -> None:
    """Write half of a file and be killed."""
    child = os.fork()
    if child == 0:
        with whole_file(path) as unfinished:
            unfinished.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
def test_what_killed_processes_left_is_removed_where_a_run_goes_on(tmp_path: Path) -> None:
    names = ("a.json", "a.json", "b.json", "steps.json", "step-001-cut.safetensors",
             journal.SETTINGS, state.NAME)  # fmt: skip
    for name in names:
        killed_while_writing(tmp_path / name)
    (tmp_path / ".a.json.mine").touch()
    assert len(list(tmp_path.iterdir())) == len(names) + 1

    def left() -> set[str]:
        return {path.name.rpartition(".")[0] for path in tmp_path.iterdir() if path.is_dir()}

    tidy(tmp_path, "a.json")
    assert left() == {f".{name}" for name in names[2:]}
    Journal(tmp_path, {}).open(resume=True)
    assert left() == {f".{name}" for name in (*names[2:5], state.NAME)}
    Store(tmp_path, {}).put(Position(1), nn.Linear(2, 2), Plan())
    assert left() == {".b.json", f".{state.NAME}"}
    finetune(nn.Linear(2, 2), [(torch.zeros(2, 2), torch.zeros(2).long())], epochs=1,
             checkpoint=tmp_path)  # fmt: skip
    assert left() == {".b.json"}
    tidy(tmp_path / "no" / "such", "a")


def test_a_link_stays_one_and_a_device_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("1")
    link = tmp_path / "latest.json"
    link.symlink_to("real.json")
    write_json(link, {"a": 1})
    assert link.is_symlink() and (tmp_path / "real.json").read_text() == '{\n "a": 1\n}'
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is there and no regular file"):
        write_json(tmp_path / "pipe", {})
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert {p.name for p in tmp_path.iterdir()} == {"real.json", "latest.json", "pipe"}


def test_names_that_are_no_text_are_written_all_the_same(tmp_path: Path) -> None:
    write_text(tmp_path / "a.html", os.fsdecode(b"d\xe9t\xe9"))
    assert (tmp_path / "a.html").read_text() == "d\\udce9t\\udce9"
