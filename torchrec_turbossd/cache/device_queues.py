"""The two queues of a table's slots on a device, as S3-FIFO has them, worked on by PyTorch operators.

For the policy see `s3_fifo`; here a slot that a batch in flight uses, or one that the batch at hand has read, stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.device_state import DeviceState


def empty_slots(state: DeviceState, table: int, need: int, oldest: int) -> Tensor:
    """Take up to `need` slots out of the queues of a table: [N] int64, fewer where no more may go.

    Unread ones of the small queue as far as it exceeds its share, then those of the main one. Slots that batch `oldest`
    or a later one used stay.
    """
    queues = _Queues(state, table)
    share = max(1, (queues.small.size + queues.main.size) // entries.SMALL_PART)
    found = [torch.empty(0, dtype=torch.int64, device=state.device)]
    for phase in range(4):
        small = phase % 2 == 0
        quota = queues.small.size if small else 4 * queues.main.size
        if phase == 0:
            quota = min(quota, queues.small.size + need - share)
        while need > 0 and quota > 0 and (queues.small if small else queues.main).size > 0:
            leaves, gone = queues.pop(small, need, quota, oldest)
            found.append(leaves)
            need -= leaves.numel()
            quota -= gone
    queues.save()
    return torch.cat(found)


def enqueue_slots(state: DeviceState, table: int, slots: Tensor, rows: Tensor) -> None:
    """Put slots [N] int64, which hold new `rows` [N] (local ids), into the queues of a table."""
    queues = _Queues(state, table)
    queues.push_new(slots, rows)
    queues.save()


def heat(state: DeviceState, table: int) -> Tensor:
    """For each slot 0 to the last how reluctantly it would be emptied: [slots + 1] int64, larger is hotter."""
    queues = _Queues(state, table)
    slots = torch.cat([queue.peek(queue.size) for queue in (queues.small, queues.main)])
    at = torch.arange(slots.numel(), device=state.device)
    reads = (queues.words[slots] & entries.READS).to(torch.int64)
    rounds = torch.where(at < queues.small.size, (reads > 0).to(torch.int64), reads)
    hot = torch.zeros(state.slots[table] + 1, dtype=torch.int64, device=state.device)
    hot[slots] = 1 + at + rounds * slots.numel()
    return hot


def queued(state: DeviceState, table: int) -> Tensor:
    """Every slot in a queue of a table: [N] int64."""
    queues = _Queues(state, table)
    return torch.cat([queue.peek(queue.size) for queue in (queues.small, queues.main)])


def drop_slots(state: DeviceState, table: int, slots: Tensor) -> None:
    """Take these slots [N] int64 out of the queues of a table, wherever they stand."""
    queues = _Queues(state, table)
    for queue in (queues.small, queues.main):
        entries_of = queue.peek(queue.size)
        queue.pop(queue.size)
        queue.push(entries_of[~torch.isin(entries_of, slots)])
    queues.save()


class _Ring:
    """A queue of slots: `at` [places] int32."""

    def __init__(self, at: Tensor, head: int, size: int) -> None:
        self.at, self.head, self.size = at, head, size

    def peek(self, count: int) -> Tensor:
        places = (self.head + torch.arange(count, device=self.at.device)) % self.at.numel()
        return self.at[places].to(torch.int64)

    def pop(self, count: int) -> None:
        self.head, self.size = (self.head + count) % self.at.numel(), self.size - count

    def push(self, slots: Tensor) -> None:
        places = (self.head + self.size + torch.arange(slots.numel(), device=self.at.device)) % self.at.numel()
        self.at[places] = slots.to(torch.int32)
        self.size += slots.numel()


class _Queues:
    """The two queues of a table, and the ids that left the small one."""

    def __init__(self, state: DeviceState, table: int) -> None:
        described = state.tables[table].tolist()
        first, main = described[entries.SMALL_BASE], described[entries.MAIN_BASE]
        small_head, small_size, main_head, main_size = state.queues[table].tolist()
        self.small = _Ring(state.rings[first : first + described[entries.SMALL_SIZE]], small_head, small_size)
        self.main = _Ring(state.rings[main : main + state.slots[table]], main_head, main_size)
        slots = slice(state.slot_base_of[table], state.slot_base_of[table + 1])
        self.words, self._owners, self._ghosts = state.state[slots], state.owners[slots], state.ghosts[slots]
        self._saved = state.queues[table]

    def save(self) -> None:
        numbers = [self.small.head, self.small.size, self.main.head, self.main.size]
        self._saved.copy_(torch.tensor(numbers, dtype=torch.int32))

    def pop(self, small: bool, need: int, quota: int, oldest: int) -> tuple[Tensor, int]:
        """Up to `need` idle slots among the first `quota` ones; (slots, how many were passed)."""
        queue = self.small if small else self.main
        slots = queue.peek(min(queue.size, quota))
        words = self.words[slots]
        pinned = (words >> entries.STAMP_SHIFT) >= oldest
        idle = ~pinned & ((words & entries.READS) == 0)
        passed = idle.cumsum(0) - idle.to(torch.int64) < need
        slots, words, pinned, idle = slots[passed], words[passed], pinned[passed], idle[passed]
        leaves = slots[idle]
        if small:
            cells, marks = _ghost(self._owners[leaves], self._ghosts.numel())
            self._ghosts[cells] = marks
        waits = ~idle & pinned & small
        moves = ~idle & ~waits
        moved = moves & ~pinned
        self.words[slots[moved]] = words[moved] & ~entries.READS if small else words[moved] - 1
        queue.pop(slots.numel())
        self.small.push(slots[waits])
        self.main.push(slots[moves])
        return leaves, slots.numel()

    def push_new(self, slots: Tensor, rows: Tensor) -> None:
        cells, marks = _ghost(rows, self._ghosts.numel())
        known = self._ghosts[cells] == marks
        self._ghosts[cells[known]] = 0
        low = ~known & (self.small.size + (~known).cumsum(0) <= self.small.at.numel())
        self.small.push(slots[low])
        self.main.push(slots[~low])


def _ghost(rows: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    mixed = rows * entries.GHOST_FACTOR
    at = (((mixed >> entries.CELL_SHIFT) & entries.CELL_MASK) * cells) >> entries.CELL_SHIFT
    return at, ((mixed >> entries.GHOST_SHIFT) & entries.GHOST_MASK).clamp(min=1).to(torch.int16)


__all__ = ["drop_slots", "empty_slots", "enqueue_slots", "heat", "queued"]
