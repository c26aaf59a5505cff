"""Rows of a serving TBE on a GPU, changed while they are looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchrec_turbossd.cache import entries
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tbe.device_lookups import DeviceLookupRows
from torchrec_turbossd.tbe.in_flight import in_small_steps
from torchrec_turbossd.tbe.served_rows import Reader
from torchrec_turbossd.tbe.stored import stored_rows

_WARM_ROWS = 4096


class DeviceServingRows(DeviceLookupRows):
    """Slots and DRAM tier in front of a store, looked up and updated. Args: as `DeviceLookupRows`."""

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
        """Bytes of host memory that the DRAM tier takes."""
        return int(self.cache.tier.nbytes)


__all__ = ["DeviceServingRows"]
