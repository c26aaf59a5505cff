"""First-in first-out queues of slots that work on batches: a ring of slots, and each slot's place in it.

A slot that leaves from the middle leaves a hole (0), which goes when it is in front, or when the ring has no room left
and is written anew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]
_STRETCH = 1024


class SlotQueue:
    """Slots in order, the oldest in front. Batches are [N] int64 of distinct slots.

    Args:
        capacity: places of the ring, 4 bytes each; there must always be one for each slot in the queue. The more there
            are beyond that, the rarer it is written anew.
        places: [slots + 1] uint32, where in a ring a slot is; 0: in none. Queues whose slots are different ones may
            share it.
        base: the number of this ring's first place, at least 1; the places of queues that share them must differ.
    """

    def __init__(self, capacity: int, places: NDArray[np.uint32], base: int = 1) -> None:
        self.size = 0
        self._ring = np.zeros(capacity, dtype=np.int32)
        self._places = places
        # Unsigned, so that what is less than the base becomes more than any place.
        self._base = np.uint32(base)
        self._first = 0
        self._span = 0

    @property
    def span(self) -> int:
        """Slots and holes."""
        return self._span

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return self._ring.nbytes

    def push(self, slots: Slots) -> None:
        """Put slots at the back, the last one hindmost."""
        if self._span + slots.size > self._ring.size:
            self.compact()
        self._write(self._first + self._span, slots)
        self._span += slots.size

    def push_front(self, slots: Slots) -> None:
        """Put slots in front, the first one foremost."""
        if self._span + slots.size > self._ring.size:
            self.compact()
        self._first = (self._first - slots.size) % self._ring.size
        self._write(self._first, slots)
        self._span += slots.size

    def _write(self, first: int, slots: Slots) -> None:
        first %= self._ring.size
        ahead = self._ring.size - first
        for start, part in ((first, slots[:ahead]), (0, slots[ahead:])):
            if part.size:
                self._ring[start : start + part.size] = part
                self._places[part] = np.arange(self._base + start, self._base + start + part.size)
        self.size += slots.size

    def peek(self, skip: int, count: int) -> Slots:
        """Up to `count` entries, oldest first, after `skip` of them; 0 for a hole."""
        count = max(0, min(count, self._span - skip))
        first = (self._first + skip) % self._ring.size
        entries = self._ring[first : first + count]
        if entries.size < count:
            entries = np.concatenate((entries, self._ring[: count - entries.size]))
        return entries.astype(np.int64)

    def pop(self, entries: int, slots: int) -> None:
        """Take away the oldest entries, of which so many are slots; these must go into a queue again."""
        self._first = (self._first + entries) % self._ring.size
        self._span -= entries
        self.size -= slots

    def take(self, count: int) -> Slots:
        """Take away the `count` oldest slots, all when there are fewer."""
        taken, count = [self.peek(0, 0)], min(count, self.size)
        while count > 0:
            entries = self.peek(0, 2 * count)
            at = np.flatnonzero(entries)[:count]
            self.pop(int(at[-1]) + 1 if at.size == count else entries.size, at.size)
            taken.append(entries[at])
            count -= at.size
        slots = np.concatenate(taken)
        self._places[slots] = 0
        return slots

    def remove(self, slots: Slots) -> NDArray[np.bool_]:
        """Take those of `slots` that are here out of the queue, wherever they stand: [N] bool, which they are."""
        at = self._places[slots] - self._base
        here: NDArray[np.bool_] = at < self._ring.size
        self._ring[at[here]] = 0
        self._places[slots[here]] = 0
        self.size -= int(np.count_nonzero(here))
        return here

    def replace(self, old: Slots, new: Slots) -> None:
        """Let slots `new` [N] stand where `old` [N] did, those of them that are here."""
        places = self._places[old]
        at = places - self._base
        here = at < self._ring.size
        self._ring[at[here]] = new[here]
        self._places[old[here]] = 0
        self._places[new[here]] = places[here]

    def trim(self) -> None:
        """Take away the holes in front."""
        while self._span and not self._ring[self._first]:
            stretch = self._ring[self._first : self._first + min(self._span, _STRETCH)]
            # The first is a hole, so that 0 stands for none that is a slot.
            self.pop(int((stretch != 0).argmax()) or stretch.size, 0)

    def compact(self, until: int = 0) -> int:
        """Close the holes; returns how many slots were among the first `until` entries."""
        entries = self.peek(0, self._span)
        self._first = self._span = self.size = 0
        self._write(0, entries[entries > 0])
        self._span = self.size
        return int(np.count_nonzero(entries[:until]))


__all__ = ["SlotQueue", "Slots"]
