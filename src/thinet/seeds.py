"""Randomness as a function of where a run is, so that there is no random state to store.

Everything random in training (the order of the data, augmentation, dropout) is drawn after seeding
with (seed, epoch, batch, process). A resumed run therefore draws what the uninterrupted one draws,
without carrying generator states about.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from thinet.observe import preserved_rng


def derive(*parts: int | str) -> int:
    """A seed in 0 .. 2^63 - 1 that depends on all parts and on their order; the same anywhere."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded from the parts."""
    return torch.Generator().manual_seed(derive(*parts))


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Inside, the global generators of torch, Python and NumPy start from a seed of the parts.

    After, all of them are as they were before.
    """
    seed = derive(*parts)
    with preserved_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
