"""Rows of tables on SSD brought into slots for a batch, and back: what training and serving share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from torchrec_turbossd.cache.policies import DEFAULT_POLICY
from torchrec_turbossd.cache.slot_cache import Reservation, SlotCache
from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.metrics import ReadCounters
from torchrec_turbossd.rows import initial_rows
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.layout import Batch, Bounds, Layout
from torchrec_turbossd.tbe.recording import AccessRecorder
from torchrec_turbossd.tbe.slot_memory import SlotMemory

_FLUSH_ROWS = 65536
_LOADERS = 4
"""Tables whose rows are read at once."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A batch whose rows are all in slots.

    slots: [N] int64, the TBE's row ids. at: [N] int64, the same in the cache's concatenated numbering; None when the
        batch is not pinned.
    """

    slots: Tensor
    at: Tensor | None


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

    def misses(self, tables: int) -> list[int]:
        """Absent rows of each table."""
        return [each.ids.numel() for each in self.chosen] or [0] * tables


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """The distinct rows of a batch, outside the slots.

    ids: for each table, its distinct local ids. rows: for each table, their bytes [M_t, row_bytes] on the CPU. slots:
    [N] int64, each lookup's place among its table's ids, counted from 1. changes: how often rows had changed by then.
    """

    ids: list[Tensor]
    rows: list[Tensor]
    slots: Tensor
    changes: int = 0


class CachedRows:
    """The slots of a TBE in front of a row store.

    Every method takes `lock`, which is public so that a caller can make several calls one step.

    Args:
        shards: the local tables, in the TBE's order.
        slots: usable slots of each (slot 0 comes on top).
        feature_table: for each feature, its table.
        memory: the TBE's slots.
        store: where rows live; read and written by `TableShard.key` and global row id.
    """

    def __init__(
        self,
        shards: Sequence[TableShard],
        slots: Sequence[int],
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: RowStore,
        *,
        device: torch.device,
        policy: str = DEFAULT_POLICY,
        bounds: Bounds = Bounds.RAISE,
    ) -> None:
        self.shards, self.memory, self.store = list(shards), memory, store
        self.cache = SlotCache([s.rows for s in shards], slots, device=device, policy=policy)
        names = [s.table.name for s in shards]
        self.layout = Layout(
            names,
            [s.rows for s in shards],
            feature_table,
            self.cache.bases,
            bounds,
            table_rows=[s.table.rows for s in shards],
        )
        self.counters = ReadCounters(names)
        self.recorder = AccessRecorder(self.shards, self.cache.base_of)
        self.lock = threading.RLock()
        self.outside = 0
        """Batches in flight that run outside the slots; the caller's to count."""
        self._changes = 0
        """Rises whenever a row changes."""
        self._loaders: ThreadPoolExecutor | None = None

    def fetch(self, batch: Batch, *, pin: bool) -> Fetched:
        """Bring all rows of a batch into slots; with `pin` they stay until `release`, else while `lock` is held.

        Raises `CacheFullError` when they do not fit; the batch can then run on `take_out`.
        """
        with self.lock:
            arrival = self.choose(batch)
            try:
                self.bring(arrival)
            except BaseException:
                self.abandon(arrival)
                raise
            self.count(arrival)
            return self.settle(arrival, pin=pin)

    def count(self, arrival: Arrival) -> None:
        """Count the lookups of a batch that is used."""
        tables = len(self.shards)
        self.counters.add(arrival.batch.lookups(tables), arrival.misses(tables))
        self.recorder.add(arrival.batch)

    def choose(self, batch: Batch) -> Arrival:
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
        for reservation, rows in zip(wanted, self._load_all(wanted), strict=True):
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
        return Fetched(slots=slots, at=at)

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

    def release(self, fetched: Fetched, *, dirty: bool) -> None:
        """Give up the pins of a fetched batch; `dirty` when its rows have changed."""
        with self.lock:
            if fetched.at is None:
                return
            if dirty:
                self._changes += 1
                self.cache.mark_dirty(fetched.at)
            self.cache.pin(fetched.at, -1)

    def _by_table(self, positions: Tensor) -> list[Tensor]:
        """Ascending positions split into local ids of each table."""
        cuts = torch.searchsorted(positions, self.cache.bases).tolist()
        return [positions[cuts[t] : cuts[t + 1]] - self.cache.base_of[t] for t in range(len(self.shards))]

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

    def _keyed(self, table: int, ids: Tensor, rows: Tensor) -> dict[str, Rows]:
        shard = self.shards[table]
        return {shard.key: (ids.cpu() + shard.row_offset, rows)}

    def _load_all(self, wanted: Sequence[Reservation]) -> list[Tensor]:
        """Bytes of the absent rows of several tables, read side by side."""
        asked = [(self.shards[each.table], each.ids.cpu()) for each in wanted]
        if len(asked) == 1:
            return [stored_rows(self.store, *asked[0])]
        if self._loaders is None:
            self._loaders = ThreadPoolExecutor(min(len(self.shards), _LOADERS), thread_name_prefix="turbossd-load")
        tasks = [self._loaders.submit(stored_rows, self.store, shard, ids) for shard, ids in asked]
        # All of them end before any failure is told, so that closing finds no read in flight.
        wait(tasks)
        return [task.result() for task in tasks]

    def _load(self, table: int, ids: Tensor) -> Tensor:
        """Bytes of absent rows."""
        return stored_rows(self.store, self.shards[table], ids.cpu())

    def read_rows(self, table: int, ids: Tensor) -> Tensor:
        """Current bytes of local `ids` [N] of a table, wherever they are: [N, row_bytes] uint8 on the CPU."""
        with self.lock:
            ids = ids.to(self.cache.device)
            slots = self.cache.slots_of(table, ids)
            here = slots > 0
            rows = torch.empty(ids.numel(), self.shards[table].row_bytes, dtype=torch.uint8)
            resident = here.cpu()
            rows[resident] = self.memory.read(table, slots[here])
            rows[~resident] = self._load(table, ids[~here])
        return rows

    def write_rows(self, table: int, ids: Tensor, rows: Tensor) -> None:
        """Set the bytes of distinct local `ids` [N]: in their slots where they are there, else in the store."""
        self._write_all([(table, ids, rows)])

    def _write_all(self, parts: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """`write_rows` of several tables; what fails has changed none of them."""
        with self.lock:
            absent: dict[str, Rows] = {}
            present = []
            for table, ids, rows in parts:
                ids = ids.to(self.cache.device)
                slots = self.cache.slots_of(table, ids)
                here = slots > 0
                resident = here.cpu()
                if not bool(resident.all()):
                    absent.update(self._keyed(table, ids[~here], rows[~resident]))
                present.append((table, slots[here], rows[resident]))
            if absent:
                self.store.write(absent)
            self._changes += 1
            for table, slots, rows in present:
                self.memory.write(table, slots, rows)
                self.cache.mark_dirty(slots + self.cache.slot_base_of[table])

    def take_out(self, batch: Batch) -> Distinct:
        """Copies of the distinct rows of a batch, for a run outside the slots."""
        with self.lock:
            positions, places = torch.unique(batch.positions, return_inverse=True)
            ids = self._by_table(positions)
            starts = [0, *accumulate(each.numel() for each in ids)]
            slots = places + 1
            for run in batch.runs:
                slots[run.start : run.stop] -= starts[run.table]
            absent = [int((self.cache.slots_of(t, each) == 0).sum()) for t, each in enumerate(ids)]
            rows = [self.read_rows(table, each) for table, each in enumerate(ids)]
            self.counters.add(batch.lookups(len(self.shards)), absent)
            self.recorder.add(batch)
            return Distinct(ids=ids, rows=rows, slots=slots, changes=self._changes)

    def refresh(self, distinct: Distinct, memory: SlotMemory) -> None:
        """Bring the copies in `memory` up to date, where rows have changed since `take_out`."""
        with self.lock:
            if distinct.changes == self._changes:
                return
            for table, ids in enumerate(distinct.ids):
                places = torch.arange(1, ids.numel() + 1, device=self.cache.device)
                memory.write(table, places, self.read_rows(table, ids))

    def put_back(self, distinct: Distinct, memory: SlotMemory) -> None:
        """The rows are what the copies in `memory` have become, which were up to date before."""
        places = [torch.arange(1, ids.numel() + 1, device=self.cache.device) for ids in distinct.ids]
        self._write_all(
            [(table, ids, memory.read(table, places[table])) for table, ids in enumerate(distinct.ids) if ids.numel()]
        )

    def _write_back(self, table: int, ids: Tensor) -> None:
        """Write the dirty ones of present rows to the store."""
        for part in torch.split(ids, _FLUSH_ROWS):
            slots = self.cache.slots_of(table, part)
            dirty = self.cache.is_dirty(table, slots)
            if bool(dirty.any()):
                self.store.write(self._keyed(table, part[dirty], self.memory.read(table, slots[dirty])))
                self.cache.clean(table, slots)

    def check_idle(self) -> None:
        """Raise `CacheFullError` when a batch in flight holds rows."""
        with self.lock:
            held = self.cache.pinned_slots
        if held or self.outside:
            raise CacheFullError(
                f"batches in flight hold {held} slots, and {self.outside} more run outside them; run their backward, "
                "or drop their output, first"
            )

    def forget(self) -> None:
        """Empty every slot; what was not written back is lost."""
        with self.lock:
            self.check_idle()
            self._changes += 1
            for table in range(len(self.shards)):
                self.cache.drop(table, self.cache.resident(table)[0])

    def flush(self) -> None:
        """Write every dirty row to the store and make the store durable."""
        with self.lock:
            for table in range(len(self.shards)):
                self._write_back(table, self.cache.dirty(table)[0])
            self.store.flush()

    def close(self) -> None:
        """End the threads that read."""
        if self._loaders is not None:
            self._loaders.shutdown()
            self._loaders = None

    @property
    def nbytes(self) -> int:
        """Bytes of fast memory: slots (with the reserved one of each table), slot map and bookkeeping."""
        held = sum((n + 1) * s.row_bytes for n, s in zip(self.cache.slots, self.shards, strict=True))
        return held + self.cache.nbytes


class ReadableStore(Protocol):
    """The part of a row store that reading needs."""

    def read(self, table: str, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `ids`: (rows, found)."""


def stored_rows(store: ReadableStore, shard: TableShard, ids: Tensor) -> Tensor:
    """Rows of local `ids` [N] int64 of a shard: the store's, or the rule's where none was ever written."""
    row_ids = ids + shard.row_offset
    rows, found = store.read(shard.key, row_ids)
    if not bool(found.all()):
        rows[~found] = initial_rows(shard, row_ids[~found])
    return rows


__all__ = ["Arrival", "CachedRows", "Distinct", "Fetched", "ReadableStore", "stored_rows"]
