"""Tensors put aside come back as they were, in memory up to the limit and else from the file."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thinet.errors import CalibrationError, OptionError
from thinet.store import GIB, Shelf, Store

KIB = 1024


def small(limit: int) -> Store:
    store = Store()
    store.limit = limit
    return store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def tensors() -> list[Tensor]:
    x = torch.randn(3, 4, 5)
    return [
        x, x.transpose(0, 2), x[:, 1:3], x.double(), x.bfloat16(), torch.arange(6), x > 0,
        torch.tensor(2.5), torch.empty(0, 3), x[:, None].expand(3, 2, 4, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [0, 300, GIB])
def test_what_is_kept_comes_back(limit: int, folder: Path) -> None:
    store = small(limit)
    given = tensors()
    kept = [store.put(t) for t in given]
    for before, after in zip(given, kept, strict=True):
        assert after.get().dtype == before.dtype
        assert torch.equal(after.get(), before) and torch.equal(after.get(), before)
    assert store.held <= limit
    assert (store.spilled > 0) == (limit < GIB)


def test_the_limit_decides_what_waits_in_the_file(folder: Path) -> None:
    store = small(2 * KIB)
    kept = [store.put(torch.full((256,), float(n))) for n in range(4)]  # 1 KiB each
    assert (store.held, store.spilled) == (2 * KIB, 2 * KIB)
    with store.reserved(KIB):
        assert (store.held, store.spilled) == (KIB, 3 * KIB)
    assert [float(k.get().mean()) for k in kept] == [0, 1, 2, 3]
    assert store.limit == 2 * KIB


def test_what_is_read_soon_takes_the_memory_of_what_is_read_last(folder: Path) -> None:
    store = small(3 * KIB)
    later = [store.put(torch.full((256,), float(n))) for n in range(3)]
    soon = [store.put(torch.full((256,), 5.0), soon=True) for _ in range(2)]
    assert (store.held, store.spilled) == (3 * KIB, 2 * KIB)  # the third and the second went
    first, *others = later
    assert first._place < 0 and [kept._place for kept in others] == [KIB, 0]
    third = store.put(torch.full((512,), 6.0), soon=True)  # no room, even without the first
    assert (store.held, store.spilled) == (3 * KIB, 4 * KIB)
    assert [float(k.get().mean()) for k in (*later, *soon, third)] == [0, 1, 2, 5, 5, 6]
    del soon
    store.put(torch.full((256,), 7.0))
    assert store.spilled == 4 * KIB


def test_places_are_used_again(folder: Path) -> None:
    store = small(0)
    for n in range(10):
        kept = store.put(torch.full((256,), float(n)))
        assert float(kept.get()[0]) == n
        del kept
        gc.collect()
    assert store.spilled == 10 * KIB
    assert os.fstat(store._file.fileno()).st_size == KIB
    del store
    store = small(KIB)
    for _ in range(10):
        kept = store.put(torch.zeros(256))
        assert store.held == KIB
        del kept
    assert store.held == store.spilled == 0


@pytest.mark.skipif(os.name != "posix", reason="the file has a name while it is open")
def test_the_file_has_no_name(folder: Path) -> None:
    store = small(0)
    kept = store.put(torch.ones(10))
    assert list(folder.iterdir()) == []
    assert torch.equal(kept.get(), torch.ones(10))


def test_a_file_that_cannot_grow_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(CalibrationError, match=r"cannot grow to .*No space left.*TMPDIR"):
        small(0).put(torch.ones(10))


def test_a_place_whose_write_failed_is_used_later(folder: Path) -> None:
    class Once:
        def __init__(self, file: Any) -> None:
            self.file, self.failed = file, False

        def write(self, data: Any) -> int:
            if not self.failed:
                self.failed = True
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    store = small(0)
    store.put(torch.ones(256))  # gone at once
    gc.collect()
    store._file = Once(store._file)
    with pytest.raises(CalibrationError, match="cannot grow"):
        store.put(torch.zeros(256))
    kept = store.put(torch.full((256,), 3.0))
    assert kept.get().unique().tolist() == [3]
    assert os.fstat(store._file.fileno()).st_size == KIB


def test_what_the_work_needs_is_set_aside(folder: Path) -> None:
    store = Store()
    store.set_aside(GIB, "a batch")
    assert store.limit == int(0.7 * GIB)  # allocators do not give all back
    store.set_aside(5 * GIB, "a batch")  # no bound was asked for: the work gets what it needs
    assert store.limit == 0
    store = Store(3)
    kept = store.put(torch.zeros(256))
    store.set_aside(3 * GIB, "a batch")
    assert store.limit == 0 and store.held == 0 and store.spilled == KIB
    assert torch.equal(kept.get(), torch.zeros(256))
    text = r"memory=3 GiB is too little; at least 3.5 GiB are needed: a batch of 9 images"
    with pytest.raises(OptionError, match=text):
        store.set_aside(7 * GIB // 2, "a batch of 9 images")


@pytest.mark.parametrize("gib", [0.1, 2, 64])
def test_tensors_with_memory_of_their_own_are_few(gib: float) -> None:
    store = Store(gib)
    assert store.own >= 2**17 and store.limit / store.own <= 2**14


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_a_bound_is_a_positive_number(bad: object) -> None:
    with pytest.raises(OptionError, match="memory is a number of GiB above 0, or None; got"):
        Store(bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("limit", [None, 0, 40])
def test_a_shelf_is_a_list(limit: int | None, folder: Path) -> None:
    shelf = Shelf(None if limit is None else small(limit))
    assert not shelf
    for n in range(3):
        shelf.append(torch.full((8,), float(n)))
    assert len(shelf) == 3 and torch.equal(shelf[2], torch.full((8,), 2.0))
    assert [float(t[0]) for t in shelf] == [0, 1, 2]
