"""Rows of tables on SSD in the slots of a TBE, and back: what is the same wherever slots are kept account of."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.metrics import ReadCounters
from torchrec_turbossd.store.contract import Rows, RowStore
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.layout import Batch, Bounds, Layout
from torchrec_turbossd.tbe.recording import AccessRecorder
from torchrec_turbossd.tbe.slot_memory import SlotMemory
from torchrec_turbossd.tbe.stored import stored_rows
from torchrec_turbossd.tbe.stream_order import StreamOrder

_FLUSH_ROWS = 65536
_LOADERS = 4
"""Tables whose rows are read at once."""


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A batch whose rows are all in slots.

    slots: [N] int64, the TBE's row ids. hold: what keeps the rows in their slots; None when the batch is not pinned.
    """

    slots: Tensor
    hold: Any


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


class Arriving(Protocol):
    """A batch whose absent rows are on their way: `chosen` says whether any are."""

    @property
    def batch(self) -> Batch: ...
    @property
    def chosen(self) -> Sequence[Any]: ...
    def tensors(self) -> Sequence[Tensor | None]:
        """What was made on the stream of `choose`, and is used on another."""


class Slots(Protocol):
    """What is asked of a cache of slots here; `SlotCache` and `DeviceCache` say what it means."""

    slots: list[int]
    device: torch.device
    bases: Tensor
    base_of: list[int]
    slot_base_of: list[int]

    @property
    def nbytes(self) -> int: ...
    @property
    def pinned_slots(self) -> int: ...
    def slots_of(self, table: int, ids: Tensor) -> Tensor: ...
    def is_dirty(self, table: int, slots: Tensor) -> Tensor: ...
    def clean(self, table: int, slots: Tensor) -> None: ...
    def dirty(self, table: int) -> tuple[Tensor, Tensor]: ...
    def mark_dirty(self, at: Tensor) -> None: ...


class TableRows(ABC):
    """The slots of a TBE in front of a row store.

    Every method takes `lock`, which is public so that a caller can make several calls one step.

    A `fetch` has three thirds, of which the second may run in a thread of its own: `choose`, `bring` and `settle`.
    Until `settle` or `abandon` nothing but `release` may come in between.

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
        feature_table: Sequence[int],
        memory: SlotMemory,
        store: RowStore,
        cache: Slots,
        bounds: Bounds,
    ) -> None:
        self.shards, self.memory, self.store = list(shards), memory, store
        self._slots = cache
        names = [s.table.name for s in shards]
        self.layout = Layout(
            names,
            [s.rows for s in shards],
            feature_table,
            cache.bases,
            bounds,
            table_rows=[s.table.rows for s in shards],
        )
        self.counters = ReadCounters(names)
        self.recorder = AccessRecorder(self.shards, cache.base_of)
        self.lock = threading.RLock()
        self.order = StreamOrder(cache.device)
        self.outside = 0
        """Batches in flight that run outside the slots; the caller's to count."""
        self._changes = 0
        """Rises whenever a row changes."""
        self._loaders: ThreadPoolExecutor | None = None

    @abstractmethod
    def place(self, indices: Tensor, offsets: Tensor) -> Batch:
        """Check a batch in TBE convention; raises as `Layout.place`, or later what needs a look at the ids."""

    @abstractmethod
    def choose(self, batch: Any, *, train: bool = True) -> Arriving:
        """The first third of a `fetch`; `train`: its rows will change.

        Raises `CacheFullError` when the rows do not fit; then nothing has changed.
        """

    @abstractmethod
    def bring(self, arrival: Any) -> None:
        """The second: read the rows and put them into their slots. When it raises, the batch is to be `abandon`ed."""

    @abstractmethod
    def settle(self, arrival: Any, *, pin: bool) -> Fetched:
        """The last: the slots of the whole batch, pinned or not."""

    @abstractmethod
    def abandon(self, arrival: Any) -> None:
        """Give up what `choose` held."""

    @abstractmethod
    def count(self, arrival: Any) -> None:
        """Count the lookups of a batch that is used."""

    @abstractmethod
    def _unpin(self, fetched: Fetched, *, dirty: bool) -> None:
        """Give up the hold of a fetched batch."""

    @abstractmethod
    def _forget(self) -> None:
        """Empty every slot."""

    def fetch(self, batch: Batch, *, pin: bool) -> Fetched:
        """Bring all rows of a batch into slots; with `pin` they stay until `release`, else while `lock` is held.

        Raises `CacheFullError` when they do not fit; the batch can then run on `take_out`.
        """
        with self.lock:
            arrival = self.choose(batch, train=pin)
            try:
                self.bring(arrival)
                self.count(arrival)
            except BaseException:
                self.abandon(arrival)
                raise
            return self.settle(arrival, pin=pin)

    def release(self, fetched: Fetched, *, dirty: bool) -> None:
        """Give up the pins of a fetched batch; `dirty` when its rows have changed."""
        with self.lock:
            if fetched.hold is None:
                return
            self._changes += int(dirty)
            self._unpin(fetched, dirty=dirty)

    def _by_table(self, positions: Tensor) -> list[Tensor]:
        """Ascending positions split into local ids of each table."""
        cuts = torch.searchsorted(positions, self._slots.bases).tolist()
        return [positions[cuts[t] : cuts[t + 1]] - self._slots.base_of[t] for t in range(len(self.shards))]

    def _keyed(self, table: int, ids: Tensor, rows: Tensor) -> dict[str, Rows]:
        shard = self.shards[table]
        return {shard.key: (ids.cpu() + shard.row_offset, rows)}

    def _read_all(self, asked: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """Rows of local ids, on the CPU, of several tables from the store, read side by side."""
        if len(asked) == 1:
            table, ids = asked[0]
            return [stored_rows(self.store, self.shards[table], ids)]
        if self._loaders is None:
            self._loaders = ThreadPoolExecutor(min(len(self.shards), _LOADERS), thread_name_prefix="turbossd-load")
        tasks = [self._loaders.submit(stored_rows, self.store, self.shards[table], ids) for table, ids in asked]
        # All of them end before any failure is told, so that closing finds no read in flight.
        wait(tasks)
        return [task.result() for task in tasks]

    def _load(self, table: int, ids: Tensor) -> Tensor:
        """Bytes of absent rows."""
        return stored_rows(self.store, self.shards[table], ids.cpu())

    def read_rows(self, table: int, ids: Tensor) -> Tensor:
        """Current bytes of local `ids` [N] of a table, wherever they are: [N, row_bytes] uint8 on the CPU."""
        with self.lock:
            ids = ids.to(self.layout.device)
            slots = self._slots.slots_of(table, ids)
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
            absent: dict[int, Rows] = {}
            present = []
            for table, ids, rows in parts:
                ids = ids.to(self.layout.device)
                slots = self._slots.slots_of(table, ids)
                here = slots > 0
                resident = here.cpu()
                if not bool(resident.all()):
                    absent[table] = ids[~here].cpu(), rows[~resident]
                present.append((table, slots[here], rows[resident]))
            if absent:
                self._write_absent(absent)
            self._changes += 1
            for table, slots, rows in present:
                self.memory.write(table, slots, rows)
                self._slots.mark_dirty(slots + self._slots.slot_base_of[table])

    def _write_absent(self, rows: Mapping[int, Rows]) -> None:
        """Set rows (local ids on the CPU, by table) that are in no slot."""
        self.store.write(
            {k: v for table, (ids, each) in rows.items() for k, v in self._keyed(table, ids, each).items()}
        )

    def take_out(self, batch: Batch) -> Distinct:
        """Copies of the distinct rows of a batch, for a run outside the slots."""
        with self.lock:
            positions, places = torch.unique(batch.positions, return_inverse=True)
            ids = self._by_table(positions)
            starts = [0, *accumulate(each.numel() for each in ids)]
            slots = places + 1
            for run in batch.runs:
                slots[run.start : run.stop] -= starts[run.table]
            absent = [int((self._slots.slots_of(t, each) == 0).sum()) for t, each in enumerate(ids)]
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
                places = torch.arange(1, ids.numel() + 1, device=self.layout.device)
                memory.write(table, places, self.read_rows(table, ids))

    def put_back(self, distinct: Distinct, memory: SlotMemory) -> None:
        """The rows are what the copies in `memory` have become, which were up to date before."""
        places = [torch.arange(1, ids.numel() + 1, device=self.layout.device) for ids in distinct.ids]
        self._write_all(
            [(table, ids, memory.read(table, places[table])) for table, ids in enumerate(distinct.ids) if ids.numel()]
        )

    def _write_back(self, table: int, ids: Tensor) -> None:
        """Write the dirty ones of present rows to the store."""
        for part in torch.split(ids, _FLUSH_ROWS):
            slots = self._slots.slots_of(table, part)
            dirty = self._slots.is_dirty(table, slots)
            if bool(dirty.any()):
                self.store.write(self._keyed(table, part[dirty], self.memory.read(table, slots[dirty])))
                self._slots.clean(table, slots)

    def check_idle(self) -> None:
        """Raise `CacheFullError` when a batch in flight holds rows."""
        with self.lock:
            held = self._slots.pinned_slots
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
            self._forget()

    def _write_back_others(self, table: int) -> None:  # noqa: B027
        """Write dirty rows of a table that are in no slot to the store."""

    def flush(self) -> None:
        """Write every dirty row to the store and make the store durable."""
        with self.lock:
            for table in range(len(self.shards)):
                self._write_back(table, self._slots.dirty(table)[0])
                self._write_back_others(table)
            self.store.flush()

    def close(self) -> None:
        """End the threads that read."""
        if self._loaders is not None:
            self._loaders.shutdown()
            self._loaders = None

    @property
    def nbytes(self) -> int:
        """Bytes of fast memory: slots (with the reserved one of each table), slot map and bookkeeping."""
        held = sum((n + 1) * self.memory.slot_bytes(table) for table, n in enumerate(self._slots.slots))
        return held + self._slots.nbytes


__all__ = ["Arriving", "Distinct", "Fetched", "Slots", "TableRows"]
