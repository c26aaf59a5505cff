"""Rows of a serving TBE: looked up by many threads at once while others update them or exchange them all.

One lock is held briefly, never while the store or the TBE works. Three rules make every lookup see whole updates of
one version of the rows only:

- The bytes of a slot do not change while a lookup that was given it is in flight: an update puts new rows into fresh
  slots, and a slot that was left is used again when the lookups begun before have ended.
- A batch is given all of its slots at one moment under the lock. What it had to read from the store before, without
  the lock, is brought up to date with the updates made since.
- An update becomes visible, in the store and in the slots, at one moment under the lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tbe.lookup_rows import LookupRows

_SMALL_UPDATE, _MOST_FRESH = 4096, 4


class ServingRows(LookupRows):
    """Slots in front of a store, looked up and updated. Args: as `LookupRows`."""

    def update(self, batch: Mapping[int, Rows]) -> None:
        keyed = {self.shards[t].key: (ids + self.shards[t].row_offset, rows) for t, (ids, rows) in batch.items()}
        committed = self.served.store.commit(keyed)
        # It is committed and so it is made, whatever happens now: rows without a fresh slot leave theirs.
        fresh: dict[int, tuple[Tensor, Tensor]] = {}
        try:
            with contextlib.suppress(Exception):
                self._fill_fresh(batch, fresh)
        finally:
            with self.lock:
                self.served.store.publish(committed)
                self.in_flight.updated(batch)
                for table, (ids, rows) in batch.items():
                    try:
                        self._flip(table, ids, rows, fresh.get(table))
                    except Exception:
                        self._leave(table, ids)

    def _fill_fresh(self, batch: Mapping[int, Rows], fresh: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Put those of the new rows that are in slots into fresh ones: by table, their (ids, slots)."""
        for table, (ids, rows) in batch.items():
            with self.lock:
                old = self.cache.slots_of(table, ids)
                here = old > 0
                count = int(here.sum())
                if not count or (self.in_flight.no_lookup and count <= _SMALL_UPDATE):
                    continue
                slots = self._take_fresh(table, old[here])
            try:
                self.memory.write(table, slots, rows[here][: slots.numel()])
            except BaseException:
                with self.lock:
                    self.served.give(table, slots)
                raise
            fresh[table] = (ids[here][: slots.numel()], slots)

    def _take_fresh(self, table: int, old: Tensor) -> Tensor:
        """Slots for rows that are in `old` ones, as many as there can be without emptying the table for them."""
        count = min(old.numel(), max(self.served.unclaimed(table), self.served.capacity[table] // _MOST_FRESH))
        at = old + self.cache.slot_base_of[table]
        self.cache.pin(at, 1)
        try:
            self.served.evict(table, count)
        finally:
            self.cache.pin(at, -1)
        if self.served.unclaimed(table) < count:
            self.in_flight.sleep()
        return self.cache.take(table, max(0, min(count, self.served.unclaimed(table))))

    def _flip(self, table: int, ids: Tensor, rows: Tensor, fresh: tuple[Tensor, Tensor] | None) -> None:
        """From now on these ids have these rows, in their fresh slots if they have any."""
        if fresh is not None:
            still = self.cache.slots_of(table, fresh[0]) > 0
            moved, slots = fresh[0][still], fresh[1][still]
            self.served.give(table, fresh[1][~still])
            self.served.give_later(table, self.cache.move(table, moved, slots))
            left = ~torch.isin(ids, moved)
            ids, rows = ids[left], rows[left]
        slots = self.cache.slots_of(table, ids)
        here = slots > 0
        if self.in_flight.no_lookup:
            with contextlib.suppress(Exception):
                self.memory.write(table, slots[here], rows[here])
                return
        self._leave(table, ids)

    def _leave(self, table: int, ids: Tensor) -> None:
        """Rows of these ids are in slots no more."""
        here = ids[self.cache.slots_of(table, ids) > 0]
        self.served.give_later(table, self.cache.remove(table, here))


__all__ = ["ServingRows"]
