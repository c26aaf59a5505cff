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

    def get(self, ids: Tensor) -> Tensor:
        """Slots of `ids` [N] int64: [N] int32, 0 for absent."""
        return self._slots.index_select(0, ids)

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
        return self._slots.numel() * SLOT_MAP_BYTES_PER_ROW


__all__ = ["SLOT_MAP_BYTES_PER_ROW", "SlotMap"]
