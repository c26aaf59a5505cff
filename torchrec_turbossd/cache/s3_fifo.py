"""S3-FIFO eviction: new rows prove themselves in a small queue before they may stay in the main one.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. A row
that leaves the small queue unread is gone, but its id is remembered for a while: if it comes back in that time it goes
straight to the main queue, where each read since the last round (up to three) buys another round. Here one read in
the small queue is enough to go on to the main one: of the thresholds of one and two reads it is the one that falls less
behind LRU where popularity drifts and the cache is large.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchrec_turbossd.cache.eviction import Evictable, EvictionPolicy
from torchrec_turbossd.cache.ghost import Ghost
from torchrec_turbossd.cache.reads import Reads
from torchrec_turbossd.cache.slot_queue import SlotQueue, Slots

_MOST_READS = 3
_SMALL_PART = 10
_SMALLEST_WINDOW = 256
_NONE = np.empty(0, dtype=np.int64)


class S3Fifo(EvictionPolicy):
    """Thirteen bytes a slot: reads (1), rings of one and a half places (6), place (4) and ghost (2).

    While there are free slots the small queue may hold up to a quarter of them; what exceeds that goes to the main one.
    """

    bytes_per_slot: ClassVar[int] = 13

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        every = slots + 1
        self._reads = Reads(slots, _MOST_READS)
        self._places = np.zeros(every, dtype=np.uint32)
        self._main = SlotQueue(every, self._places)
        self._small = SlotQueue(every // 2, self._places, base=1 + every)
        # One cell more where the small ring's half place is lost.
        self._ghost = Ghost(every + every % 2)
        self._most_small = max(1, slots // 4)

    @property
    def nbytes(self) -> int:
        parts = (self._reads, self._places, self._main, self._small, self._ghost)
        return sum(part.nbytes for part in parts)

    def touch(self, slots: Tensor) -> None:
        self._reads.add(slots.numpy())

    def admitted(self, slots: Tensor, ids: Tensor) -> None:
        here, theirs = slots.numpy(), ids.numpy()
        known = self._ghost.take(theirs)
        new = here[~known]
        over = self._small.size + new.size - self._most_small
        if over > 0:
            self._main.push(self._small.take(over))
        over = max(0, self._small.size + new.size - self._most_small)
        self._main.push(np.concatenate((here[known], new[:over])))
        self._small.push(new[over:])
        self._reads.clear(here)

    def evicted(self, slots: Tensor, ids: Tensor) -> None:
        here, theirs = slots.numpy(), ids.numpy()
        from_small = self._small.remove(here)
        self._main.remove(here[~from_small])
        self._ghost.add(theirs[from_small])

    def released(self, slots: Tensor) -> None:
        here = slots.numpy()
        self._small.remove(here)
        self._main.remove(here)

    def moved(self, old: Tensor, new: Tensor) -> None:
        before, after = old.numpy(), new.numpy()
        self._small.replace(before, after)
        self._main.replace(before, after)
        self._reads.move(before, after)

    def heat(self) -> Tensor:
        """Rows of the small queue that nobody has read, then the main queue by its rounds left, oldest first."""
        entries = np.concatenate([queue.peek(0, queue.span) for queue in (self._small, self._main)])
        at = np.flatnonzero(entries)
        slots = entries[at]
        reads = self._reads.of(slots).astype(np.int64)
        # From the small queue a row that was read goes to the back of the main one, its reads forgotten.
        rounds = np.where(at < self._small.span, reads > 0, reads)
        heat = np.zeros(self.slots + 1, dtype=np.int64)
        heat[slots] = 1 + at + rounds * entries.size
        return torch.from_numpy(heat)

    def victims(self, count: int, evictable: Evictable) -> Tensor:
        self._small.trim()
        self._main.trim()
        found = [self._leave_small(count, evictable, balanced=True)]
        for leave in (self._leave_main, self._leave_small, self._leave_main):
            left = count - sum(map(len, found))
            found.append(leave(left, evictable) if left else _NONE)
        # In front of their queues until they are evicted: they may yet be kept.
        self._small.push_front(np.concatenate(found[0::2]))
        self._main.push_front(np.concatenate(found[1::2]))
        return torch.from_numpy(np.concatenate(found))

    def _leave_small(self, want: int, evictable: Evictable, *, balanced: bool = False) -> Slots:
        """Take up to `want` unread slots out of the small queue; those read go to the main one.

        `balanced` stops when the main queue must give the rest, for the small one to come back to its share once
        `want` new rows are in it.
        """
        found, kept = [_NONE], [_NONE]
        share = max(1, (self._small.size + self._main.size) // _SMALL_PART)
        # That many may go to the main queue; each one more is another that the main queue must give.
        spare = self._small.size - share if balanced else self.slots
        left = want + min(0, spare)
        while self._small.size > 0 and left > 0:
            slots = self._small.peek(0, max(2 * want, _SMALLEST_WINDOW))
            unread, read = self._reads.judge(slots, evictable)
            counted = unread.copy()
            counted[np.flatnonzero(read)[max(0, spare) :]] = True
            passed = _passed(counted, left)
            leaves, rises, stuck = _parted(slots[:passed], unread[:passed], read[:passed])
            self._small.pop(passed, leaves.size + rises.size + stuck.size)
            self._main.push(rises)
            self._reads.clear(rises)
            found.append(leaves)
            kept.append(stuck)
            left -= int(np.count_nonzero(counted[:passed]))
            spare -= rises.size
        self._small.push_front(np.concatenate(kept))
        return np.concatenate(found)

    def _leave_main(self, want: int, evictable: Evictable) -> Slots:
        """Take up to `want` slots without reads out of the main queue; others go to its back with one read less."""
        found, kept = [_NONE], [_NONE]
        left, window = want, max(2 * want, _SMALLEST_WINDOW)
        # Each round takes a read from every slot that may go, so that this ends.
        while self._main.size > 0 and left > 0:
            slots = self._main.peek(0, window)
            unread, read = self._reads.judge(slots, evictable)
            passed = _passed(unread, left)
            leaves, again, stuck = _parted(slots[:passed], unread[:passed], read[:passed])
            self._main.pop(passed, leaves.size + again.size + stuck.size)
            self._main.push(again)
            self._reads.less(again)
            found.append(leaves)
            kept.append(stuck)
            left -= leaves.size
            window *= 2
        self._main.push_front(np.concatenate(kept))
        return np.concatenate(found)


def _passed(counted: NDArray[np.bool_], want: int) -> int:
    """How many of the flags [N] there are up to the `want`-th that is set; N if there are fewer set."""
    at = np.flatnonzero(counted)
    return int(at[want - 1]) + 1 if at.size >= want else counted.size


def _parted(slots: Slots, unread: NDArray[np.bool_], read: NDArray[np.bool_]) -> tuple[Slots, Slots, Slots]:
    """Slots that are unread, that were read, and that may not go; holes are none of them."""
    stuck = slots[~(unread | read)]
    return slots[unread], slots[read], stuck[stuck > 0]


__all__ = ["S3Fifo"]
