"""Another version of all rows, warmed in part of the slots while the present one is served, then put in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.in_flight import in_small_steps
from torchrec_turbossd.tbe.served import Served, UpdatableStore
from torchrec_turbossd.tbe.served_rows import ServedRows
from torchrec_turbossd.tbe.stored import stored_rows

_STEPS = {"cpu": 512, "cuda": 4096}
"""Rows that change hands at once: lookups, or an update, wait for no more. A GPU takes no longer for many."""


class Successor:
    """What will be served next. Lookups go on in every method; updates wait while some rows are warmed.

    `squeeze`, `warm`, `take_over`, `retire`; `abandon` where something fails before `take_over`. All but `put` and
    `carry` are called by one thread.

    Args:
        rows: the slots, serving another version.
        store: holds the new version.
        shards: the same tables, with the new version's rules for rows never written.
    """

    def __init__(self, rows: ServedRows, store: UpdatableStore, shards: Sequence[TableShard]) -> None:
        self._rows, self._old = rows, rows.served
        self._new = self._old.beside(store, list(shards))
        self._own = threading.Lock()
        self._step = _STEPS[rows.device.type]
        # calloc: pages that no update reaches are never touched.
        self._carried = [torch.from_numpy(np.zeros(s.rows, dtype=np.bool_)) for s in shards]

    def squeeze(self) -> None:
        """Free half of the slots, the coldest rows first, for the new version."""
        for table, capacity in enumerate(list(self._old.capacity)):
            left = capacity // 2
            while left > 0:
                with in_small_steps():
                    taken = self._take_from_old(table, min(left, self._step))
                if not taken:
                    break
                left -= taken
        self._until_all_came()

    def _take_from_old(self, table: int, count: int) -> int:
        """Let the new version have slots of the old one, at once or when lookups in flight have ended; how many."""
        rows, old, new = self._rows, self._old, self._new
        with rows.lock, rows.on_stream():
            slots = old.cache.take(table, count)
            self._pass_on(table, slots, new.adopt)
            evicted = old.cache.evict(table, count - slots.numel())
            self._pass_on(table, evicted, lambda t, s: rows.in_flight.after_lookups(lambda: new.adopt(t, s)))
        return slots.numel() + evicted.numel()

    def _pass_on(self, table: int, slots: Tensor, give: Callable[[int, Tensor], None]) -> None:
        self._old.capacity[table] -= slots.numel()
        give(table, slots)

    def _until_all_came(self) -> None:
        came = threading.Event()
        with self._rows.lock:
            self._rows.in_flight.after_lookups(came.set)
        came.wait()

    def warm(self, table: int, ids: Tensor, rows: Tensor | None = None) -> None:
        """Put rows into slots as long as there are free ones.

        Args:
            ids: [N] int64, distinct local ids on the CPU, the hottest first. Those that are there already are passed.
            rows: [N, row_bytes] uint8, as they were in the new store before any `carry`; None: read there.
        """
        cache = self._new.cache
        absent = cache.slots_of(table, ids.to(cache.device)).cpu() == 0
        wanted = torch.nonzero(absent).flatten()[: cache.free(table)]
        # The hottest come last and so leave last.
        for places in reversed(wanted.split(self._step)):
            # An update must not come between the read and the slot.
            with in_small_steps(), self._own:
                part = ids[places]
                data = self._read(table, part) if rows is None else rows[places]
                if rows is not None:
                    changed = self._carried[table][part]
                    data[changed] = self._read(table, part[changed])
                with self._rows.alone_on_stream():
                    self._admit(table, part, data)

    def _admit(self, table: int, ids: Tensor, rows: Tensor) -> None:
        cache = self._new.cache
        slots = cache.take(table, ids.numel())
        try:
            self._rows.memory.write(table, slots, rows)
        except BaseException:
            cache.give(table, slots)
            raise
        cache.admit(table, ids.flip(0).to(cache.device), slots.flip(0))

    def _read(self, table: int, ids: Tensor) -> Tensor:
        return stored_rows(self._new.store, self._new.shards[table], ids)

    def put(self, batch: Mapping[int, Rows]) -> None:
        """Set rows of tables (by place) in the new version, but for those that were carried. Before `take_over`."""
        with self._own:
            kept = {}
            for table, (ids, rows) in batch.items():
                own = ~self._carried[table][ids]
                kept[table] = ids[own], rows[own]
            self._set(kept)

    def carry(self, batch: Mapping[int, Rows]) -> None:
        """Set rows of tables (by place) that were updated in the present version. Before `take_over`."""
        with self._own:
            self._set(batch)
            for table, (ids, _) in batch.items():
                self._carried[table][ids] = True

    def _set(self, batch: Mapping[int, Rows]) -> None:
        new = self._new
        keyed = {new.shards[t].key: (ids + new.shards[t].row_offset, rows) for t, (ids, rows) in batch.items()}
        new.store.publish(new.store.commit(keyed))
        with self._rows.alone_on_stream():
            for table, (ids, rows) in batch.items():
                slots = new.cache.slots_of(table, ids.to(new.cache.device))
                here = slots > 0
                if bool(here.any()):
                    self._rows.memory.write(table, slots[here], rows[here.cpu()])

    def take_over(self) -> None:
        """Serve the new version from now on; lookups in flight end on the old one's slots. No update is in flight."""
        with self._rows.lock, self._rows.on_stream():
            self._new.cache.replace(self._old.cache)
            self._rows.served = self._new

    def retire(self) -> None:
        """Wait for lookups of the old version and reads of its store to end, then let the new one have all slots."""
        self._rows.in_flight.wait_for_all()
        with self._rows.lock:
            # Slots of the old version that come back from now on go to the new one.
            self._old.heir = self._new
        self._move_all(self._old, self._new)

    def abandon(self) -> None:
        """Give the slots back; the old version is served as before."""
        with self._rows.lock:
            self._new.heir = self._old
        self._rows.in_flight.wait_for_all()
        self._move_all(self._new, self._old)

    def _move_all(self, source: Served, target: Served) -> None:
        for table in range(len(source.shards)):
            with self._rows.alone_on_stream():
                slots = source.cache.release_all(table)
                source.capacity[table] -= slots.numel()
            with self._rows.lock, self._rows.on_stream():
                target.adopt(table, slots)


__all__ = ["Successor"]
