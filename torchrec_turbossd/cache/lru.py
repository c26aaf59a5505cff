"""LRU eviction: the slots whose last read is oldest go first.

Exact up to the order within one batch, at eight bytes a slot and a partial sort of all slots at each eviction; use it
as the reference for other policies, or where tables are small.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable, EvictionPolicy

_UNKNOWN = torch.iinfo(torch.int64).max
"""Later than every stamp."""
_SMALLEST_WINDOW = 256


class Lru(EvictionPolicy):
    """A stamp for each slot; a batch of reads shares one stamp."""

    bytes_per_slot: ClassVar[int] = 8

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._stamps = torch.full((slots + 1,), _UNKNOWN, dtype=torch.int64, device="cpu")
        self._now = 0

    @property
    def nbytes(self) -> int:
        return self._stamps.nbytes

    def touch(self, slots: Tensor) -> None:
        self._now += 1
        known = self._stamps.gather(0, slots) != _UNKNOWN
        self._stamps.scatter_(0, slots, torch.where(known, self._now, _UNKNOWN))

    def admitted(self, slots: Tensor, ids: Tensor) -> None:
        self._now += 1
        self._stamps.index_fill_(0, slots, self._now)

    def evicted(self, slots: Tensor, ids: Tensor) -> None:
        self.released(slots)

    def released(self, slots: Tensor) -> None:
        self._stamps.index_fill_(0, slots, _UNKNOWN)

    def moved(self, old: Tensor, new: Tensor) -> None:
        stamps = self._stamps.index_select(0, old)
        self._stamps.index_fill_(0, old, _UNKNOWN)
        self._stamps.index_copy_(0, new, stamps)

    def heat(self) -> Tensor:
        """The number of the last batch that read a slot."""
        return torch.where(self._stamps == _UNKNOWN, 0, self._stamps)

    def victims(self, count: int, evictable: Evictable) -> Tensor:
        window = max(2 * count, _SMALLEST_WINDOW)
        while True:
            oldest = torch.topk(self._stamps[1:], min(window, self.slots), largest=False, sorted=True)
            slots = oldest.indices + 1
            found = slots[evictable(slots) & (oldest.values != _UNKNOWN)]
            if found.numel() >= count or window >= self.slots:
                return found[:count]
            window *= 4


__all__ = ["Lru"]
