"""Any accepted data as numbered batches: one process's share, from any batch of any epoch.

What a data set draws at random while a batch is fetched (augmentation in its `__getitem__`) is
seeded by (seed, epoch, batch), and a `DataLoader`'s order by (seed, epoch): a run that starts in
the middle of an epoch gets the batches that the whole run gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from thinet.errors import DataError, OptionError
from thinet.loading import Loader
from thinet.seeds import derive, seeded

Numbered = tuple[int, torch.Tensor, torch.Tensor]
"""Number of the batch in the epoch, images, labels."""


class Feed:
    """Batches `(images, labels)` of a `thinet.data` loader, a `DataLoader` or another iterable.

    Several processes take turns: batch b belongs to process b mod `world`.

    Attributes:
        batches: number of batches of an epoch, over all processes. Data without a length is
            counted by going through it once.

    Raises:
        DataError: there are no batches, or the data can be gone through only once.
        OptionError: the `DataLoader` already divides its data among processes.
    """

    def __init__(self, data: Any, *, seed: int, rank: int, world: int) -> None:
        self._data = data
        self._seed = seed
        self._rank = rank
        self._world = world
        if isinstance(data, torch.Tensor) or not isinstance(data, Iterable):
            raise DataError(
                f"data of type {type(data).__name__} cannot be trained or evaluated on; give a "
                "loader, a DataLoader or a list of (images, labels)"
            )
        if isinstance(data, Iterator):
            raise DataError(
                "this iterator can be gone through only once; give a DataLoader or list"
            )
        if world > 1:
            _refuse_divided(data)
        self.batches = _count(data)
        if self.batches == 0:
            raise DataError("the data has no batches")

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Numbered]:
        """This process's batches of an epoch, from batch number `start` on."""
        mine = [b for b in range(start, self.batches) if b % self._world == self._rank]
        for number, batch in zip(mine, self._fetched(epoch, mine)):
            yield number, *_pair(batch, number)

    def describe(self) -> dict[str, Any]:
        """What the data is, to compare with that of a run which is to go on."""
        if isinstance(self._data, Loader):
            return self._data.describe()
        looked_at, name = [0], "first batch"  # the last would take all before it
        if isinstance(self._data, (list, tuple)):
            looked_at, name = list(range(self.batches)), "all batches"
        elif isinstance(self._data, DataLoader) and _has_batches(self._data):
            looked_at, name = sorted({0, self.batches - 1}), "first and last batch"
        digest = hashlib.blake2b(digest_size=16)
        for number, batch in zip(looked_at, self._fetched(0, looked_at), strict=True):
            for tensor in _pair(batch, number):
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
        return {"batches": self.batches, name: digest.hexdigest()}

    def _fetched(self, epoch: int, numbers: list[int]) -> Iterator[Any]:
        if isinstance(self._data, Loader):
            return self._data.epoch(epoch, numbers)
        if isinstance(self._data, DataLoader) and _has_batches(self._data):
            return iter(self._indexed(self._data, epoch, numbers))
        return self._passed_through(epoch, numbers)

    def _indexed(self, data: DataLoader[Any], epoch: int, numbers: list[int]) -> Iterable[Any]:
        order = self._order(data, epoch)
        return DataLoader(
            _SeededBatches(data, self._seed, epoch),
            batch_size=None,
            sampler=[(number, order[number]) for number in numbers],
            collate_fn=_as_it_is,
            num_workers=data.num_workers,
            pin_memory=data.pin_memory,
            worker_init_fn=data.worker_init_fn,
            multiprocessing_context=data.multiprocessing_context if data.num_workers else None,
            timeout=data.timeout,
            prefetch_factor=data.prefetch_factor,
        )

    def _order(self, data: DataLoader[Any], epoch: int) -> list[Any]:
        """The indices of each batch."""
        with self._own_seeded(epoch), seeded("order", self._seed, epoch):
            return list(data.batch_sampler or ())

    @contextmanager
    def _own_seeded(self, epoch: int) -> Iterator[None]:
        """The loader's own generators seeded by the epoch, and put back after."""
        found = (
            getattr(self._data, "generator", None),
            getattr(getattr(self._data, "sampler", None), "generator", None),
        )
        own = {id(g): g for g in found if isinstance(g, torch.Generator)}
        states = [(g, g.get_state()) for g in own.values()]
        try:
            for g, _ in states:
                g.manual_seed(derive("order", self._seed, epoch))
            yield
        finally:
            for g, state in states:
                g.set_state(state)

    def _passed_through(self, epoch: int, numbers: list[int]) -> Iterator[Any]:
        wanted, last = set(numbers), max(numbers, default=-1)
        with self._own_seeded(epoch):  # a sampler draws when its first batch is asked for
            with seeded("order", self._seed, epoch):
                iterator = iter(self._data)
            for number in range(last + 1):
                with seeded("batch", self._seed, epoch, number):
                    batch = next(iterator, iterator)
                if batch is iterator:
                    raise DataError(f"the data ended after {number} batches; it had {self.batches}")
                if number in wanted:
                    yield batch


class _SeededBatches(Dataset[Any]):
    """A `DataLoader`'s data set, a whole batch at a time."""

    def __init__(self, data: DataLoader[Any], seed: int, epoch: int) -> None:
        self._dataset, self._collate = data.dataset, data.collate_fn
        self._seed, self._epoch = seed, epoch

    def __getitem__(self, wanted: tuple[int, Any]) -> Any:
        number, indices = wanted
        with seeded("batch", self._seed, self._epoch, number):
            several = getattr(self._dataset, "__getitems__", None)
            if several is not None:
                return self._collate(several(indices))
            return self._collate([self._dataset[index] for index in indices])


def _as_it_is(batch: Any) -> Any:
    return batch


def _has_batches(data: DataLoader[Any]) -> bool:
    return data.batch_sampler is not None and not isinstance(data.dataset, IterableDataset)


def _refuse_divided(data: Any) -> None:
    parts = (getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
    for part in parts:
        if type(part).__name__ in ("DistributedSampler", "BatchSamplerShard"):
            raise OptionError(
                f"the DataLoader already divides its data among processes ({type(part).__name__}); "
                "give the plain one, thinet divides the batches itself"
            )


def _count(data: Any) -> int:
    try:
        return len(data)
    except TypeError:
        return sum(1 for _ in data)


def _pair(batch: Any, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        images, labels = batch
        if isinstance(images, torch.Tensor) and isinstance(labels, torch.Tensor):
            return images, labels
        if isinstance(images, torch.Tensor) and labels is None:
            raise DataError(f"batch {number} of the data has no labels; give a folder with classes")
    inner = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, tuple) else ""
    raise DataError(
        f"batch {number} of the data is a {type(batch).__name__}{f' of {inner}' if inner else ''}; "
        "pairs of tensors (images, labels) are needed"
    )
