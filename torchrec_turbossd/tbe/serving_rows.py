"""Rows of a serving TBE: slots that agree with the store, and updates that a forward sees whole or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.cached_rows import CachedRows, Distinct, Fetched
from torchrec_turbossd.tbe.layout import Batch


class ServingRows(CachedRows):
    """Slots in front of a store that updates go to first, and that can be exchanged for another.

    An update is written to the store without the lock, so that lookups go on. Meanwhile its rows are *in flight*: a
    batch that finds those of them that it needs in slots reads the old ones there; a batch that would have to take one
    from the store waits until the update has ended, because it could get the new row beside an old one.

    Args: as `CachedRows`.
    """

    def __init__(self, *args: Any, device: torch.device, **kwargs: Any) -> None:
        super().__init__(*args, device=device, **kwargs)
        self._settled = threading.Condition(self.lock)
        self._in_flight: Tensor | None = None
        self._waiting = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The lock, and on CUDA the one stream on which slots are read and written, in the order of the turns."""
        with self.lock:
            if self._stream is None:
                yield
                return
            caller = torch.cuda.current_stream(self.cache.device)
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                yield
            caller.wait_stream(self._stream)

    def fetch(self, batch: Batch, *, pin: bool) -> Fetched:
        with self.turn():
            self._check_fits(batch)
            self._await_rows(batch.positions)
            return super().fetch(batch, pin=pin)

    def take_out(self, batch: Batch, *, lend: bool) -> Distinct:
        with self.turn():
            self._await_rows(batch.positions)
            return super().take_out(batch, lend=lend)

    def _check_fits(self, batch: Batch) -> None:
        """Refuse a batch that cannot fit before any of its rows is read or moves another."""
        for table, lookups in enumerate(batch.lookups(len(self.shards))):
            if lookups <= self.cache.slots[table]:
                continue
            asked = [batch.positions[run.start : run.stop] for run in batch.runs if run.table == table]
            distinct = torch.unique(torch.cat(asked)).numel()
            if distinct > self.cache.slots[table]:
                raise CacheFullError(
                    f"table {self.shards[table].table.name!r}: {distinct} rows do not fit in "
                    f"{self.cache.slots[table]} slots"
                )

    def _await_rows(self, positions: Tensor) -> None:
        """Wait while a row that is absent from the slots is in flight."""
        if self._in_flight is None:
            return
        self._waiting += 1
        try:
            self._settled.wait_for(lambda: not self._needs_in_flight(positions))
        finally:
            self._waiting -= 1
            self._settled.notify_all()

    def _needs_in_flight(self, positions: Tensor) -> bool:
        if self._in_flight is None:
            return False
        absent = positions[self.cache.lookup(positions) == 0]
        return bool(torch.isin(absent, self._in_flight).any())

    def update(self, batch: Mapping[int, Rows]) -> None:
        """Set rows of tables (by place) in the store, then in the slots: all at once, or none if the store refuses.

        When it returns every later batch sees the new rows. Updates take turns.

        Args:
            batch: for each table (distinct local ids [N] int64, rows [N, row_bytes] uint8), on the CPU.
        """
        positions = [ids + int(self.cache.bases[table]) for table, (ids, _) in batch.items()]
        keyed: dict[str, Rows] = {}
        for table, (ids, rows) in batch.items():
            keyed |= self._keyed(table, ids, rows)
        with self.turn():
            # Batches that waited for the last update go first, or a stream of updates could hold them for ever.
            self._settled.wait_for(lambda: self._in_flight is None and self._waiting == 0)
            self._in_flight = torch.cat(positions).to(self.cache.device)
        try:
            self.store.write(keyed)
            with self.turn():
                try:
                    self._rewrite(batch)
                except Exception:
                    # The update is in the store, and so it is made: whoever asks for these rows reads them there.
                    self._drop(batch)
                except BaseException:
                    self._drop(batch)
                    raise
        finally:
            with self.lock:
                self._in_flight = None
                self._settled.notify_all()

    def _rewrite(self, batch: Mapping[int, Rows]) -> None:
        """Put the new bytes of rows that are in slots there."""
        for table, (ids, rows) in batch.items():
            slots = self.cache.slots_of(table, ids.to(self.cache.device))
            here = slots > 0
            if bool(here.any()):
                self.memory.write(table, slots[here], rows[here.cpu()])

    def _drop(self, batch: Mapping[int, Rows]) -> None:
        """Empty the slots of these rows."""
        for table, (ids, _) in batch.items():
            ids = ids.to(self.cache.device)
            self.cache.drop(table, ids[self.cache.slots_of(table, ids) > 0])

    def resident(self) -> list[Tensor]:
        """Local ids of the rows in slots, by table, on the CPU."""
        with self.turn():
            return [self.cache.resident(table)[0].cpu() for table in range(len(self.shards))]

    def exchange(self, store: RowStore, shards: Sequence[TableShard], hot: Sequence[Rows]) -> RowStore:
        """Serve the rows of another store from now on; returns the one served before.

        No update may be in flight, and no slot pinned.

        Args:
            shards: the same tables, with the rule for rows that the new store lacks.
            hot: for each table (distinct local ids, rows), the new store's. Those of them that are in slots stay
                there with the new bytes; every other row leaves its slot.
        """
        with self.turn():
            try:
                for table, (ids, rows) in enumerate(hot):
                    self._refill(table, ids, rows)
            except BaseException:
                # Slots of two stores must not be mixed: without any, every row is read again from the old one.
                for table in range(len(self.shards)):
                    self.cache.drop(table, self.cache.resident(table)[0])
                raise
            old, self.store = self.store, store
            self.shards[:] = shards
        return old

    def _refill(self, table: int, ids: Tensor, rows: Tensor) -> None:
        """Give rows that are in slots new bytes, and empty every slot of another row."""
        slots = self.cache.slots_of(table, ids.to(self.cache.device))
        here = slots > 0
        keep = torch.zeros(self.cache.slots[table] + 1, dtype=torch.bool, device=self.cache.device)
        keep.index_fill_(0, slots[here], True)
        resident, held = self.cache.resident(table)
        self.cache.drop(table, resident[~keep[held]])
        if bool(here.all()):
            self.memory.write(table, slots, rows)
        else:
            self.memory.write(table, slots[here], rows[here.cpu()])


__all__ = ["ServingRows"]
