"""Which rows are in which slots: slot map, owners, pins, dirty marks and free slots of a module's tables.

It moves no row: the caller copies bytes between a `reserve` and its `commit`. Slot 0 of each table is reserved and
never handed out, so that an absent id (map entry 0) points at memory that is safe to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.cache.clock import Clock
from torchrec_turbossd.cache.eviction import EvictionPolicy
from torchrec_turbossd.cache.lru import Lru
from torchrec_turbossd.cache.slot_map import SlotMap
from torchrec_turbossd.errors import CacheFullError, ConfigError

POLICIES: dict[str, type[EvictionPolicy]] = {"clock": Clock, "lru": Lru}
FREE = -1
BYTES_PER_SLOT = 14
"""Owner (8), pin count (4), dirty mark (1) and the default policy's mark (1)."""
_MOST_PENDING_TOUCHES = 1 << 20


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

    Not thread-safe: the owner holds a lock. Every tensor lives on `device`.

    Args:
        rows: rows of each table.
        slots: usable slots of each table, at least 1 (slot 0 comes on top).
        policy: "clock" or "lru".
    """

    def __init__(
        self, rows: Sequence[int], slots: Sequence[int], *, device: torch.device, policy: str = "clock"
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"no eviction policy {policy!r}; the policies are {', '.join(POLICIES)}")
        if len(rows) != len(slots) or any(n < 1 for n in (*rows, *slots)):
            raise ConfigError(f"each table needs rows >= 1 and slots >= 1, got rows {list(rows)}, slots {list(slots)}")
        self.rows, self.slots, self.device = list(rows), list(slots), device
        self.bases = torch.tensor([0, *rows], dtype=torch.int64).cumsum(0).to(device)
        self.slot_bases = torch.tensor([0, *[n + 1 for n in slots]], dtype=torch.int64).cumsum(0).to(device)
        self.base_of: list[int] = self.bases.tolist()
        self.slot_base_of: list[int] = self.slot_bases.tolist()
        total = self.slot_base_of[-1]
        self.map = SlotMap(self.base_of[-1], device)
        self._owners = torch.full((total,), FREE, dtype=torch.int64, device=device)
        self._pins = torch.zeros(total, dtype=torch.int32, device=device)
        self._dirty = torch.zeros(total, dtype=torch.bool, device=device)
        self._policies = [POLICIES[policy](n, device) for n in slots]
        self._unused = [1] * len(slots)
        self._freed: list[list[Tensor]] = [[] for _ in slots]
        self._touches: list[list[Tensor]] = [[] for _ in slots]
        self._pending_touches = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slot map and of the bookkeeping beside each slot."""
        return self.map.nbytes + self.slot_base_of[-1] * BYTES_PER_SLOT

    def lookup(self, positions: Tensor) -> Tensor:
        """Slots of slot map `positions` [N] (local id + base): [N] int32, 0 for absent."""
        return self.map.get(positions)

    def slots_of(self, table: int, ids: Tensor) -> Tensor:
        """Slots of local `ids` [N] of one table: [N] int64, 0 for absent."""
        return self.map.get(ids + self.base_of[table]).to(torch.int64)

    def touch(self, table: int, slots: Tensor) -> None:
        """These slots of a table were read; kept aside until a victim is needed, so that a hit costs nothing more."""
        self._touches[table].append(slots)
        self._pending_touches += slots.numel()
        if self._pending_touches > _MOST_PENDING_TOUCHES:
            for each in range(len(self._touches)):
                self._apply_touches(each)

    def _apply_touches(self, table: int) -> None:
        for slots in self._touches[table]:
            self._policies[table].touch(slots.to(torch.int64))
            self._pending_touches -= slots.numel()
        self._touches[table].clear()

    def reserve(self, table: int, ids: Tensor) -> Reservation:
        """Choose slots for absent, distinct local `ids` [N] int64.

        Raises `CacheFullError` when pinned slots leave too few; then nothing has changed.
        """
        count = ids.numel()
        if count > self.slots[table]:
            raise CacheFullError(f"{count} rows do not fit in {self.slots[table]} slots")
        free = self._peek_free(table, count)
        evicted = free[:0]
        short = count - free.numel()
        if short > 0:
            self._apply_touches(table)
            evicted = self._policies[table].victims(short, lambda slots: self._evictable(table, slots))
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

    def _evictable(self, table: int, slots: Tensor) -> Tensor:
        at = slots + self.slot_base_of[table]
        return (self._owners[at] != FREE) & (self._pins[at] == 0)

    def _peek_free(self, table: int, count: int) -> Tensor:
        """Up to `count` empty slots: freed ones first, then ones never used."""
        freed = torch.cat(self._freed[table])[:count] if self._freed[table] else None
        held = 0 if freed is None else freed.numel()
        first = self._unused[table]
        last = min(first + count - held, self.slots[table] + 1)
        unused = torch.arange(first, last, dtype=torch.int64, device=self.device)
        return unused if freed is None else torch.cat([freed, unused])

    def commit(self, reservation: Reservation) -> None:
        """Make a reservation true: evicted ids become absent, the new ids present, clean and unpinned."""
        table, base = reservation.table, self.base_of[reservation.table]
        free = reservation.slots.numel() - reservation.evicted_slots.numel()
        held = sum(f.numel() for f in self._freed[table])
        if held:
            rest = torch.cat(self._freed[table])[min(free, held) :]
            self._freed[table] = [rest] if rest.numel() else []
        self._unused[table] += max(free - held, 0)
        self.map.clear(reservation.evicted_ids + base)
        self.map.set(reservation.ids + base, reservation.slots)
        at = reservation.slots + self.slot_base_of[table]
        self._owners.index_copy_(0, at, reservation.ids)
        self._dirty.index_fill_(0, at, False)
        self._policies[table].admitted(reservation.slots)

    def drop(self, table: int, ids: Tensor) -> None:
        """Make distinct, present and unpinned local `ids` [N] absent, without regard to dirty marks."""
        slots = self.slots_of(table, ids)
        if slots.numel() == 0:
            return
        at = slots + self.slot_base_of[table]
        self.map.clear(ids + self.base_of[table])
        self._owners.index_fill_(0, at, FREE)
        self._dirty.index_fill_(0, at, False)
        self._freed[table].append(slots)

    def pin(self, at: Tensor, count: int) -> None:
        """Add `count` (negative: take away) to the pins of concatenated slots `at` [N] (slot + slot base)."""
        self._pins.index_add_(0, at, torch.full(at.shape, count, dtype=torch.int32, device=self.device))

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

    def check(self) -> None:
        """Verify every invariant; raises `RuntimeError` that names the one broken. Reads the whole slot map."""
        present = self.map.present()
        seen = 0
        for table, slots in enumerate(self.slots):
            first, last = self.slot_base_of[table], self.slot_base_of[table + 1]
            ids, held = self.resident(table)
            seen += ids.numel()
            freed = torch.cat([*self._freed[table], held[:0]])
            never = torch.arange(self._unused[table], slots + 1, device=self.device)
            every = torch.cat([held, freed, never]).sort().values
            wanted = torch.arange(1, slots + 1, device=self.device)
            pins, owners = self._pins[first:last], self._owners[first:last]
            _require(torch.equal(every, wanted), table, "each slot is held, freed or never used, exactly once")
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


__all__ = ["BYTES_PER_SLOT", "FREE", "POLICIES", "Reservation", "SlotCache"]
