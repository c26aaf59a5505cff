"""Rows of a serving TBE: what is the same wherever the account of slots is kept."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_turbossd.metrics import ReadCounters
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.in_flight import InFlight, in_small_steps
from torchrec_turbossd.tbe.layout import Batch, Bounds, Layout
from torchrec_turbossd.tbe.read_rows import ReadRows
from torchrec_turbossd.tbe.recording import AccessRecorder
from torchrec_turbossd.tbe.served import Served, SharedSlots, UpdatableStore
from torchrec_turbossd.tbe.slot_memory import SlotMemory
from torchrec_turbossd.tbe.stored import stored_rows
from torchrec_turbossd.tbe.table_rows import Distinct

_PATIENCE_S = 0.2


@dataclass(eq=False)
class Reader:
    """A batch that reads the store: when it began, what is served then, its rows, and how long it waits for slots."""

    epoch: int
    served: Served
    read: ReadRows
    patience: float


class ServedRows(ABC):
    """The slots of a serving TBE in front of a store, looked up by many threads and updated by one at a time.

    Args:
        shards: the tables, in the TBE's order.
        feature_table: for each feature, its table.
        memory: the TBE's slots.
        store: where rows live, by `TableShard.key` and global row id.
        cache: the account of the slots.

    Attributes:
        in_flight: with the lock that is held around what must be one step.
    """

    def __init__(
        self,
        shards: Sequence[TableShard],
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: UpdatableStore,
        cache: SharedSlots,
        bounds: Bounds = Bounds.RAISE,
    ) -> None:
        self.in_flight = InFlight()
        self.lock = self.in_flight.lock
        self.served = Served.first(store, list(shards), cache, self.in_flight)
        self.memory, self.device = memory, cache.device
        names = [s.table.name for s in shards]
        self.layout = Layout(names, [s.rows for s in shards], feature_table, cache.bases, bounds)
        self.counters = ReadCounters(names)
        self.recorder = AccessRecorder(shards, cache.base_of)
        self._turn = threading.Lock()

    @property
    def shards(self) -> list[TableShard]:
        """The tables, with the rules for rows never written of what is served."""
        return self.served.shards

    @property
    def store(self) -> UpdatableStore:
        return self.served.store

    @property
    def cache(self) -> Any:
        return self.served.cache

    @property
    def squeezed(self) -> bool:
        """Part of the slots is another version's, for now."""
        return self.served.capacity != self.cache.slots

    @property
    def nbytes(self) -> int:
        """Bytes of fast memory: slots (with the reserved one of each table), slot map and bookkeeping."""
        held = sum((n + 1) * self.memory.slot_bytes(table) for table, n in enumerate(self.cache.slots))
        return held + self.cache.nbytes

    @contextmanager
    def alone_on_stream(self) -> Iterator[None]:
        """`on_stream` for a caller without the lock; on a CPU nothing needs it."""
        yield

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """On CUDA, after what was done on slots before, and before what is done on them next, on any stream."""
        yield

    @abstractmethod
    def update(self, batch: Mapping[int, Rows]) -> None:
        """Set rows of tables (by place): all at once, or none if the store refuses.

        When it returns every later batch sees the new rows. Only one thread may update at a time.

        Args:
            batch: for each table (distinct local ids [N] int64, rows [N, row_bytes] uint8), on the CPU.
        """

    @abstractmethod
    def warm(self, table: int, ids: Tensor) -> None:
        """Bring rows in as long as there are free slots, without counting them as read.

        Args:
            ids: [N] int64, distinct local ids on the CPU, the hottest first.
        """

    def _begin_reading(self) -> Reader:
        read = ReadRows([s.row_bytes for s in self.shards])
        return Reader(self.in_flight.begin_read(), self.served, read, time.monotonic() + _PATIENCE_S)

    def _end_reading(self, reader: Reader) -> None:
        with self.lock:
            reader.served.claims.pop(reader, None)
            self.in_flight.end_read(reader.epoch)

    def _catch_up(self, reader: Reader) -> None:
        """Make what was read what a read at this moment would give."""
        if reader.served is not self.served:
            fresh = self._begin_reading()
            reader.served.claims.pop(reader, None)
            self.in_flight.end_read(reader.epoch)
            reader.epoch, reader.served, reader.read = fresh.epoch, fresh.served, fresh.read
        for update in self.in_flight.updates_since(reader.epoch):
            for table, (ids, rows) in update.items():
                reader.read.refresh(table, ids, rows)

    def _read(self, reader: Reader, unread: Sequence[Tensor]) -> None:
        """Read rows from the store, without the lock."""
        for table, ids in enumerate(unread):
            if ids.numel():
                reader.read.add(table, ids, stored_rows(reader.served.store, reader.served.shards[table], ids))

    def _by_table(self, positions: Tensor) -> list[Tensor]:
        """Ascending positions split into local ids of each table."""
        cuts = torch.searchsorted(positions, self.cache.bases).tolist()
        return [positions[cuts[t] : cuts[t + 1]] - self.cache.base_of[t] for t in range(len(self.shards))]

    def take_out(self, batch: Batch) -> Distinct:
        """The distinct rows of a batch at one moment, for a run outside the slots."""
        positions, places = torch.unique(batch.positions, return_inverse=True)
        ids = self._by_table(positions)
        rows, misses = self._rows_now(ids)
        self.counters.add(batch.lookups(len(self.shards)), misses)
        self.recorder.add(batch)
        slots, start = places + 1, 0
        for table, each in enumerate(ids):
            for run in batch.runs:
                if run.table == table:
                    slots[run.start : run.stop] -= start
            start += each.numel()
        return Distinct(ids=ids, rows=rows, slots=slots)

    def read_rows(self, table: int, ids: Tensor) -> Tensor:
        """Current bytes of local `ids` [N] of a table, wherever they are: [N, row_bytes] uint8 on the CPU."""
        distinct, places = torch.unique(ids.to(self.device), return_inverse=True)
        wanted = [distinct if t == table else distinct[:0] for t in range(len(self.shards))]
        return self._rows_now(wanted)[0][table][places.cpu()]

    def _rows_now(self, ids: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        """Rows of distinct ascending local ids by table, all of one moment, and how many were not in slots."""
        cpu_ids = [each.cpu() for each in ids]
        while True:
            with self.lock:
                slots = [self.cache.slots_of(table, each) for table, each in enumerate(ids)]
                reader, epoch = self._begin_reading(), self.in_flight.begin_lookup()
            try:
                misses = [int((each == 0).sum()) for each in slots]
                for table, each in enumerate(cpu_ids):
                    reader.read.add(table, each, self._collect(reader.served, table, each, slots[table]))
                with self.lock:
                    if reader.served is self.served:
                        self._catch_up(reader)
                        return [reader.read.rows(table, each) for table, each in enumerate(cpu_ids)], misses
            finally:
                self.in_flight.end_lookup(epoch)
                self._end_reading(reader)

    def _collect(self, served: Served, table: int, ids: Tensor, slots: Tensor) -> Tensor:
        shard, here = served.shards[table], slots > 0
        rows, resident = torch.empty(ids.numel(), shard.row_bytes, dtype=torch.uint8), here.cpu()
        rows[resident] = self.memory.read(table, slots[here])
        if not bool(resident.all()):
            rows[~resident] = stored_rows(served.store, shard, ids[~resident])
        return rows

    def resident(self) -> list[Tensor]:
        """Local ids of the rows in slots, by table, the last to be evicted first, on the CPU."""
        found = []
        for table in range(len(self.shards)):
            with in_small_steps(), self.lock, self.on_stream():
                found.append(self.cache.hottest(table)[0].cpu())
        return found


__all__ = ["Reader", "ServedRows"]
