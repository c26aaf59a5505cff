"""Rows of a serving TBE on a GPU, which keeps account of its slots itself.

The lock is held while a batch is launched, from its remap to its lookup, so that on the device batches, updates and
exchanges of versions come one after the other. It is not held while the store is read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.cache.current_stream import CurrentStream
from torchrec_turbossd.cache.device_cache import DeviceCache, Found
from torchrec_turbossd.cache.device_state import Batch as Work
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.in_flight import in_small_steps
from torchrec_turbossd.tbe.layout import Bounds, UnplacedBatch
from torchrec_turbossd.tbe.served import UpdatableStore
from torchrec_turbossd.tbe.served_rows import Reader, ServedRows
from torchrec_turbossd.tbe.slot_memory import SlotMemory
from torchrec_turbossd.tbe.stored import stored_rows

_WARM_ROWS, _TURN_S = 4096, 0.02
Run = Callable[[Tensor, Tensor], Tensor]
Wanted = list[tuple[int, Tensor]]


class DeviceServingRows(ServedRows):
    """Slots and DRAM tier in front of a store, looked up and updated. Args: as `ServedRows`."""

    def __init__(
        self,
        shards: Sequence[TableShard],
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: UpdatableStore,
        cache: DeviceCache,
        bounds: Bounds = Bounds.RAISE,
    ) -> None:
        super().__init__(shards, feature_table, memory, store, cache, bounds)
        self._current = CurrentStream(self.device.index or 0) if self.device.type == "cuda" else None
        self._last: torch.cuda.Stream | None = None
        self._ordering = threading.Lock()
        self._hits = False
        """The last batch found all of its rows in slots, and so may the next."""
        # Slots were just made, on the stream of whoever made them.
        with self.lock, self.on_stream():
            pass

    @contextmanager
    def alone_on_stream(self) -> Iterator[None]:
        with self.lock, self.on_stream():
            yield

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """The caller holds the lock."""
        if self._current is not None:
            current = self._current()
            with self._ordering:
                if self._last is not None and self._last is not current:
                    current.wait_stream(self._last)
                self._last = current
        yield

    def place(self, indices: Tensor, offsets: Tensor) -> UnplacedBatch:
        """Check a batch as far as that needs no look at what it holds; raises as `Layout.place`."""
        return UnplacedBatch(self.layout, indices, offsets, self.layout.check_form(indices, offsets))

    def look_up(self, batch: UnplacedBatch, slot_type: torch.dtype, run: Run) -> Tensor:
        """What `run` makes of the slots of a batch and its offsets, both of `slot_type`, with all of its rows in slots.

        `run` is launched before it is known what this batch misses: without anything brought in where the last one
        missed nothing, else after what brings in rows of the DRAM tier. If that was not enough, what came of it is
        thrown away. The host waits for what is before both on the device, not for them.

        Raises:
            InputError, RowIndexError: as `Layout.place`.
            CacheFullError: there are too few slots; the batch can then run on `take_out`.
        """
        slots = torch.empty(batch.indices.numel(), dtype=slot_type, device=self.device)
        if not (slots.numel() and batch.bags):
            batch.place()
            return run(slots, batch.offsets.to(slot_type))
        with self.lock, self.on_stream():
            work = self._remap(batch, slots)
            try:
                launched = self._hits or self.cache.bring_ahead(work)
                early = run(slots, work.safe) if launched else None
                found = self.cache.found()
                self._hits = found.all_here
                wanted = [] if found.all_here else self._bring_from_dram(batch, work, found)
            except BaseException:
                self.cache.give_up(work)
                raise
            if not wanted:
                self._count(batch, found)
                return early if early is not None and (found.all_here or work.ahead) else run(slots, work.safe)
            reader = self._begin_reading()
        try:
            # Threads that hand Python's global lock to and fro get less done than one after the other.
            my_turn = self._turn.acquire(timeout=_TURN_S)
            try:
                return self._with_reads(batch, slots, (reader, wanted), found, run)
            finally:
                if my_turn:
                    self._turn.release()
        finally:
            self._end_reading(reader)

    def _remap(self, batch: UnplacedBatch, slots: Tensor) -> Work:
        safe = torch.empty(batch.offsets.numel(), dtype=slots.dtype, device=self.device)
        work: Work = self.cache.remap(batch.indices, batch.offsets, batch.bags, slots, mark=False, safe=safe)
        return work

    def _count(self, batch: UnplacedBatch, found: Found) -> None:
        self.counters.add(found.lookups, found.in_dram + found.absent, found.in_dram)
        self.recorder.add(batch)

    def _bring_from_dram(self, batch: UnplacedBatch, work: Work, found: Found) -> Wanted:
        """Bring in what the DRAM tier has; returns what is in no tier."""
        if found.flags:
            batch.place()
        wanted: Wanted = self.cache.bring(work, found)
        return wanted

    def _with_reads(
        self, batch: UnplacedBatch, slots: Tensor, begun: tuple[Reader, Wanted], found: Found, run: Run
    ) -> Tensor:
        """Read what is wanted from the store, without the lock, until a moment comes at which nothing is."""
        reader, wanted = begun
        while True:
            self._read(reader, self._by_place(wanted))
            with self.lock, self.on_stream():
                self._catch_up(reader)
                work = self._remap(batch, slots)
                try:
                    wanted = self._bring_all(batch, work, reader)
                except BaseException:
                    self.cache.give_up(work)
                    raise
                if not wanted:
                    self._count(batch, found)
                    return run(work.slots, work.safe)
                wanted = [(t, ids) for t, ids in enumerate(reader.read.lacks(self._by_place(wanted))) if ids.numel()]

    def _bring_all(self, batch: UnplacedBatch, work: Work, reader: Reader) -> Wanted:
        """Bring in what the DRAM tier has and what was read; returns what is wanted still, if something is unread."""
        wanted = self._bring_from_dram(batch, work, self.cache.found())
        while wanted and not any(ids.numel() for ids in reader.read.lacks(self._by_place(wanted))):
            for table, ids in wanted:
                # Not more at once than pass through the tier.
                part = ids[: self.cache.tier.places[table]]
                self.cache.put(table, part, reader.read.rows(table, part), _nothing_to_write)
            self.cache.again(work)
            wanted = self._bring_from_dram(batch, work, self.cache.found())
        return wanted

    def _by_place(self, wanted: Wanted) -> list[Tensor]:
        by_table = dict(wanted)
        return [by_table.get(t, torch.empty(0, dtype=torch.int64)) for t in range(len(self.shards))]

    def update(self, batch: Mapping[int, Rows]) -> None:
        keyed = {self.shards[t].key: (ids + self.shards[t].row_offset, rows) for t, (ids, rows) in batch.items()}
        committed = self.served.store.commit(keyed)
        with self.lock, self.on_stream():
            self.served.store.publish(committed)
            self.in_flight.updated(batch)
            # It is committed and so it is made, whatever happens now: what cannot be written leaves its slots.
            for table, (ids, rows) in batch.items():
                entry = self.cache.entries_of(table, ids.to(self.device)).cpu()
                try:
                    self._write(table, ids, entry, rows)
                except Exception:
                    self._drop(table, ids, entry)

    def _write(self, table: int, ids: Tensor, entry: Tensor, rows: Tensor) -> None:
        here = entry > 0
        if bool(here.any()):
            self.memory.write(table, entry[here].to(torch.int64), rows[here])
        there, places = self._places(table, ids, entry)
        # The entries were waited for, and so were all kernels before.
        self.cache.tier.write(table, places, rows[there])

    def _places(self, table: int, ids: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows may be in the DRAM tier, and where: [N] bool, [M] int64."""
        if self.cache.tier.copies(table):
            # The place of a row that has no copy is its own, whatever is there.
            return entry != 0, ids[entry != 0]
        return entry < 0, (entry[entry < 0] & entries.PLACE).to(torch.int64)

    def _drop(self, table: int, ids: Tensor, entry: Tensor) -> None:
        """Rows of these ids are in no tier any more."""
        _, places = self._places(table, ids, entry)
        self.cache.give(table, self.cache.remove(table, ids[entry > 0].to(self.device)))
        self.cache.map.clear((ids + self.cache.base_of[table]).to(self.device))
        self.cache.tier.release(table, places)

    def warm(self, table: int, ids: Tensor) -> None:
        for part in ids.split(_WARM_ROWS):
            with in_small_steps():
                with self.lock, self.on_stream():
                    part = self._absent(table, part)[: self.cache.free(table)]
                    reader = self._begin_reading()
                try:
                    wanted = [part if t == table else part[:0] for t in range(len(self.shards))]
                    self._read(reader, [each.sort().values for each in wanted])
                    with self.lock, self.on_stream():
                        if reader.served is self.served:
                            self._catch_up(reader)
                            self._admit(table, self._absent(table, part), reader)
                finally:
                    self._end_reading(reader)

    def _absent(self, table: int, ids: Tensor) -> Tensor:
        return ids[self.cache.entries_of(table, ids.to(self.device)).cpu() == 0]

    def _admit(self, table: int, ids: Tensor, reader: Reader) -> None:
        slots = self.cache.take(table, ids.numel())
        ids = ids[: slots.numel()]
        try:
            order = ids.sort()
            rows = torch.empty(ids.numel(), self.shards[table].row_bytes, dtype=torch.uint8)
            rows[order.indices] = reader.read.rows(table, order.values)
            self.memory.write(table, slots, rows)
        except BaseException:
            self.cache.give(table, slots)
            raise
        # The hottest come last and so leave last.
        self.cache.admit(table, ids.flip(0).to(self.device), slots.flip(0))

    def _rows_now(self, ids: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
        cpu_ids = [each.cpu() for each in ids]
        while True:
            rows, absent = [], []
            with self.lock, self.on_stream():
                for table, each in enumerate(ids):
                    slots = self.cache.slots_of(table, each)
                    here, width = (slots > 0).cpu(), self.shards[table].row_bytes
                    rows.append(torch.empty(each.numel(), width, dtype=torch.uint8))
                    rows[-1][here] = self.memory.read(table, slots[slots > 0])
                    absent.append(~here)
                reader = self._begin_reading()
            try:
                for table, (each, wanted) in enumerate(zip(cpu_ids, absent, strict=True)):
                    if bool(wanted.any()):
                        shard = reader.served.shards[table]
                        rows[table][wanted] = stored_rows(reader.served.store, shard, each[wanted])
                    reader.read.add(table, each, rows[table])
                with self.lock:
                    if reader.served is self.served:
                        self._catch_up(reader)
                        misses = [int(each.sum()) for each in absent]
                        return [reader.read.rows(table, each) for table, each in enumerate(cpu_ids)], misses
            finally:
                self._end_reading(reader)

    @property
    def host_nbytes(self) -> int:
        """Bytes of pinned host memory."""
        return int(self.cache.tier.nbytes)


def _nothing_to_write(table: int, ids: Tensor, rows: Tensor) -> None:
    """Rows that are served are never newer than the store's."""


__all__ = ["DeviceServingRows"]
