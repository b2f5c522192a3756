"""Tensors that are put aside under a bound on memory; what does not fit waits in a file.

The file has no name (on Linux and macOS it is deleted as soon as it is opened), so nothing is left
behind after an error, an interrupt, or a killed process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor

from thinet.errors import CalibrationError, OptionError

GIB = 2**30
DEFAULT = 2.0  # GiB
_OWN, _LARGE = 2**17, 2**25  # bytes between which tensors that wait long get memory of their own
_MAPS = 2**14  # of such at most; a process may hold some 65,000
_HELD = 0.7  # of the room that the work leaves: allocators do not give all back


class Store:
    """Keeps tensors in memory up to a limit and the others in one temporary file.

    Args:
        gib: what may be used in all, working memory included; None for 2 GiB, or as much more as
            the work cannot do without.

    Raises:
        OptionError: the bound is not a positive number.
    """

    def __init__(self, gib: float | None = None) -> None:
        number = isinstance(gib, (int, float)) and not isinstance(gib, bool)
        if gib is not None and not (number and 0 < gib < float("inf")):
            raise OptionError(f"memory is a number of GiB above 0, or None; got {gib!r}")
        self.asked = gib
        self.bound = None if gib is None else int(gib * GIB)
        self.limit = int((DEFAULT if gib is None else gib) * GIB)
        self.held = 0
        self.spilled = 0  # bytes ever written, for those who look
        self._inside: WeakSet[Kept] = WeakSet()
        self._puts = 0
        self._file: Any = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    @property
    def own(self) -> int:
        """Bytes from which tensors that wait long get memory of their own."""
        return max(_OWN, self.limit // _MAPS)

    def set_aside(self, needed: int, why: str) -> None:
        """Leave this many bytes to the work itself.

        Raises:
            OptionError: a bound was given, and is less than that.
        """
        if self.bound is not None and needed > self.bound:
            raise OptionError(
                f"memory={self.asked:.3g} GiB is too little; at least "
                f"{needed / GIB:.3g} GiB are needed: {why}"
            )
        bound = max(int(DEFAULT * GIB), needed) if self.bound is None else self.bound
        self.limit = int(_HELD * (bound - needed))
        self._shrink()

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Leave so much more to the work for a while."""
        self.limit -= size
        try:
            self._shrink()
            yield
        finally:
            self.limit += size

    def put(self, tensor: Tensor, *, soon: bool = False) -> Kept:
        """Keep a tensor, which nobody may write into from now on.

        Args:
            soon: it is read before all that was put without this, which makes room for it.
        """
        if soon:
            self._shrink(tensor.numel() * tensor.element_size(), soon=False)
        self._puts += 1
        return Kept(self, tensor, (not soon, self._puts))

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()

    def _shrink(self, room: int = 0, *, soon: bool = True) -> None:
        """Spill until there is room, what is read last first; what is read soon only on request."""
        if self.held + room <= self.limit:
            return
        inside = [kept for kept in self._inside if soon or kept.turn[0]]
        if not soon and self.held + room - sum(kept.size for kept in inside) > self.limit:
            return  # it would not fit even then
        for kept in sorted(inside, key=lambda k: k.turn, reverse=True):
            kept.spill()
            if self.held + room <= self.limit:
                return

    def _write(self, tensor: Tensor, size: int) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="thinet-", buffering=0)  # noqa: SIM115
        places = self._free.get(size, [])
        place = places[-1] if places else self._end
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        try:
            self._file.seek(place)
            left = _bytes(flat)
            while len(left):
                left = left[self._file.write(left) :]
        except OSError as error:
            raise CalibrationError(
                f"what does not fit into memory goes to a temporary file in {tempfile.gettempdir()}"
                f", which cannot grow to {(place + size) / GIB:.3g} GiB: {error}; name a folder "
                "with more room in TMPDIR, allow more memory, or calibrate with fewer images"
            ) from error
        if places:
            places.pop()  # taken only now that it is written
        self._end = max(self._end, place + size)
        self.spilled += size
        return place

    def _read(self, place: int, into: Tensor) -> None:
        self._file.seek(place)
        left = _bytes(into.view(-1).view(torch.uint8))
        while len(left):
            count = self._file.readinto(left)
            if not count:
                raise CalibrationError("the temporary file of calibration was cut short")
            left = left[count:]

    def _forget(self, place: int, size: int) -> None:
        self._free.setdefault(size, []).append(place)


def _in_own_memory(tensor: Tensor) -> Tensor:
    """A copy in pages of its own, which go back to the system at once when it is let go.

    What was allocated among other things may stay with the process, in pieces that the larger
    tensors to come have no use for.
    """
    size = tensor.numel() * tensor.element_size()
    pages = torch.frombuffer(mmap(-1, size), dtype=torch.uint8)
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(cast("Any", tensor.numpy()))


class Kept:
    """A tensor in a store; its place is free again when nobody holds this any more.

    Args:
        turn: sorts what is read earlier before what is read later, as far as one can tell.
    """

    def __init__(self, store: Store, tensor: Tensor, turn: tuple[bool, int]) -> None:
        self._store, self.turn = store, turn
        self._place = -1
        self.size = tensor.numel() * tensor.element_size()
        self._form = (tuple(tensor.shape), tensor.dtype, tensor.device)
        self._tensor: Tensor | None = None
        if store.held + self.size > store.limit and self.size:
            self._place = store._write(tensor, self.size)
        else:
            self._tensor = tensor
            store.held += self.size
            store._inside.add(self)
            if store.own <= self.size < _LARGE and tensor.device.type == "cpu" and turn[0]:
                self._tensor = _in_own_memory(tensor)

    def get(self) -> Tensor:
        """The tensor; read anew each time where it is in the file."""
        if self._tensor is not None:
            return self._tensor
        shape, dtype, device = self._form
        found = torch.empty(shape, dtype=dtype)
        self._store._read(self._place, found)
        return found.to(device)

    def take(self) -> Tensor:
        """A copy that one may write into."""
        return self.get() if self._tensor is None else self._tensor.clone()

    def spill(self) -> None:
        """Move it from memory to the file."""
        if self._tensor is not None and self.size:
            self._place = self._store._write(self._tensor, self.size)
            self._tensor = None
            self._store.held -= self.size
            self._store._inside.discard(self)

    def __del__(self) -> None:
        if self._place >= 0:
            self._store._forget(self._place, self.size)
        elif getattr(self, "_tensor", None) is not None:
            self._store.held -= self.size


class Shelf:
    """A list of tensors, kept in a store where there is one."""

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._kept: list[Kept | Tensor] = []

    def append(self, tensor: Tensor) -> None:
        """Add a tensor, which nobody may write into from now on."""
        self._kept.append(tensor if self._store is None else self._store.put(tensor))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        return kept.get() if isinstance(kept, Kept) else kept

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __len__(self) -> int:
        return len(self._kept)
