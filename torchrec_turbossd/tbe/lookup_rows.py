"""Rows of a serving TBE brought into slots for lookups, by many threads at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.cache.slot_cache import SlotCache
from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.metrics import ReadCounters
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.cached_rows import Distinct, stored_rows
from torchrec_turbossd.tbe.in_flight import InFlight, in_small_steps
from torchrec_turbossd.tbe.layout import Batch, Bounds, Layout, Run
from torchrec_turbossd.tbe.read_rows import ReadRows
from torchrec_turbossd.tbe.recording import AccessRecorder
from torchrec_turbossd.tbe.served import Served, UpdatableStore
from torchrec_turbossd.tbe.slot_memory import SlotMemory

_WARM_ROWS = {"cpu": 512, "cuda": 4096}
_PATIENCE_S, _TURN_S = 0.2, 0.02


@dataclass(eq=False)
class _Reader:
    """A batch that reads the store: when it began, what is served then, its rows, and how long it waits for slots."""

    epoch: int
    served: Served
    read: ReadRows
    patience: float


class LookupRows:
    """The slots of a serving TBE in front of a store, as far as lookups need them.

    Args:
        shards: the tables, in the TBE's order.
        slots: usable slots of each (slot 0 comes on top).
        feature_table: for each feature, its table.
        memory: the TBE's slots.
        store: where rows live, by `TableShard.key` and global row id.

    Attributes:
        in_flight: with the lock that is held around what must be one step.
    """

    def __init__(
        self,
        shards: Sequence[TableShard],
        slots: Sequence[int],
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: UpdatableStore,
        *,
        device: torch.device,
        policy: str,
        bounds: Bounds = Bounds.RAISE,
    ) -> None:
        self.in_flight = InFlight()
        self.lock = self.in_flight.lock
        cache = SlotCache([s.rows for s in shards], slots, device=device, policy=policy)
        self.served = Served.first(store, list(shards), cache, self.in_flight)
        self.memory, self.device = memory, device
        names = [s.table.name for s in shards]
        self.layout = Layout(names, [s.rows for s in shards], feature_table, cache.bases, bounds)
        self.counters = ReadCounters(names)
        self.recorder = AccessRecorder(shards, cache.base_of)
        self._turn = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def shards(self) -> list[TableShard]:
        """The tables, with the rules for rows never written of what is served."""
        return self.served.shards

    @property
    def store(self) -> UpdatableStore:
        return self.served.store

    @property
    def cache(self) -> SlotCache:
        return self.served.cache

    @property
    def squeezed(self) -> bool:
        """Part of the slots is another version's, for now."""
        return self.served.capacity != self.cache.slots

    @property
    def nbytes(self) -> int:
        """Bytes of fast memory: slots (with the reserved one of each table), slot map and bookkeeping."""
        held = sum((n + 1) * s.row_bytes for n, s in zip(self.cache.slots, self.shards, strict=True))
        return held + self.cache.nbytes

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """On CUDA the one stream on which slots are read and written; the caller's waits for it, and it for that."""
        if self._stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            yield
        caller.wait_stream(self._stream)

    @contextmanager
    def slots_of(self, batch: Batch) -> Iterator[Tensor]:
        """The slots of a batch: [N] int32, the TBE's row ids. Their bytes stay as they are within the context.

        Raises `CacheFullError` when they do not fit; the batch can then run on `take_out`.
        """
        with self.on_stream():
            slots, epoch = self._bring_in(batch)
            try:
                yield slots
            finally:
                self.in_flight.end_lookup(epoch)

    def warm(self, table: int, ids: Tensor) -> None:
        """Bring rows in as long as there are free slots, without counting them as read.

        Args:
            ids: [N] int64, distinct local ids on the CPU, the hottest first.
        """
        for part in ids.to(self.device).split(_WARM_ROWS[self.device.type]):
            with in_small_steps(), self.on_stream(), contextlib.suppress(CacheFullError):
                with self.lock:
                    part = part[self.cache.slots_of(table, part) == 0][: self.cache.free(table)]
                if part.numel():
                    run = Run(table, 0, part.numel())
                    _, epoch = self._bring_in(
                        Batch(positions=part + self.cache.base_of[table], runs=[run]), counted=False
                    )
                    self.in_flight.end_lookup(epoch)

    def _bring_in(self, batch: Batch, *, counted: bool = True) -> tuple[Tensor, int]:
        with self.lock:
            found = self._find(batch)
            if not found.numel() or int(found.amin()):
                return self._begin(batch, found, found, [0] * len(self.shards) if counted else None)
            reader = self._begin_reading()
        # Threads that hand Python's global lock to and fro get less done than one after the other. A batch that waits
        # for the disk does not hold others up for long.
        my_turn = self._turn.acquire(timeout=_TURN_S)
        try:
            # Before the lock is taken: a batch makes them when they are first asked for.
            positions = batch.positions
            while True:
                with self.lock:
                    self._catch_up(reader)
                    found = self.cache.lookup(positions)
                    absent = self._by_table(torch.unique(positions[found == 0]))
                    unread = reader.read.lacks([ids.cpu() for ids in absent])
                    if sum(ids.numel() for ids in unread) == 0:
                        if not self._has_room(batch, found, [ids.numel() for ids in absent], reader):
                            continue
                        self._admit(reader.read, absent)
                        self.served.claims.pop(reader, None)
                        slots = self.cache.lookup(positions)
                        return self._begin(batch, slots, found, reader.read.counts if counted else None)
                self._read(reader, unread)
        finally:
            if my_turn:
                self._turn.release()
            self._end_reading(reader)

    def _find(self, batch: Batch) -> Tensor:
        """Slots of a batch, 0 for absent rows: [N] int32."""
        if batch.ids is not None and len(batch.runs) > 0:
            # The slot map finds ids out of bounds by itself, so that a batch of hits pays for no other check.
            parts = [self.cache.find(run.table, batch.ids[run.start : run.stop]) for run in batch.runs]
            found = [part for part in parts if part is not None]
            if len(found) == len(parts):
                return found[0] if len(found) == 1 else torch.cat(found)
        return self.cache.lookup(batch.positions)

    def _begin(self, batch: Batch, slots: Tensor, found: Tensor, misses: list[int] | None) -> tuple[Tensor, int]:
        """All rows are in `slots`, some were `found` there: the lookup begins; it counts where `misses` are given."""
        if misses is not None:
            # A row that this batch brings in was not read before: policies tell apart what is read again.
            for run in batch.runs:
                self.cache.touch(run.table, found[run.start : run.stop])
            self.counters.add(batch.lookups(len(self.shards)), misses)
            self.recorder.add(batch)
        return slots, self.in_flight.begin_lookup()

    def _begin_reading(self) -> _Reader:
        read = ReadRows([s.row_bytes for s in self.shards])
        return _Reader(self.in_flight.begin_read(), self.served, read, time.monotonic() + _PATIENCE_S)

    def _end_reading(self, reader: _Reader) -> None:
        with self.lock:
            reader.served.claims.pop(reader, None)
            self.in_flight.end_read(reader.epoch)

    def _catch_up(self, reader: _Reader) -> None:
        """Make what was read what a read at this moment would give."""
        if reader.served is not self.served:
            fresh = self._begin_reading()
            reader.served.claims.pop(reader, None)
            self.in_flight.end_read(reader.epoch)
            reader.epoch, reader.served, reader.read = fresh.epoch, fresh.served, fresh.read
        for update in self.in_flight.updates_since(reader.epoch):
            for table, (ids, rows) in update.items():
                reader.read.refresh(table, ids, rows)

    def _read(self, reader: _Reader, unread: Sequence[Tensor]) -> None:
        """Read rows from the store, without the lock."""
        for table, ids in enumerate(unread):
            if ids.numel():
                reader.read.add(table, ids, stored_rows(reader.served.store, reader.served.shards[table], ids))

    def _by_table(self, positions: Tensor) -> list[Tensor]:
        """Ascending positions split into local ids of each table."""
        cuts = torch.searchsorted(positions, self.cache.bases).tolist()
        return [positions[cuts[t] : cuts[t + 1]] - self.cache.base_of[t] for t in range(len(self.shards))]

    def _has_room(self, batch: Batch, found: Tensor, needed: Sequence[int], reader: _Reader) -> bool:
        """Enough slots are free for the rows of a batch; else waits a moment for lookups in flight that use them."""
        self._check_fits(batch)
        here = found.to(torch.int64)
        for run in batch.runs:
            here[run.start : run.stop] += self.cache.slot_base_of[run.table]
        if self.served.make_room(here[found > 0], needed, reader):
            return True
        if time.monotonic() > reader.patience:
            raise CacheFullError("lookups in flight hold the slots that this batch needs; give the tables more slots")
        self.served.claims[reader] = needed
        self.in_flight.sleep()
        return False

    def _check_fits(self, batch: Batch) -> None:
        """Refuse a batch that cannot fit before any other row makes room for it."""
        for table, lookups in enumerate(batch.lookups(len(self.shards))):
            if lookups > self.served.capacity[table]:
                asked = torch.cat([batch.positions[r.start : r.stop] for r in batch.runs if r.table == table])
                if (distinct := torch.unique(asked).numel()) > self.served.capacity[table]:
                    name, slots = self.shards[table].table.name, self.served.capacity[table]
                    raise CacheFullError(f"table {name!r}: {distinct} rows do not fit in {slots} slots")

    def _admit(self, read: ReadRows, absent: Sequence[Tensor]) -> None:
        for table, ids in enumerate(absent):
            if not ids.numel():
                continue
            slots = self.cache.take(table, ids.numel())
            try:
                self.memory.write(table, slots, read.rows(table, ids.cpu()))
            except BaseException:
                self.cache.give(table, slots)
                raise
            self.cache.admit(table, ids, slots)

    def take_out(self, batch: Batch) -> Distinct:
        """The distinct rows of a batch at one moment, for a run outside the slots."""
        with self.on_stream():
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
        with self.on_stream():
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
            with in_small_steps(), self.on_stream(), self.lock:
                found.append(self.cache.hottest(table)[0].cpu())
        return found


__all__ = ["LookupRows"]
