"""Queues of slots against plain lists: random steps of two rings that share their places."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from torchrec_turbossd.cache.slot_queue import SlotQueue

WHICH = st.integers(0, 1)


def test_a_queue_keeps_its_order_through_holes() -> None:
    queue = SlotQueue(8, np.zeros(9, dtype=np.uint32))
    queue.push(np.array([1, 2, 3, 4, 5, 6]))
    queue.remove(np.array([2, 5]))
    queue.replace(np.array([4]), np.array([8]))
    queue.push(np.array([7, 2, 5]))
    queue.push_front(np.array([4]))
    assert queue.size == 8 and queue.take(3).tolist() == [4, 1, 3]
    assert queue.peek(1, 9).tolist() == [6, 7, 2, 5] and queue.take(9).tolist() == [8, 6, 7, 2, 5]
    assert queue.size == 0 and queue.take(1).size == 0


class QueuesAgainstLists(RuleBasedStateMachine):
    """Two small rings over the same places, which wrap and are written anew; slots 1 to 12."""

    def __init__(self) -> None:
        super().__init__()
        self.places = np.zeros(13, dtype=np.uint32)
        self.queues = (SlotQueue(10, self.places), SlotQueue(9, self.places, base=11))
        self.lists: tuple[list[int], list[int]] = ([], [])

    def loose(self, count: int) -> list[int]:
        return [s for s in range(1, 13) if s not in self.lists[0] + self.lists[1]][:count]

    @rule(which=WHICH, count=st.integers(0, 4), front=st.booleans())
    def push(self, which: int, count: int, front: bool) -> None:
        slots = self.loose(min(count, 9 - len(self.lists[which])))
        (self.queues[which].push_front if front else self.queues[which].push)(np.array(slots, dtype=np.int64))
        self.lists[which][:] = slots + self.lists[which] if front else self.lists[which] + slots

    @rule(which=WHICH, count=st.integers(0, 4))
    def take(self, which: int, count: int) -> None:
        assert self.queues[which].take(count).tolist() == self.lists[which][:count]
        del self.lists[which][:count]

    @rule(which=WHICH, at=st.integers(0, 8), trim=st.booleans())
    def remove(self, which: int, at: int, trim: bool) -> None:
        """Slots of the other queue stay."""
        gone = self.lists[which][at : at + 2]
        asked = [*gone, *self.lists[1 - which][:2]]
        assert self.queues[which].remove(np.array(asked, dtype=np.int64)).tolist() == [s in gone for s in asked]
        self.lists[which][:] = [s for s in self.lists[which] if s not in gone]
        if trim:
            self.queues[which].trim()
            assert not self.queues[which].span or self.queues[which].peek(0, 1)[0] > 0

    @rule(which=WHICH, at=st.integers(0, 8))
    def replace(self, which: int, at: int) -> None:
        new = self.loose(2)
        old = self.lists[which][at : at + len(new)]
        pairs = dict(zip(old, new, strict=False))
        asked = [*old, *self.lists[1 - which][:1]]
        others = [pairs.get(s, 0) for s in asked]
        self.queues[which].replace(np.array(asked, dtype=np.int64), np.array(others, dtype=np.int64))
        self.lists[which][:] = [pairs.get(s, s) for s in self.lists[which]]

    @invariant()
    def same(self) -> None:
        for queue, wanted in zip(self.queues, self.lists, strict=True):
            entries = queue.peek(0, queue.span)
            assert entries[entries > 0].tolist() == wanted and queue.size == len(wanted)
        assert np.flatnonzero(self.places).tolist() == sorted(self.lists[0] + self.lists[1])


TestQueues = QueuesAgainstLists.TestCase
TestQueues.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
