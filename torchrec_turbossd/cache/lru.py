"""LRU eviction: the slots whose last read is oldest go first.

Exact up to the order within one batch, at eight bytes a slot and a partial sort of all slots at each eviction; use it
as the reference for other policies, or where tables are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable, EvictionPolicy

_NEVER = torch.iinfo(torch.int64).max


class Lru(EvictionPolicy):
    """A stamp for each slot; a batch of reads shares one stamp."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self._stamps = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._now = 0

    def touch(self, slots: Tensor) -> None:
        self._now += 1
        self._stamps.index_fill_(0, slots, self._now)

    def admitted(self, slots: Tensor) -> None:
        self.touch(slots)

    def victims(self, count: int, evictable: Evictable) -> Tensor:
        slots = torch.arange(1, self.slots + 1, device=self.device)
        stamps = torch.where(evictable(slots), self._stamps[1:], _NEVER)
        oldest = torch.topk(stamps, min(count, self.slots), largest=False, sorted=True)
        return slots[oldest.indices[oldest.values != _NEVER]]


__all__ = ["Lru"]
