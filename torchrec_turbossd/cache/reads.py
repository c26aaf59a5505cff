"""How often slots were read, in arrays: for some hundred slots they take half the time that tensors do."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from torchrec_turbossd.cache.eviction import Evictable


class Reads:
    """A byte a slot: how many batches read it since its count was last set, up to `most`.

    Slots are [N] int64, distinct but for `add`. The counts of slots that hold no row mean nothing.
    """

    def __init__(self, slots: int, most: int) -> None:
        self._counts = np.zeros(slots + 1, dtype=np.uint8)
        self._most = most

    @property
    def nbytes(self) -> int:
        return self._counts.nbytes

    def add(self, slots: NDArray[np.int64]) -> None:
        """A batch read `slots`, which may repeat."""
        self._counts[slots] = np.minimum(self._counts[slots] + 1, self._most)

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Forget the reads of `slots`."""
        self._counts[slots] = 0

    def less(self, slots: NDArray[np.int64]) -> None:
        """Forget one read of each of `slots`, which have some."""
        self._counts[slots] -= 1

    def move(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        """Let slots `new` have the reads of `old`."""
        self._counts[new] = self._counts[old]

    def judge(self, slots: NDArray[np.int64], evictable: Evictable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which of `slots` are evictable and unread, and which are so and were read: [N] bool each."""
        free: NDArray[np.bool_] = evictable(torch.from_numpy(slots)).numpy()
        read = self._counts[slots] > 0
        return free & ~read, free & read

    def of(self, slots: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Reads of `slots`: [N]."""
        return self._counts[slots]


__all__ = ["Reads"]
