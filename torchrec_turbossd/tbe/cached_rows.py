"""Rows of tables on SSD brought into slots for a batch on the CPU, where the host keeps account of the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.cache.policies import DEFAULT_POLICY
from torchrec_turbossd.cache.slot_cache import Reservation, SlotCache
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.layout import Batch, Bounds
from torchrec_turbossd.tbe.slot_memory import SlotMemory
from torchrec_turbossd.tbe.table_rows import Fetched, TableRows


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A batch whose absent rows are on their way.

    found: [N], each lookup's slot before, 0 for absent. here: pinned slots of the rows that were there; None when all
        were. chosen: for each table, slots for its absent rows; empty when there are none.
    """

    batch: Batch
    found: Tensor
    here: Tensor | None = None
    chosen: tuple[Reservation, ...] = ()

    def tensors(self) -> Sequence[Tensor | None]:
        return self.found, self.here, self.batch.positions

    def misses(self, tables: int) -> list[int]:
        """Absent rows of each table."""
        return [each.ids.numel() for each in self.chosen] or [0] * tables


class CachedRows(TableRows):
    """As `TableRows`; a chosen slot is not marked as such until `settle`."""

    def __init__(
        self,
        shards: Sequence[TableShard],
        slots: Sequence[int],
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: RowStore,
        *,
        policy: str = DEFAULT_POLICY,
        bounds: Bounds = Bounds.RAISE,
    ) -> None:
        self.cache = SlotCache([s.rows for s in shards], slots, policy=policy)
        super().__init__(shards, feature_table, memory, store, self.cache, bounds)

    def place(self, indices: Tensor, offsets: Tensor) -> Batch:
        return self.layout.place(indices, offsets)

    def count(self, arrival: Arrival) -> None:
        """Count the lookups of a batch that is used."""
        tables = len(self.shards)
        self.counters.add(arrival.batch.lookups(tables), arrival.misses(tables))
        self.recorder.add(arrival.batch)

    def choose(self, batch: Batch, *, train: bool = True) -> Arrival:
        """The first third of a `fetch`: which rows are absent, and which slots they will have.

        Until `settle` or `abandon` nothing but `release` may come in between: a chosen slot is not marked as such.
        Raises `CacheFullError` when the rows do not fit; then nothing has changed.
        """
        with self.lock:
            found = self.cache.lookup(batch.positions)
            if not found.numel() or int(found.amin()):
                return Arrival(batch=batch, found=found)
            here = self._concatenated(batch, found.to(torch.int64))[found > 0]
            absent = self._by_table(torch.unique(batch.positions[found == 0]))
            # The batch's own rows must not make room for each other.
            self.cache.pin(here, 1)
            try:
                # All tables have room before the first of them changes.
                chosen = tuple(self.cache.reserve(table, ids) for table, ids in enumerate(absent))
            except BaseException:
                self.cache.pin(here, -1)
                raise
        return Arrival(batch=batch, found=found, here=here, chosen=chosen)

    def bring(self, arrival: Arrival) -> None:
        """The second third, which may run in a thread of its own: read the rows and put them into their slots.

        When it raises, some tables may have their rows already; the batch has to be `abandon`ed.
        """
        wanted = [each for each in arrival.chosen if each.ids.numel()]
        asked = [(each.table, each.ids) for each in wanted]
        for reservation, rows in zip(wanted, self._read_all(asked) if asked else [], strict=True):
            self._exchange(reservation, rows)

    def settle(self, arrival: Arrival, *, pin: bool) -> Fetched:
        """The last third: the slots of the whole batch, pinned or not."""
        batch, placed = arrival.batch, arrival.found
        with self.lock:
            if arrival.chosen:
                placed = self.cache.lookup(batch.positions)
            # A row that this batch brings in was not read before: policies tell apart what is read again.
            for run in batch.runs:
                self.cache.touch(run.table, arrival.found[run.start : run.stop])
            slots = placed.to(torch.int64)
            at = self._concatenated(batch, slots) if pin else None
            if at is not None:
                self.cache.pin(at, 1)
            self.abandon(arrival)
        return Fetched(slots=slots, hold=at)

    def abandon(self, arrival: Arrival) -> None:
        """Give up what `choose` held."""
        if arrival.here is not None:
            with self.lock:
                self.cache.pin(arrival.here, -1)

    def _concatenated(self, batch: Batch, slots: Tensor) -> Tensor:
        at = slots.clone()
        for run in batch.runs:
            at[run.start : run.stop] += self.cache.slot_base_of[run.table]
        return at

    def _unpin(self, fetched: Fetched, *, dirty: bool) -> None:
        if dirty:
            self.cache.mark_dirty(fetched.hold)
        self.cache.pin(fetched.hold, -1)

    def _forget(self) -> None:
        for table in range(len(self.shards)):
            self.cache.drop(table, self.cache.resident(table)[0])

    def _exchange(self, reservation: Reservation, rows: Tensor) -> None:
        """Write back what leaves, fill what comes, and only then let the slot map say so."""
        leaving = reservation.dirty
        if bool(leaving.any()):
            table = reservation.table
            out = self.memory.read(table, reservation.evicted_slots[leaving])
            self.store.write(self._keyed(table, reservation.evicted_ids[leaving], out))
        self.memory.write(reservation.table, reservation.slots, rows)
        with self.lock:
            self.cache.commit(reservation)


__all__ = ["Arrival", "CachedRows"]
