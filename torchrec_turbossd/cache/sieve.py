"""SIEVE eviction: a hand goes from the oldest row to the newest; rows read since it last passed stay where they are.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is Simpler than LRU", NSDI 2024. New rows come in ahead of
the hand, behind all others, so that of the rows never read again most go while the popular ones wait out of its way.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable, EvictionPolicy
from torchrec_turbossd.cache.reads import Reads
from torchrec_turbossd.cache.slot_queue import SlotQueue, Slots

_SMALLEST_WINDOW = 256


class Sieve(EvictionPolicy):
    """Thirteen bytes a slot: a read mark (1), a ring of two places (8) and the slot's place (4)."""

    bytes_per_slot: ClassVar[int] = 13

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._reads = Reads(slots, 1)
        self._places = np.zeros(slots + 1, dtype=np.uint32)
        self._queue = SlotQueue(2 * (slots + 1), self._places)
        # Entries of the queue that the hand has passed.
        self._hand = 0

    @property
    def nbytes(self) -> int:
        return self._reads.nbytes + self._places.nbytes + self._queue.nbytes

    def touch(self, slots: Tensor) -> None:
        self._reads.add(slots.numpy())

    def admitted(self, slots: Tensor, ids: Tensor) -> None:
        here = slots.numpy()
        if self._queue.span + here.size > 2 * (self.slots + 1):
            self._hand = self._queue.compact(self._hand)
        self._queue.push(here)
        self._reads.clear(here)

    def evicted(self, slots: Tensor, ids: Tensor) -> None:
        self.released(slots)

    def released(self, slots: Tensor) -> None:
        self._queue.remove(slots.numpy())

    def moved(self, old: Tensor, new: Tensor) -> None:
        before, after = old.numpy(), new.numpy()
        self._queue.replace(before, after)
        self._reads.move(before, after)

    def heat(self) -> Tensor:
        """Slots that the hand comes to later are hotter, those read hotter than all others."""
        entries = self._queue.peek(0, self._queue.span)
        at = np.flatnonzero(entries)
        slots = entries[at]
        ahead = (at - self._hand) % max(1, entries.size) + 1
        heat = np.zeros(self.slots + 1, dtype=np.int64)
        heat[slots] = ahead + entries.size * (self._reads.of(slots) > 0)
        return torch.from_numpy(heat)

    def victims(self, count: int, evictable: Evictable) -> Tensor:
        found = self._queue.peek(0, 0)
        window = max(2 * count, _SMALLEST_WINDOW)
        # Two rounds: the first may only clear marks.
        left_to_scan = 2 * self._queue.span
        while found.size < count and left_to_scan > 0:
            if self._hand >= self._queue.span:
                self._hand = 0
            slots = self._queue.peek(self._hand, min(window, left_to_scan))
            taken, passed = self._sweep(slots, found, count - found.size, evictable)
            found = np.concatenate((found, taken))
            left_to_scan -= passed
            self._hand += passed
            window *= 2
        return torch.from_numpy(found)

    def _sweep(self, slots: Slots, found: Slots, want: int, evictable: Evictable) -> tuple[Slots, int]:
        """Up to `want` more than those found, of `slots`, in order; and how many entries the hand passed."""
        unread, read = self._reads.judge(slots, evictable)
        if found.size:
            unread &= ~np.isin(slots, found)
        at = np.flatnonzero(unread)[:want]
        passed = int(at[-1]) + 1 if at.size == want else slots.size
        self._reads.clear(slots[:passed][read[:passed]])
        return slots[at], passed


__all__ = ["Sieve"]
