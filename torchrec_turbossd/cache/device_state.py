"""The tensors of a device-resident cache, all tables in one: what kernels read and write, and where rows are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.dram_tier import DramTier


class DeviceState:
    """Slot map, owners, states and queues of the slots of several tables, and where their rows are.

    Args:
        rows, slots: of each table; slot 0 comes on top.
        parts: for each table, the parts of a row in slots, in the order of its bytes: [slots + 1, bytes] uint8 views.
        tier: rows in host memory.
        feature_table: for each feature, its table.
        slot_map: [rows of all tables] int32, all 0; where it is the rest will be.
    """

    def __init__(
        self,
        rows: Sequence[int],
        slots: Sequence[int],
        parts: Sequence[Sequence[Tensor]],
        tier: DramTier,
        feature_table: Sequence[int],
        slot_map: Tensor,
    ) -> None:
        self.device, self.tier, self.slot_map = slot_map.device, tier, slot_map
        device = self.device
        self.rows, self.slots, self.feature_table = list(rows), list(slots), list(feature_table)
        self.parts = [list(each) for each in parts]
        self.base_of: list[int] = np.concatenate(([0], np.cumsum(rows, dtype=np.int64))).tolist()
        self.slot_base_of: list[int] = np.concatenate(([0], np.cumsum([n + 1 for n in slots], dtype=np.int64))).tolist()
        self.reset_slots()
        self.tables = self._described().to(device)
        self.word_bytes = self._word()
        self.part_fields = self._parts_described().to(device)
        self.features = torch.tensor(self.feature_table, dtype=torch.int32, device=device)
        by_table = [[f for f, t in enumerate(feature_table) if t == table] for table in range(len(rows))]
        first = np.concatenate(([0], np.cumsum([len(each) for each in by_table])))
        self.feature_first = torch.tensor(first, dtype=torch.int32, device=device)
        self.feature_list = torch.tensor([f for each in by_table for f in each], dtype=torch.int32, device=device)

    def reset_slots(self) -> None:
        """Every slot is empty and in no queue; the slot map is left alone."""
        total, device = self.slot_base_of[-1], self.device
        self.owners = torch.full((total,), entries.FREE, dtype=torch.int64, device=device)
        self.state = torch.zeros(total, dtype=torch.int32, device=device)
        self.ghosts = torch.zeros(total, dtype=torch.int16, device=device)
        self.rings = torch.zeros(sum(small_places(n) + n for n in self.slots), dtype=torch.int32, device=device)
        self.queues = torch.zeros(len(self.slots), entries.QUEUE_FIELDS, dtype=torch.int32, device=device)

    def beside(self) -> DeviceState:
        """The same slots, all empty, for another slot map."""
        other = DeviceState.__new__(DeviceState)
        other.__dict__.update(self.__dict__)
        other.slot_map = self.slot_map[:0]
        other.reset_slots()
        return other

    def _described(self) -> Tensor:
        described = torch.zeros(len(self.rows), entries.FIELDS, dtype=torch.int64)
        ring = 0
        for table, (rows, slots) in enumerate(zip(self.rows, self.slots, strict=True)):
            small, rank = small_places(slots), self.tier.tables[table]
            described[table] = torch.tensor(
                [
                    self.base_of[table],
                    rows,
                    self.slot_base_of[table],
                    slots,
                    ring,
                    small,
                    ring + small,
                    rank.data_ptr(),
                    rank.shape[1],
                    self.tier.header_at[table],
                    self.tier.keeps[table],
                ]
            )
            ring += small + slots
        return described

    def _word(self) -> int:
        """The widest word, in bytes, of which every part, offset and stride is a multiple."""
        sizes = [size for table in self.parts for part in table for size in (part.shape[1], part.stride(0))]
        return math.gcd(8, *sizes)

    def _parts_described(self) -> Tensor:
        most = max(len(each) for each in self.parts)
        described = torch.zeros(len(self.parts), most, entries.PART_FIELDS, dtype=torch.int64)
        for table, parts in enumerate(self.parts):
            offset = 0
            for place, part in enumerate(parts):
                described[table, place] = torch.tensor(
                    [part.data_ptr(), part.stride(0), part.shape[1] // self.word_bytes, offset // self.word_bytes]
                )
                offset += part.shape[1]
        return described

    @property
    def nbytes(self) -> int:
        """Bytes on the device of the bookkeeping beside each slot."""
        each = (self.owners, self.state, self.ghosts, self.rings, self.queues)
        return sum(tensor.nbytes for tensor in each)


def small_places(slots: int) -> int:
    """Places of the small queue of a table."""
    return max(1, slots // entries.SMALL_MOST)


@dataclass
class Batch:
    """A batch whose ids became slots.

    Args:
        ids, offsets: [N] and [features * bags + 1] int32 or int64, contiguous.
        safe: as `offsets`, int32 or int64: written, the same; all 0 where those do not rise from 0 to N.
        slots: [N] int32 or int64, written: each lookup's slot, 0 for none yet.
        mark: the batch will change its rows. touch: its slots count as used, which nobody asks where none is emptied.
        stamp: the batch's number.
        ahead: what brings its rows in was launched before it was known which they are.
        spoilt: it is held, and a row that it may have has left its slot.
    """

    ids: Tensor
    offsets: Tensor
    bags: int
    safe: Tensor
    slots: Tensor
    stamp: int
    mark: bool
    touch: bool
    ahead: bool = False
    spoilt: bool = False


__all__ = ["Batch", "DeviceState", "small_places"]
