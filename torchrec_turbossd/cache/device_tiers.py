"""The slots of several tables on a device, and the DRAM tier behind them: what moves between, a table at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.device_ops import DeviceOps
from torchrec_turbossd.cache.device_reference import TorchOps
from torchrec_turbossd.cache.device_slots import DeviceSlots
from torchrec_turbossd.cache.device_state import DeviceState
from torchrec_turbossd.cache.free_slots import FreeSlots
from torchrec_turbossd.cache.slot_map import SlotMap, SparseSlotMap

WriteBack = Callable[[int, Tensor, Tensor], None]
"""Called with a table, local ids [N] int64 and rows [N, row_bytes] uint8, on the CPU, that leave for the row store."""

Own = TypeVar("Own", bound="TieredSlots")


class TieredSlots(DeviceSlots):
    """As `DeviceSlots`; rows that are in no slot may be in the DRAM tier, which the state holds."""

    def __init__(self, state: DeviceState, ops: DeviceOps, slot_map: SlotMap | SparseSlotMap) -> None:
        super().__init__(state, ops, slot_map)
        self.tier = state.tier

    def put(self, table: int, ids: Tensor, rows: Tensor, write_back: WriteBack) -> int:
        """Put rows from the store into the DRAM tier: as many of the first as there are places; returns how many.

        Waits for the device. What leaves the tier and is not in the store is written back first; if that raises,
        nothing has changed.

        Args:
            ids: [N] int64, distinct, in no tier. rows: [N, row_bytes] uint8. Both on the CPU.
        """
        self.synchronize()
        places, gone, held = self.tier.make_room(table, ids)
        dirty = self.tier.is_dirty(table, held)
        if bool(dirty.any()):
            write_back(table, gone[dirty], self.tier.read(table, held[dirty]))
        count, base = places.numel(), self.base_of[table]
        entry = (places | entries.IN_DRAM).to(torch.int32).to(self.device)
        leave, come = (gone + base).to(self.device), (ids[:count] + base).to(self.device)
        self.map.clear(leave)
        self.tier.release(table, held)
        self.tier.admit(table, places, ids[:count], rows[:count])
        self.map.set(come, entry)
        return count

    def synchronize(self) -> None:
        """Wait until no kernel of the current stream uses the DRAM tier."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def in_dram(self, table: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of local `ids` [N] are in the DRAM tier, and where: ([N] bool, [M] int64), on the CPU; waits."""
        entry = self.entries_of(table, ids.to(self.device)).cpu()
        self.synchronize()
        there = entry < 0
        return there, (entry[there] & entries.PLACE).to(torch.int64)

    def mark_in_dram(self, table: int, ids: Tensor, places: Tensor, *, dirty: bool) -> None:
        """Rows of local `ids` [N] at `places` [N] of the DRAM tier differ from the store's, or do not. On the CPU."""
        self.tier.mark(table, places, dirty=dirty)
        entry = (places | entries.IN_DRAM | (entries.DIRTY_IN_DRAM if dirty else 0)).to(torch.int32)
        self.map.set((ids + self.base_of[table]).to(self.device), entry.to(self.device))

    def forget(self) -> None:
        """Every row is absent; no batch is in flight."""
        self.synchronize()
        self.state.slot_map.zero_()
        self.state.reset_slots()
        self.ops.locate()
        self.tier.clear()
        self._free = [FreeSlots(1, n, self.device) for n in self.slots]
        self.own = list(self.slots)

    def beside(self: Own) -> Own:
        """An empty cache of the same tables over the same slots, which has none of them: for `give` and `replace`."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.state = self.state.beside()
        other.ops = TorchOps(other.state)
        # A second dense map would be allocated whole.
        other.map = SparseSlotMap(self.device)
        other._free = [FreeSlots(n + 1, n, self.device) for n in self.slots]
        other._active, other.own = [], [0] * len(self.slots)
        return other

    def replace(self, other: TieredSlots) -> None:
        """Take the place of a cache that this one was made `beside`: the slot map is its now, the DRAM tier empty."""
        if isinstance(self.map, SlotMap) or isinstance(other.map, SparseSlotMap):
            return
        self.synchronize()
        self.tier.clear()
        theirs = [self._placed(other, table) for table in range(len(self.slots))]
        ours = [self._placed(self, table) for table in range(len(self.slots))]
        dense, sparse = other.map, SparseSlotMap(self.device)
        other.state.slot_map.zero_()
        for ids, slots in theirs:
            sparse.set(ids, slots)
        for ids, slots in ours:
            dense.set(ids, slots)
        self.map, other.map = dense, sparse
        self.state.slot_map = other.state.slot_map
        self.ops, other.ops = other.ops, self.ops
        self.ops.state, other.ops.state = self.state, other.state
        self.ops.locate()
        self._now = max(self._now, other._now)

    @staticmethod
    def _placed(cache: DeviceSlots, table: int) -> tuple[Tensor, Tensor]:
        ids, slots = cache.resident(table)
        return ids + cache.base_of[table], slots

    def check(self, away: Sequence[Tensor] | None = None) -> None:
        """`DeviceSlots.check`, and that the slot map and the DRAM tier agree."""
        super().check(away)
        self.synchronize()
        count = 0
        for table in range(len(self.rows)):
            ids, places = self.tier.resident(table)
            there, at = self.in_dram(table, ids)
            count += at.numel()
            if self.tier.copies(table):
                slots = self.slots_of(table, ids[~there].to(self.device))
                copied = bool((slots > 0).all()) and not bool(self.is_dirty(table, slots).any())
                if not copied or not torch.equal(ids, places):
                    raise RuntimeError(f"cache invariant broken in table {table}: copies are where rows belong")
                places = places[there]
            if not torch.equal(at, places):
                raise RuntimeError(f"cache invariant broken in table {table}: the slot map and the DRAM tier agree")
        if isinstance(self.map, SlotMap) and int((self.state.slot_map < 0).sum()) != count:
            raise RuntimeError("cache invariant broken: each entry of the DRAM tier belongs to a row in it")


__all__ = ["TieredSlots", "WriteBack"]
