"""Rows of tables on SSD brought into slots of a GPU, which keeps account of them itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_turbossd.cache.device_cache import DeviceCache, Found
from torchrec_turbossd.cache.device_slots import Pin
from torchrec_turbossd.cache.device_state import Batch as Work
from torchrec_turbossd.cache.policies import DEFAULT_POLICY
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.layout import Bounds, UnplacedBatch
from torchrec_turbossd.tbe.slot_memory import SlotMemory
from torchrec_turbossd.tbe.stored import stored_rows
from torchrec_turbossd.tbe.table_rows import Fetched, TableRows

_FLUSH_ROWS = 65536
Wanted = list[tuple[int, Tensor]]


@dataclass
class DeviceArrival:
    """A batch whose rows were in slots or in the DRAM tier, but for those `chosen`: (table, local ids on the CPU).

    work, found: None for a batch without lookups. pin: holds what is there.
    """

    batch: UnplacedBatch
    slots: Tensor
    work: Work | None = None
    found: Found | None = None
    pin: Pin | None = None
    chosen: Sequence[tuple[int, Tensor]] = ()

    def tensors(self) -> Sequence[Tensor | None]:
        return (self.slots,)


class DeviceRows(TableRows):
    """As `TableRows`. Rows of the store come through the DRAM tier; what leaves slots goes there.

    Args:
        dram_slots: as `DeviceCache` takes it.
    """

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
        dram_slots: Sequence[int] | None = None,
    ) -> None:
        parts = [memory.parts(table) for table in range(len(shards))]
        self.cache = DeviceCache(
            [s.rows for s in shards],
            slots,
            parts,
            row_bytes=[s.row_bytes for s in shards],
            dram_slots=dram_slots,
            feature_table=feature_table,
            policy=policy,
        )
        super().__init__(shards, feature_table, memory, store, self.cache, bounds)
        self._missed = False
        """The last batch found rows missing from slots, and so may the next."""

    def place(self, indices: Tensor, offsets: Tensor) -> UnplacedBatch:
        return UnplacedBatch(self.layout, indices, offsets, self.layout.check_form(indices, offsets))

    def choose(self, batch: UnplacedBatch, *, train: bool = True) -> DeviceArrival:
        slots = torch.empty(batch.indices.numel(), dtype=torch.int64, device=self.cache.device)
        if not batch.lookups_and_bags:
            batch.place()
            return DeviceArrival(batch, slots)
        with self.lock:
            self.order.after_account()
            work = self.cache.remap(batch.indices, batch.offsets, batch.bags, slots, mark=train)
            try:
                if self._missed:
                    self.order.after_rows()
                    self.cache.bring_ahead(work)
                found = self.cache.found()
                self._missed = not found.all_here
                if found.flags:
                    batch.place()
                wanted = [] if found.all_here else self._bring_from_dram(work, found)
            except BaseException:
                self.cache.give_up(work)
                raise
            finally:
                self.order.account_changed()
            pin = self.cache.pin(work)
        return DeviceArrival(batch, slots, work, found, pin, wanted)

    def _bring_from_dram(self, work: Work, found: Found) -> Wanted:
        """Bring in what the DRAM tier has; returns what is in no tier."""
        self.order.after_rows()
        wanted: Wanted = self.cache.bring(work, found)
        return wanted

    def bring(self, arrival: DeviceArrival) -> None:
        wanted, work = list(arrival.chosen), arrival.work
        while wanted and work is not None:
            # Not more at once than pass through the tier.
            wanted = [(table, ids[: self.cache.tier.places[table]]) for table, ids in wanted]
            rows = self._read_all(wanted)
            with self.lock:
                self.order.after_account()
                self.order.after_rows()
                for (table, ids), each in zip(wanted, rows, strict=True):
                    self.cache.put(table, ids, each, self._write_out)
                self.cache.again(work)
                try:
                    wanted = self._bring_from_dram(work, self.cache.found())
                except BaseException:
                    self.cache.give_up(work)
                    raise
                finally:
                    self.order.account_changed()

    def _write_out(self, table: int, ids: Tensor, rows: Tensor) -> None:
        self.store.write(self._keyed(table, ids, rows))

    def settle(self, arrival: DeviceArrival, *, pin: bool) -> Fetched:
        hold = arrival.pin
        if pin:
            arrival.pin = None
        self.abandon(arrival)
        return Fetched(slots=arrival.slots, hold=hold if pin else None)

    def abandon(self, arrival: DeviceArrival) -> None:
        with self.lock:
            if arrival.pin is not None:
                self.cache.unpin(arrival.pin)
                arrival.pin = None

    def count(self, arrival: DeviceArrival) -> None:
        found = arrival.found
        if found is not None:
            self.counters.add(found.lookups, found.in_dram + found.absent, found.in_dram)
        self.recorder.add(arrival.batch)

    def _unpin(self, fetched: Fetched, *, dirty: bool) -> None:
        # Rows were marked as dirty when they were looked up.
        self.cache.unpin(fetched.hold)

    def _load(self, table: int, ids: Tensor) -> Tensor:
        shard, ids = self.shards[table], ids.cpu()
        there, places = self.cache.in_dram(table, ids)
        rows = torch.empty(ids.numel(), shard.row_bytes, dtype=torch.uint8)
        rows[there] = self.cache.tier.read(table, places)
        if not bool(there.all()):
            rows[~there] = stored_rows(self.store, shard, ids[~there])
        return rows

    def _write_absent(self, rows: Mapping[int, Rows]) -> None:
        to_store: dict[int, Rows] = {}
        to_dram = []
        for table, (ids, each) in rows.items():
            there, places = self.cache.in_dram(table, ids)
            to_dram.append((table, ids[there], places, each[there]))
            if not bool(there.all()):
                to_store[table] = ids[~there], each[~there]
        if to_store:
            super()._write_absent(to_store)
        for table, ids, places, each in to_dram:
            self.cache.tier.write(table, places, each)
            self.cache.mark_in_dram(table, ids, places, dirty=True)

    def _write_back_others(self, table: int) -> None:
        self.cache.synchronize()
        ids, places = self.cache.tier.dirty(table)
        for some, at in zip(ids.split(_FLUSH_ROWS), places.split(_FLUSH_ROWS), strict=True):
            if some.numel():
                self.store.write(self._keyed(table, some, self.cache.tier.read(table, at)))
                self.cache.mark_in_dram(table, some, at, dirty=False)

    def _forget(self) -> None:
        self.cache.forget()

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory that the DRAM tier takes."""
        return self.cache.tier.nbytes


__all__ = ["DeviceArrival", "DeviceRows"]
