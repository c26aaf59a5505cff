"""Which rows are in which slots: slot map, owners, pins, dirty marks and free slots of a module's tables.

It moves no row: the caller copies bytes between a `reserve` and its `commit`. Slot 0 of each table is reserved and
never handed out, so that an absent id (map entry 0) points at memory that is safe to read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.cache.free_slots import FreeSlots
from torchrec_turbossd.cache.policies import DEFAULT_POLICY, POLICIES
from torchrec_turbossd.cache.slot_map import SlotMap
from torchrec_turbossd.errors import CacheFullError, ConfigError

FREE = -1
_CPU = torch.device("cpu")
_LEAST_KEPT_TOUCHES, _SLOTS_PER_KEPT_TOUCH = 1 << 16, 8


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """Slots chosen for absent ids of one table; nothing has changed until `SlotCache.commit`.

    ids, slots: [N] int64, what will be where. evicted_ids, evicted_slots: [M], the rows that leave.
    dirty: [M] bool, which of those must be written back first.
    """

    table: int
    ids: Tensor
    slots: Tensor
    evicted_ids: Tensor
    evicted_slots: Tensor
    dirty: Tensor


class SlotCache:
    """Slots of several tables. Ids are local to a table; `bases` turn them into slot map positions.

    A slot that holds a row or is free is this cache's own. Slots may also be taken out, to be given back later or to
    another cache over the same memory. Not thread-safe: the owner holds a lock. Every tensor is the CPU's.

    Args:
        rows: rows of each table.
        slots: usable slots of each table, at least 1 (slot 0 comes on top).
        policy: an eviction policy by name.
    """

    def __init__(self, rows: Sequence[int], slots: Sequence[int], *, policy: str = DEFAULT_POLICY) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"no eviction policy {policy!r}; the policies are {', '.join(POLICIES)}")
        if len(rows) != len(slots) or any(n < 1 for n in (*rows, *slots)):
            raise ConfigError(f"each table needs rows >= 1 and slots >= 1, got rows {list(rows)}, slots {list(slots)}")
        self.rows, self.slots, self.device, self.policy = list(rows), list(slots), _CPU, policy
        self.bases = torch.tensor([0, *rows], dtype=torch.int64, device=_CPU).cumsum(0)
        self.slot_bases = torch.tensor([0, *[n + 1 for n in slots]], dtype=torch.int64, device=_CPU).cumsum(0)
        self.base_of: list[int] = self.bases.tolist()
        self.slot_base_of: list[int] = self.slot_bases.tolist()
        total = self.slot_base_of[-1]
        self.map = SlotMap(self.base_of[-1], _CPU)
        self._owners = torch.full((total,), FREE, dtype=torch.int64, device=_CPU)
        self._pins = torch.zeros(total, dtype=torch.int32, device=_CPU)
        self._dirty = torch.zeros(total, dtype=torch.bool, device=_CPU)
        self._policies = [POLICIES[policy](n) for n in slots]
        self._free = [FreeSlots(1, n, _CPU) for n in slots]
        self._touches: list[deque[Tensor]] = [deque() for _ in slots]
        self._kept = [0] * len(slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the slot map and of the bookkeeping beside each slot."""
        own = self._owners.nbytes + self._pins.nbytes + self._dirty.nbytes
        return self.map.nbytes + own + sum(policy.nbytes for policy in self._policies)

    def lookup(self, positions: Tensor) -> Tensor:
        """Slots of slot map `positions` [N] (local id + base): [N] int32, 0 for absent."""
        return self.map.get(positions)

    def find(self, table: int, ids: Tensor) -> Tensor | None:
        """Slots of local `ids` [N] int64: [N] int32, 0 for absent; None where one may be outside the table."""
        try:
            return self.map.get_from(self.base_of[table], self.rows[table], ids)
        except IndexError:
            return None

    def slots_of(self, table: int, ids: Tensor) -> Tensor:
        """Slots of local `ids` [N] of one table: [N] int64, 0 for absent."""
        return self.map.get(ids + self.base_of[table]).to(torch.int64)

    def touch(self, table: int, slots: Tensor) -> None:
        """These slots of a table were read (0: a row that was absent).

        Kept aside until a victim is needed, so that a hit costs nothing more.
        Of reads without a miss in between only the latest count, so that they take less than a byte a slot.
        """
        if self.slots[table] == self.rows[table]:
            return
        kept = self._touches[table]
        # A part of a batch would keep all of it in memory.
        kept.append(slots.clone() if slots.nbytes < slots.untyped_storage().nbytes() else slots)
        self._kept[table] += slots.numel()
        while self._kept[table] - kept[0].numel() > max(
            _LEAST_KEPT_TOUCHES, self.slots[table] // _SLOTS_PER_KEPT_TOUCH
        ):
            self._kept[table] -= kept.popleft().numel()

    def _apply_touches(self, table: int) -> None:
        for slots in self._touches[table]:
            self._policies[table].touch(slots.to(torch.int64))
        self._touches[table].clear()
        self._kept[table] = 0

    def reserve(self, table: int, ids: Tensor) -> Reservation:
        """Choose slots for absent, distinct local `ids` [N] int64.

        Raises `CacheFullError` when pinned slots leave too few; then nothing has changed.
        """
        count = ids.numel()
        if count > self.slots[table]:
            raise CacheFullError(f"{count} rows do not fit in {self.slots[table]} slots")
        free = self._free[table].peek(count)
        evicted = free[:0]
        short = count - free.numel()
        if short > 0:
            evicted = self._victims(table, short)
            if evicted.numel() < short:
                raise CacheFullError(
                    f"{count} rows need {short} slots emptied, but pins leave only {evicted.numel()} of "
                    f"{self.slots[table]} free to go"
                )
        at = evicted + self.slot_base_of[table]
        return Reservation(
            table=table,
            ids=ids,
            slots=torch.cat([free, evicted]),
            evicted_ids=self._owners[at],
            evicted_slots=evicted,
            dirty=self._dirty[at],
        )

    def _victims(self, table: int, count: int) -> Tensor:
        self._apply_touches(table)
        return self._policies[table].victims(count, lambda slots: self._evictable(table, slots))

    def _evictable(self, table: int, slots: Tensor) -> Tensor:
        at = slots + self.slot_base_of[table]
        return (self._owners.index_select(0, at) != FREE) & (self._pins.index_select(0, at) == 0)

    def commit(self, reservation: Reservation) -> None:
        """Make a reservation true: evicted ids become absent, the new ids present, clean and unpinned."""
        table = reservation.table
        free = reservation.slots.numel() - reservation.evicted_slots.numel()
        self._free[table].take(free)
        self._empty(table, reservation.evicted_ids, reservation.evicted_slots)
        self._policies[table].evicted(reservation.evicted_slots, reservation.evicted_ids)
        self.admit(table, reservation.ids, reservation.slots)

    def _empty(self, table: int, ids: Tensor, slots: Tensor) -> None:
        at = slots + self.slot_base_of[table]
        self.map.clear(ids + self.base_of[table])
        self._owners.index_fill_(0, at, FREE)
        self._dirty.index_fill_(0, at, False)

    def free(self, table: int) -> int:
        """How many slots of a table are free."""
        return len(self._free[table])

    def take(self, table: int, count: int) -> Tensor:
        """Take up to `count` free slots out: [N] int64. They are nobody's until `admit`, `move` or `give`."""
        return self._free[table].take(count)

    def give(self, table: int, slots: Tensor) -> None:
        """Slots [N] int64 that were taken out, of this cache or of another, are free here."""
        self._free[table].give(slots)

    def evict(self, table: int, count: int) -> Tensor:
        """Make up to `count` rows absent, without regard to dirty marks; returns their slots, taken out."""
        slots = self._victims(table, count)
        ids = self._owners[slots + self.slot_base_of[table]]
        self._empty(table, ids, slots)
        self._policies[table].evicted(slots, ids)
        return slots

    def admit(self, table: int, ids: Tensor, slots: Tensor) -> None:
        """Absent, distinct local `ids` [N] are in `slots` [N], which were taken out; clean and unpinned."""
        self.map.set(ids + self.base_of[table], slots)
        at = slots + self.slot_base_of[table]
        self._owners.index_copy_(0, at, ids)
        self._dirty.index_fill_(0, at, False)
        self._policies[table].admitted(slots, ids)

    def move(self, table: int, ids: Tensor, slots: Tensor) -> Tensor:
        """Present, clean and unpinned `ids` [N] are in `slots` [N] now, which were taken out; returns the old ones."""
        old = self.slots_of(table, ids)
        base = self.slot_base_of[table]
        self._owners.index_fill_(0, old + base, FREE)
        self._owners.index_copy_(0, slots + base, ids)
        self.map.set(ids + self.base_of[table], slots)
        self._policies[table].moved(old, slots)
        return old

    def remove(self, table: int, ids: Tensor) -> Tensor:
        """Make distinct, present and unpinned local `ids` [N] absent; returns their slots, taken out."""
        slots = self.slots_of(table, ids)
        self._empty(table, ids, slots)
        self._policies[table].released(slots)
        return slots

    def drop(self, table: int, ids: Tensor) -> None:
        """`remove`, and the slots are free; without regard to dirty marks."""
        self.give(table, self.remove(table, ids))

    def beside(self) -> SlotCache:
        """An empty cache of the same tables over the same slots, which has none of them: for `give` and `replace`."""
        other = SlotCache.__new__(SlotCache)
        other.__dict__.update(self.__dict__)
        # A second dense map costs nothing until it is filled.
        other.map = SlotMap(self.base_of[-1], _CPU)
        other._owners = torch.full_like(self._owners, FREE)
        other._pins, other._dirty = torch.zeros_like(self._pins), torch.zeros_like(self._dirty)
        other._policies = [type(p)(p.slots) for p in self._policies]
        other._free = [FreeSlots(n + 1, n, _CPU) for n in self.slots]
        other._touches, other._kept = [deque() for _ in self.slots], [0] * len(self.slots)
        return other

    def replace(self, other: SlotCache) -> None:
        """Take the place of a cache that this one was made `beside`; each has a map of its own, so nothing is done."""

    def hottest(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, slots) of the rows of a table that are in slots, the last to be evicted first."""
        self._apply_touches(table)
        ids, slots = self.resident(table)
        order = self._policies[table].heat()[slots].argsort(descending=True, stable=True)
        return ids[order], slots[order]

    def release_all(self, table: int) -> Tensor:
        """Every slot that is this cache's own, taken out; rows in them are absent, whatever the slot map says."""
        _, held = self.resident(table)
        slots = torch.cat([held, self._free[table].all()])
        first, last = self.slot_base_of[table], self.slot_base_of[table + 1]
        self._owners[first:last] = FREE
        self._free[table] = FreeSlots(1, 0, _CPU)
        return slots

    def pin(self, at: Tensor, count: int) -> None:
        """Add `count` (negative: take away) to the pins of concatenated slots `at` [N] (slot + slot base)."""
        self._pins.index_add_(0, at, torch.full(at.shape, count, dtype=torch.int32, device=_CPU))

    def mark_dirty(self, at: Tensor) -> None:
        """The rows in concatenated slots `at` [N] differ from the store's."""
        self._dirty.index_fill_(0, at, True)

    def clean(self, table: int, slots: Tensor) -> None:
        """The rows in `slots` [N] of a table are as in the store."""
        self._dirty.index_fill_(0, slots + self.slot_base_of[table], False)

    def pinned(self, table: int, slots: Tensor) -> Tensor:
        """Which of `slots` [N] of a table a batch in flight holds: [N] bool."""
        return self._pins[slots + self.slot_base_of[table]] > 0

    def is_dirty(self, table: int, slots: Tensor) -> Tensor:
        """Which of `slots` [N] of a table hold rows that differ from the store's: [N] bool."""
        return self._dirty[slots + self.slot_base_of[table]]

    def dirty(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, slots) of a table's dirty rows."""
        return self._where(table, self._dirty)

    def resident(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, slots) of all rows of a table that are in slots."""
        return self._where(table, self._owners != FREE)

    def _where(self, table: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self.slot_base_of[table], self.slot_base_of[table + 1]
        slots = torch.nonzero(mask[first:last]).flatten()
        return self._owners[slots + first], slots

    def check(self, away: Sequence[Tensor] | None = None) -> None:
        """Verify every invariant; raises `RuntimeError` that names the one broken. Reads the whole slot map.

        Args:
            away: for each table, the slots that are taken out; None: none are.
        """
        present = self.map.present()
        seen = 0
        for table, slots in enumerate(self.slots):
            first, last = self.slot_base_of[table], self.slot_base_of[table + 1]
            ids, held = self.resident(table)
            seen += ids.numel()
            taken = held[:0] if away is None else away[table]
            every = torch.cat([held, self._free[table].all(), taken]).sort().values
            wanted = torch.arange(1, slots + 1, device=_CPU)
            pins, owners = self._pins[first:last], self._owners[first:last]
            _require(torch.equal(every, wanted), table, "each slot is held, free or taken out, exactly once")
            _require(torch.equal(self.slots_of(table, ids), held), table, "the slot map and the owners agree")
            _require(not bool((pins < 0).any()), table, "no pin count is negative")
            _require(not bool(((pins > 0) & (owners == FREE)).any()), table, "only rows in slots are pinned")
            _require(not bool((self._dirty[first:last] & (owners == FREE)).any()), table, "no empty slot is dirty")
            _require(int(owners[0]) == FREE and int(pins[0]) == 0, table, "slot 0 is never used")
        if present.numel() != seen:
            raise RuntimeError(f"cache invariant broken: the slot map has {present.numel()} entries for {seen} rows")

    @property
    def pinned_slots(self) -> int:
        """How many slots batches in flight hold."""
        return int((self._pins > 0).sum())


def _require(holds: bool, table: int, what: str) -> None:
    if not holds:
        raise RuntimeError(f"cache invariant broken in table {table}: {what}")


__all__ = ["FREE", "Reservation", "SlotCache"]
