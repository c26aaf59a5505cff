"""Slots of several tables on a device, one batch of one table at a time: what is rare, and may wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.device_ops import DeviceOps
from torchrec_turbossd.cache.device_queues import drop_slots, heat, queued
from torchrec_turbossd.cache.device_state import Batch, DeviceState
from torchrec_turbossd.cache.free_slots import FreeSlots
from torchrec_turbossd.cache.slot_map import SlotMap, SparseSlotMap


class Pin:
    """What holds the rows of a batch in their slots: its own, and those of every batch since."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.stamp = batch, batch.stamp


class DeviceSlots:
    """As `SlotCache`, whose words apply: ids local to a table, slots taken out and given back, slot 0 reserved.

    Args:
        state: the tensors. ops: what works on whole batches.
    """

    def __init__(self, state: DeviceState, ops: DeviceOps, slot_map: SlotMap | SparseSlotMap) -> None:
        self.state, self.ops, self.map = state, ops, slot_map
        self.rows, self.slots, self.device = state.rows, state.slots, state.device
        self.base_of, self.slot_base_of = state.base_of, state.slot_base_of
        self.bases = torch.tensor(state.base_of, dtype=torch.int64, device=state.device)
        self._free = [FreeSlots(1, n, self.device) for n in self.slots]
        self.own = list(self.slots)
        """Slots of each table that are held or free here: all but those that are taken out."""
        self._active: list[Pin] = []
        self._now = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device of the slot map and of the bookkeeping beside each slot."""
        return self.map.nbytes + self.state.nbytes

    @property
    def oldest(self) -> int:
        """Slots that this batch or a later one used are held by batches in flight."""
        return min((pin.stamp for pin in self._active), default=self._now + 1)

    @property
    def pinned_slots(self) -> int:
        """How many slots batches in flight hold."""
        return int((self._stamps(self.state.state) >= self.oldest).sum()) if self._active else 0

    @staticmethod
    def _stamps(words: Tensor) -> Tensor:
        return words >> entries.STAMP_SHIFT

    def entries_of(self, table: int, ids: Tensor) -> Tensor:
        """Slot map entries of local `ids` [N] of a table: [N] int32."""
        return self.map.get(ids + self.base_of[table])

    def slots_of(self, table: int, ids: Tensor) -> Tensor:
        """Slots of local `ids` [N] of a table: [N] int64, 0 for a row that is in none."""
        return self.entries_of(table, ids).clamp(min=0).to(torch.int64)

    def _at(self, table: int, slots: Tensor) -> Tensor:
        return slots + self.slot_base_of[table]

    def free(self, table: int) -> int:
        """How many slots of a table are free."""
        return len(self._free[table])

    def take(self, table: int, count: int) -> Tensor:
        """Take up to `count` free slots out: [N] int64. They are nobody's until `admit` or `give`."""
        taken = self._free[table].take(count)
        self.own[table] -= taken.numel()
        if taken.device.type == "cuda":
            # Who gave them may have made them on another stream.
            taken.record_stream(torch.cuda.current_stream(taken.device))
        return taken

    def give(self, table: int, slots: Tensor) -> None:
        """Slots [N] int64 that were taken out, of this cache or of another, are free here."""
        self._free[table].give(slots)
        self.own[table] += slots.numel()

    def evict(self, table: int, count: int) -> Tensor:
        """Take up to `count` rows out of their slots, without regard to dirty marks; returns these, taken out."""
        slots = self.ops.empty(table, count, self.oldest)
        self._empty(table, slots)
        self.own[table] -= slots.numel()
        return slots

    def _empty(self, table: int, slots: Tensor) -> None:
        at = self._at(table, slots)
        owners = self.state.owners[at]
        self.map.clear(owners + self.base_of[table])
        if self.state.tier.copies(table) and isinstance(self.map, SlotMap):
            copied = owners[(self.state.state[at] & entries.DIRTY) == 0]
            self.map.set(copied + self.base_of[table], (copied | entries.IN_DRAM).to(torch.int32))
        self.state.owners[at] = entries.FREE
        self.state.state[at] = 0

    def admit(self, table: int, ids: Tensor, slots: Tensor) -> None:
        """Absent, distinct local `ids` [N], as the store has them, are in `slots` [N], which were taken out."""
        at = self._at(table, slots)
        self.map.set(ids + self.base_of[table], slots)
        self.state.owners[at] = ids
        self.state.state[at] = entries.DIRTY if self.state.tier.copies(table) else 0
        self.ops.enqueue(table, slots, ids)
        self.own[table] += slots.numel()

    def remove(self, table: int, ids: Tensor) -> Tensor:
        """Take distinct local `ids` [N] that are in slots and unpinned out of them; returns their slots, taken out."""
        slots = self.slots_of(table, ids)
        self._empty(table, slots)
        drop_slots(self.state, table, slots)
        self.own[table] -= slots.numel()
        return slots

    def release_all(self, table: int) -> Tensor:
        """Every slot that is this cache's own, taken out; rows in them are absent, whatever the slot map says.

        Those that batches in flight hold stay.
        """
        held = queued(self.state, table)
        held = held[self._stamps(self.state.state[self._at(table, held)]) < self.oldest]
        slots = torch.cat([held, self._free[table].all()])
        at = self._at(table, held)
        self.state.owners[at], self.state.state[at] = entries.FREE, 0
        drop_slots(self.state, table, held)
        self._free[table] = FreeSlots(1, 0, self.device)
        self.own[table] -= slots.numel()
        return slots

    def hottest(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, slots) of the rows of a table that are in slots, the last to be evicted first."""
        ids, slots = self.resident(table)
        order = heat(self.state, table)[slots].argsort(descending=True, stable=True)
        return ids[order], slots[order]

    def resident(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, slots) of all rows of a table that are in slots."""
        return self._where(table, self.state.owners != entries.FREE)

    def dirty(self, table: int) -> tuple[Tensor, Tensor]:
        """(ids, slots) of the rows of a table in slots that differ from the store's."""
        return self._where(table, (self.state.state & entries.DIRTY) > 0)

    def _where(self, table: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self.slot_base_of[table], self.slot_base_of[table + 1]
        slots = torch.nonzero(mask[first:last]).flatten()
        return self.state.owners[slots + first], slots

    def mark_dirty(self, at: Tensor) -> None:
        """The rows in concatenated slots `at` [N] (slot + slot base) differ from the store's."""
        self.state.state[at] |= entries.DIRTY

    def is_dirty(self, table: int, slots: Tensor) -> Tensor:
        """Which of `slots` [N] of a table hold rows that differ from the store's: [N] bool."""
        return (self.state.state[self._at(table, slots)] & entries.DIRTY) > 0

    def clean(self, table: int, slots: Tensor) -> None:
        """The rows in `slots` [N] of a table are as in the store; those of batches in flight are about to change."""
        at = self._at(table, slots)
        words = self.state.state[at]
        self.state.state[at] = torch.where(self._stamps(words) < self.oldest, words & ~entries.DIRTY, words)

    def check(self, away: Sequence[Tensor] | None = None) -> None:
        """Verify every invariant of the slots; raises `RuntimeError` that names the one broken. Reads all of it.

        Args:
            away: for each table, the slots that are taken out; None: none are.
        """
        seen = 0
        for table, slots in enumerate(self.slots):
            ids, held = self.resident(table)
            seen += ids.numel()
            taken = held[:0] if away is None else away[table]
            every = torch.cat([held, self._free[table].all(), taken]).sort().values
            wanted = torch.arange(1, slots + 1, device=self.device)
            first = self.slot_base_of[table]
            _require(torch.equal(every, wanted), table, "each slot is held, free or taken out, exactly once")
            _require(torch.equal(self.slots_of(table, ids), held), table, "the slot map and the owners agree")
            _require(torch.equal(queued(self.state, table).sort().values, held), table, "held slots are in one queue")
            _require(int(self.state.owners[first]) == entries.FREE, table, "slot 0 is never used")
            empty = self.state.owners[first + 1 : first + slots + 1] == entries.FREE
            words = self.state.state[first + 1 : first + slots + 1][empty]
            _require(not bool((words & entries.DIRTY).any()), table, "no empty slot is dirty")
        present = self.map.present()
        entry = self.map.get(present)
        _require(int((entry > 0).sum()) == seen, 0, "each slot map entry of a slot belongs to a row in one")
        _require(not bool(((entry & entries.CLAIMED) != 0).any()), 0, "no row is claimed between batches")


def _require(holds: bool, table: int, what: str) -> None:
    if not holds:
        raise RuntimeError(f"cache invariant broken in table {table}: {what}")


__all__ = ["DeviceSlots", "Pin"]
