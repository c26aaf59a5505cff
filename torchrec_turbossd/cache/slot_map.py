"""The map from row id to slot: one dense int32 tensor, 0 for absent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SLOT_MAP_BYTES_PER_ROW = 4


class SlotMap:
    """Slots of `rows` concatenated row ids; 4 bytes a row, untouched pages cost nothing on the CPU.

    Batches only (get, set, clear), so that a hash map can stand in where rows far exceed slots.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        if device.type == "cpu":
            # numpy's zeros are calloc: no page of a billion-row map is touched before its ids are.
            self._slots = torch.from_numpy(np.zeros(rows, dtype=np.int32))
        else:
            self._slots = torch.zeros(rows, dtype=torch.int32, device=device)

    @property
    def entries(self) -> Tensor:
        """The map itself: [rows] int32, on its device."""
        return self._slots

    def get(self, ids: Tensor) -> Tensor:
        """Slots of `ids` [N] int64: [N] int32, 0 for absent."""
        return self._slots.index_select(0, ids)

    def get_from(self, base: int, rows: int, ids: Tensor) -> Tensor:
        """Slots of `ids` [N] int64 counted from `base`: [N] int32; `IndexError` unless all are in bounds."""
        return self._slots.narrow(0, base, rows).index_select(0, ids)

    def set(self, ids: Tensor, slots: Tensor) -> None:
        """Give `ids` [N] their `slots` [N]; ids must not repeat."""
        self._slots.index_copy_(0, ids, slots.to(torch.int32))

    def clear(self, ids: Tensor) -> None:
        """Make `ids` [N] absent."""
        self._slots.index_fill_(0, ids, 0)

    def present(self) -> Tensor:
        """All ids that have a slot, ascending; reads the whole map."""
        return torch.nonzero(self._slots).flatten()

    @property
    def nbytes(self) -> int:
        """Bytes that the map takes when every page is touched."""
        return self._slots.numel() * self._slots.element_size()


class SparseSlotMap:
    """The same by sorted ids, a few bytes for each present one: for a map that is written in large batches."""

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.empty(0, dtype=torch.int64, device=device)
        self._slots = torch.empty(0, dtype=torch.int32, device=device)

    def get(self, ids: Tensor) -> Tensor:
        if not self._ids.numel():
            return torch.zeros(ids.shape, dtype=torch.int32, device=ids.device)
        at = torch.searchsorted(self._ids, ids).clamp_(max=self._ids.numel() - 1)
        return torch.where(self._ids[at] == ids, self._slots[at], 0)

    def set(self, ids: Tensor, slots: Tensor) -> None:
        self.clear(ids)
        merged, order = torch.cat([self._ids, ids]).sort()
        self._ids, self._slots = merged, torch.cat([self._slots, slots.to(torch.int32)])[order]

    def clear(self, ids: Tensor) -> None:
        kept = ~torch.isin(self._ids, ids)
        self._ids, self._slots = self._ids[kept], self._slots[kept]

    def present(self) -> Tensor:
        return self._ids[self._slots != 0]

    @property
    def nbytes(self) -> int:
        return self._ids.numel() * 12


__all__ = ["SLOT_MAP_BYTES_PER_ROW", "SlotMap", "SparseSlotMap"]
