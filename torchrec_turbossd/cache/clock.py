"""CLOCK eviction: a hand sweeps the slots, and a slot read since the last sweep gets a second chance.

Corbató, "A Paging Experiment with the Multics System", 1968. New rows start without the reference bit, so a row
read once leaves at the first sweep. It is the policy with the least memory.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable, EvictionPolicy

_UNKNOWN, _UNREAD, _READ, _TAKEN = 0, 1, 2, 3
_SMALLEST_WINDOW = 1024


class Clock(EvictionPolicy):
    """One byte a slot."""

    bytes_per_slot: ClassVar[int] = 1

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._marks = torch.zeros(slots + 1, dtype=torch.uint8, device="cpu")
        self._hand = 0

    @property
    def nbytes(self) -> int:
        return self._marks.nbytes

    def touch(self, slots: Tensor) -> None:
        marks = self._marks.gather(0, slots)
        self._marks.scatter_(0, slots, marks.add_(marks == _UNREAD))

    def admitted(self, slots: Tensor, ids: Tensor) -> None:
        self._marks.index_fill_(0, slots, _UNREAD)

    def evicted(self, slots: Tensor, ids: Tensor) -> None:
        self.released(slots)

    def released(self, slots: Tensor) -> None:
        self._marks.index_fill_(0, slots, _UNKNOWN)

    def moved(self, old: Tensor, new: Tensor) -> None:
        marks = self._marks.index_select(0, old)
        self._marks.index_fill_(0, old, _UNKNOWN)
        self._marks.index_copy_(0, new, marks)

    def heat(self) -> Tensor:
        """Slots that the hand comes to later are hotter, those read hotter than all others."""
        slots = torch.arange(self.slots + 1, device="cpu")
        ahead = (slots - 1 - self._hand) % self.slots + 1
        known = self._marks != _UNKNOWN
        return torch.where(known, ahead + self.slots * (self._marks == _READ), 0)

    def victims(self, count: int, evictable: Evictable) -> Tensor:
        found: list[Tensor] = []
        # Two sweeps: the first may only clear marks.
        left_to_scan, left_to_find = 2 * self.slots, count
        while left_to_find > 0 and left_to_scan > 0:
            window = min(max(2 * left_to_find, _SMALLEST_WINDOW), self.slots, left_to_scan)
            slots = (self._hand + torch.arange(window, device="cpu")) % self.slots + 1
            taken, passed = self._sweep(slots, left_to_find, evictable)
            found.append(taken)
            left_to_find -= taken.numel()
            left_to_scan -= passed
            self._hand = (self._hand + passed) % self.slots
        result = torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")
        self._marks.index_fill_(0, result, _UNREAD)
        return result

    def _sweep(self, slots: Tensor, want: int, evictable: Evictable) -> tuple[Tensor, int]:
        """Take up to `want` of `slots`, in order; returns them and how many slots the hand passed."""
        marks, free_to_go = self._marks.index_select(0, slots), evictable(slots)
        candidates = torch.nonzero(free_to_go & (marks == _UNREAD)).flatten()[:want]
        passed = slots.numel() if candidates.numel() < want else int(candidates[-1]) + 1
        read = free_to_go[:passed] & (marks[:passed] == _READ)
        self._marks.index_fill_(0, slots[:passed][read], _UNREAD)
        self._marks.index_fill_(0, slots[candidates], _TAKEN)
        return slots[candidates], passed


__all__ = ["Clock"]
