"""Batches that are held: rows that stay in their slots of a device, however many batches come after them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.device_ops import DeviceOps
from torchrec_turbossd.cache.device_state import Batch, DeviceState
from torchrec_turbossd.cache.device_tiers import TieredSlots
from torchrec_turbossd.cache.slot_map import SlotMap, SparseSlotMap


class HeldSlots(TieredSlots):
    """As `TieredSlots`, with batches that are held."""

    def __init__(self, state: DeviceState, ops: DeviceOps, slot_map: SlotMap | SparseSlotMap) -> None:
        super().__init__(state, ops, slot_map)
        self._hold_none()

    def _hold_none(self) -> None:
        self._held: list[tuple[Batch, NDArray[np.int64]]] = []
        self._aside: list[tuple[int, Tensor]] = []
        """Slots that rows have left which batches are held with."""

    @property
    def held_lookups(self) -> NDArray[np.int64]:
        """Lookups of each table in batches that are held: no fewer than the slots that these hold."""
        return sum((lookups for _, lookups in self._held), np.zeros(len(self.rows), dtype=np.int64))

    def hold_rows(self, batch: Batch, lookups: NDArray[np.int64]) -> None:
        """Keep the rows of a batch, all of which are in slots, there until `let_go`. Unlike `pin` it keeps no others.

        Args:
            lookups: of each table.
        """
        self._held.append((batch, lookups))
        self.ops.restamp(batch, entries.HELD)

    def let_go(self, batch: Batch) -> None:
        """The rows of a batch that is held may leave."""
        self._held = [(each, lookups) for each, lookups in self._held if each is not batch]
        self.ops.restamp(batch, self._now)
        self._hold_all()
        if not self._held:
            for table, slots in self._aside:
                self.give(table, slots)
            self._aside = []

    def remove(self, table: int, ids: Tensor) -> Tensor:
        """As `DeviceSlots.remove`. Slots that batches are held with are nobody's until none is, and these spoilt."""
        slots = self.slots_of(table, ids)
        held = self._stamps(self.state.state[self._at(table, slots)]) == entries.HELD
        super().remove(table, ids)
        if bool(held.any()):
            self._aside.append((table, slots[held]))
            for batch, _ in self._held:
                batch.spoilt = True
        return slots[~held]

    def _hold_all(self) -> None:
        """Rows of batches that are held may be others' too, which were given other numbers."""
        for batch, _ in self._held:
            self.ops.restamp(batch, entries.HELD)


__all__ = ["HeldSlots"]
