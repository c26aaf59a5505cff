"""Rows of a serving TBE brought into slots for lookups, by many threads at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.tbe.in_flight import in_small_steps
from torchrec_turbossd.tbe.layout import Batch, Run
from torchrec_turbossd.tbe.read_rows import ReadRows
from torchrec_turbossd.tbe.served_rows import Reader, ServedRows

_WARM_ROWS = 512
_TURN_S = 0.02


class LookupRows(ServedRows):
    """As `ServedRows`, as far as lookups need it, with slots and their account on the CPU."""

    @contextmanager
    def slots_of(self, batch: Batch) -> Iterator[Tensor]:
        """The slots of a batch: [N] int32, the TBE's row ids. Their bytes stay as they are within the context.

        Raises `CacheFullError` when they do not fit; the batch can then run on `take_out`.
        """
        slots, epoch = self._bring_in(batch)
        try:
            yield slots
        finally:
            self.in_flight.end_lookup(epoch)

    def prefetch(self, batch: Batch) -> None:
        """Bring the rows of a batch into slots, where they stay until others need these more; none if they do not fit.

        Raises `RowIndexError` as `Layout.place`.
        """
        with contextlib.suppress(CacheFullError):
            _, epoch = self._bring_in(batch, counted=False)
            self.in_flight.end_lookup(epoch)

    def warm(self, table: int, ids: Tensor) -> None:
        for part in ids.split(_WARM_ROWS):
            with in_small_steps(), contextlib.suppress(CacheFullError):
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
                    unread = reader.read.lacks(absent)
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

    def _has_room(self, batch: Batch, found: Tensor, needed: Sequence[int], reader: Reader) -> bool:
        """Enough slots are free for the rows of a batch; else waits a moment for lookups in flight that use them."""
        self._check_fits(batch)
        here = found.to(torch.int64)
        for run in batch.runs:
            here[run.start : run.stop] += self.cache.slot_base_of[run.table]
        # The batch's own rows make no room for the others.
        self.cache.pin(here[found > 0], 1)
        try:
            if self.served.make_room(needed, reader):
                return True
        finally:
            self.cache.pin(here[found > 0], -1)
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
                self.memory.write(table, slots, read.rows(table, ids))
            except BaseException:
                self.cache.give(table, slots)
                raise
            self.cache.admit(table, ids, slots)


__all__ = ["LookupRows"]
