"""CLOCK eviction: a hand sweeps the slots, and a slot read since the last sweep gets a second chance.

Corbató, "A Paging Experiment with the Multics System", 1968. New rows start without the reference bit, so a row
read once leaves at the first sweep. Use LRU instead where the order of the last reads matters more than its cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable, EvictionPolicy

_UNREAD, _READ, _TAKEN = 0, 1, 2
_SMALLEST_WINDOW = 1024


class Clock(EvictionPolicy):
    """One byte a slot."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self._marks = torch.zeros(slots + 1, dtype=torch.uint8, device=device)
        self._hand = 0

    def touch(self, slots: Tensor) -> None:
        self._marks.index_fill_(0, slots, _READ)

    def admitted(self, slots: Tensor) -> None:
        self._marks.index_fill_(0, slots, _UNREAD)

    def victims(self, count: int, evictable: Evictable) -> Tensor:
        found: list[Tensor] = []
        # Two sweeps: the first may only clear marks.
        left_to_scan, left_to_find = 2 * self.slots, count
        while left_to_find > 0 and left_to_scan > 0:
            window = min(max(2 * left_to_find, _SMALLEST_WINDOW), self.slots, left_to_scan)
            slots = (self._hand + torch.arange(window, device=self.device)) % self.slots + 1
            taken, passed = self._sweep(slots, left_to_find, evictable)
            found.append(taken)
            left_to_find -= taken.numel()
            left_to_scan -= passed
            self._hand = (self._hand + passed) % self.slots
        result = torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=self.device)
        self._marks.index_fill_(0, result, _UNREAD)
        return result

    def _sweep(self, slots: Tensor, want: int, evictable: Evictable) -> tuple[Tensor, int]:
        """Take up to `want` of `slots`, in order; returns them and how many slots the hand passed."""
        marks, free_to_go = self._marks[slots], evictable(slots)
        candidates = torch.nonzero(free_to_go & (marks == _UNREAD)).flatten()[:want]
        passed = slots.numel() if candidates.numel() < want else int(candidates[-1]) + 1
        read = free_to_go[:passed] & (marks[:passed] == _READ)
        self._marks.index_fill_(0, slots[:passed][read], _UNREAD)
        self._marks.index_fill_(0, slots[candidates], _TAKEN)
        return slots[candidates], passed


__all__ = ["Clock"]
