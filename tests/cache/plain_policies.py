"""S3-FIFO and SIEVE told one lookup at a time with lists, and a small cache that any policy can run in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch

from torchrec_turbossd.cache.eviction import EvictionPolicy
from torchrec_turbossd.cache.ghost import Ghost
from torchrec_turbossd.cache.reads import Reads
from torchrec_turbossd.cache.slot_queue import SlotQueue


class PlainS3Fifo:
    """Rows in two queues and a ghost of ids; the ghost's cells are those of the policy under test."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.small: deque[int] = deque()
        self.main: deque[int] = deque()
        self.reads: dict[int, int] = {}
        self.ghost: dict[int, int] = {}
        self._table = Ghost(slots + 1 + (slots + 1) % 2)
        self._cells: dict[int, int] = {}

    def read(self, row: int) -> bool:
        if row in self.reads:
            self.reads[row] = min(3, self.reads[row] + 1)
            return True
        while len(self.reads) >= self.slots:
            self._evict()
        if self.ghost.get(self._cell(row)) == row:
            del self.ghost[self._cell(row)]
            self.main.append(row)
        else:
            self.small.append(row)
            if len(self.small) > max(1, self.slots // 4):
                self.main.append(self.small.popleft())
        self.reads[row] = 0
        return False

    def _cell(self, row: int) -> int:
        if row not in self._cells:
            self._cells[row] = int(self._table._places(np.array([row]))[0][0])
        return self._cells[row]

    def _evict(self) -> None:
        """One step: a row goes, or changes its place."""
        if self.small and (len(self.small) >= max(1, self.slots // 10) or not self.main):
            row = self.small.popleft()
            if self.reads[row]:
                self.reads[row] = 0
                self.main.append(row)
            else:
                del self.reads[row]
                self.ghost[self._cell(row)] = row
            return
        row = self.main.popleft()
        if self.reads[row]:
            self.reads[row] -= 1
            self.main.append(row)
        else:
            del self.reads[row]


class PlainSieve:
    """A list of rows, oldest first, and a hand."""

    def __init__(self, slots: int) -> None:
        self.slots, self.hand = slots, 0
        self.queue: list[int] = []
        self.was_read: dict[int, bool] = {}

    def read(self, row: int) -> bool:
        if row in self.was_read:
            self.was_read[row] = True
            return True
        while len(self.queue) >= self.slots:
            self.hand %= len(self.queue)
            candidate = self.queue[self.hand]
            if self.was_read[candidate]:
                self.was_read[candidate] = False
                self.hand += 1
            else:
                del self.queue[self.hand], self.was_read[candidate]
        self.queue.append(row)
        self.was_read[row] = False
        return False


class SmallCache:
    """Rows in the slots of one policy: as much of a cache as an eviction policy needs to be judged."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.slots: dict[int, int] = {}
        self.owners = torch.full((policy.slots + 1,), -1, dtype=torch.int64)
        self.pinned = torch.zeros(policy.slots + 1, dtype=torch.bool)

    def numbers(self, values: Iterable[int]) -> torch.Tensor:
        """[N] int64."""
        return torch.tensor(list(values), dtype=torch.int64)

    def evictable(self, slots: torch.Tensor) -> torch.Tensor:
        return (self.owners[slots] >= 0) & ~self.pinned[slots]

    def serve(self, ids: list[int]) -> int:
        """Hits of one batch: what it finds before what it lacks comes in. Rows found are not evicted for the rest."""
        found = self.numbers(self.slots.get(i, 0) for i in ids)
        self.policy.touch(found)
        before = self.pinned.clone()
        self.pinned[found] = True
        self.admit(dict.fromkeys(i for i in ids if i not in self.slots))
        self.pinned = before
        return int((found > 0).sum())

    def admit(self, rows: Iterable[int]) -> None:
        wanted = self.numbers(rows)
        free = torch.nonzero(self.owners[1:] < 0).flatten()[: wanted.numel()] + 1
        short = wanted.numel() - free.numel()
        if short:
            free = torch.cat([free, self.evict(short)])
        here = wanted[: free.numel()]
        self.owners[free] = here
        self.slots.update(zip(here.tolist(), free.tolist(), strict=True))
        if here.numel():
            self.policy.admitted(free, here)

    def evict(self, count: int) -> torch.Tensor:
        gone = self.policy.victims(count, self.evictable)
        assert gone.numel() == min(count, int(self.evictable(self.numbers(range(self.owners.numel()))).sum()))
        assert gone.unique().numel() == gone.numel() and bool(self.evictable(gone).all())
        ids = self.owners[gone]
        self.policy.evicted(gone, ids)
        self._empty(gone)
        return gone

    def drop(self, rows: list[int]) -> None:
        slots = self.numbers(self.slots[r] for r in rows)
        self.policy.released(slots)
        self._empty(slots)

    def move(self, rows: list[int]) -> None:
        """Rows go to free slots, as far as there are any."""
        free = torch.nonzero(self.owners[1:] < 0).flatten()[: len(rows)] + 1
        rows = rows[: free.numel()]
        old = self.numbers(self.slots[r] for r in rows)
        self.policy.moved(old, free)
        self._empty(old)
        self.owners[free] = self.numbers(rows)
        self.slots.update(zip(rows, free.tolist(), strict=True))

    def _empty(self, slots: torch.Tensor) -> None:
        for row in self.owners[slots].tolist():
            del self.slots[row]
        self.owners[slots] = -1
        self.pinned[slots] = False


def policy_bytes(policy: EvictionPolicy) -> int:
    """Bytes of all tensors and arrays that a policy holds."""
    return sum(_arrays(policy).values())


def _arrays(owner: object) -> dict[int, int]:
    """Bytes of every tensor and array of an object and its parts, by address, so that each is there once."""
    found: dict[int, int] = {}
    for value in vars(owner).values():
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, np.ndarray):
            found[value.ctypes.data] = value.nbytes
        elif isinstance(value, SlotQueue | Ghost | Reads):
            found.update(_arrays(value))
    return found


def zipf_rows(rows: int, alpha: float, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1, rows + 1, dtype=torch.float64) ** -alpha
    ids: list[int] = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
    return ids


def drifting_rows(rows: int, alpha: float, count: int, seed: int) -> list[int]:
    """The same, but every 20 lookups the popularity of one row, most often a popular one, passes to another."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).tolist()
    out = []
    for number, rank in enumerate(zipf_rows(rows, alpha, count, seed)):
        if number % 20 == 0:
            one = int(rows ** float(torch.rand(1, generator=generator))) - 1
            other = int(torch.randint(rows, (1,), generator=generator))
            order[one], order[other] = order[other], order[one]
        out.append(order[rank])
    return out
