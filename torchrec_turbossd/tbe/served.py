"""What is served at one time: a store, its tables, and the slots of the rows in use, which change hands here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from torchrec_turbossd.errors import CacheFullError
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.in_flight import InFlight
from torchrec_turbossd.tbe.stored import ReadableStore

_AHEAD = 16
"""At most this part of a table's slots is emptied before it is needed."""


class UpdatableStore(ReadableStore, Protocol):
    """The part of a row store that serving uses; `write` in two steps."""

    def commit(self, batch: Mapping[str, Rows]) -> Any:
        """Make rows survive the end of the process; no read sees them yet."""

    def publish(self, committed: Any) -> None:
        """Let every later read see what was committed; does no I/O and waits for nothing."""


class SharedSlots(Protocol):
    """What is asked of an account of slots here; `SlotCache` and `DeviceCache` say what it means."""

    slots: list[int]
    device: torch.device
    bases: Tensor
    base_of: list[int]

    @property
    def nbytes(self) -> int: ...
    def slots_of(self, table: int, ids: Tensor) -> Tensor: ...
    def free(self, table: int) -> int: ...
    def take(self, table: int, count: int) -> Tensor: ...
    def give(self, table: int, slots: Tensor) -> None: ...
    def evict(self, table: int, count: int) -> Tensor: ...
    def admit(self, table: int, ids: Tensor, slots: Tensor) -> None: ...
    def release_all(self, table: int) -> Tensor: ...
    def beside(self) -> Any: ...
    def replace(self, other: Any) -> None: ...


@dataclass
class Served:
    """One version of all rows. The owner holds the lock around everything but the store's reads.

    Attributes:
        cache: which rows are in which slots.
        in_flight: lookups that slots which are left must wait for.
        capacity: for each table, slots that are this one's own, held, free or waiting.
        waiting: for each table, slots that will be free once the lookups in flight have ended.
        claims: for each batch that waits for slots, first come first, how many it needs of each table.
        heir: who takes the slots that come back.
    """

    store: UpdatableStore
    shards: list[TableShard]
    cache: SharedSlots
    in_flight: InFlight
    capacity: list[int]
    waiting: list[int]
    claims: dict[object, Sequence[int]] = field(default_factory=dict)
    heir: Served | None = None

    @classmethod
    def first(cls, store: UpdatableStore, shards: list[TableShard], cache: SharedSlots, in_flight: InFlight) -> Served:
        """Served in all slots of `cache`."""
        return cls(store, shards, cache, in_flight, list(cache.slots), [0] * len(shards))

    def beside(self, store: UpdatableStore, shards: list[TableShard]) -> Served:
        """Another version over the same slots, of which it has none yet."""
        return Served(store, shards, self.cache.beside(), self.in_flight, [0] * len(shards), [0] * len(shards))

    def give(self, table: int, slots: Tensor) -> None:
        """These slots, counted as this one's own, are free, here or at the heir's."""
        if self.heir is not None:
            self.heir.adopt(table, slots)
        else:
            self.cache.give(table, slots)

    def adopt(self, table: int, slots: Tensor) -> None:
        """These slots are this one's own from now on, and free."""
        if self.heir is not None:
            self.heir.adopt(table, slots)
            return
        self.capacity[table] += slots.numel()
        self.cache.give(table, slots)

    def pass_on(self) -> None:
        """Slots that batches held when this version was left go to the heir, as far as none holds them now."""
        if self.heir is not None:
            for table in range(len(self.shards)):
                slots = self.cache.release_all(table)
                self.capacity[table] -= slots.numel()
                self.heir.adopt(table, slots)

    def give_later(self, table: int, slots: Tensor) -> None:
        """Make slots that were taken out free once no lookup in flight uses them."""
        if self.in_flight.no_lookup:
            self.give(table, slots)
            return
        self.waiting[table] += slots.numel()

        def give() -> None:
            self.waiting[table] -= slots.numel()
            self.give(table, slots)

        self.in_flight.after_lookups(give)

    def unclaimed(self, table: int, *, before: object = None) -> int:
        """Free slots that no batch waits for, or none that came before the waiting batch `before`."""
        earlier = takewhile(lambda claim: claim[0] is not before, self.claims.items())
        return self.cache.free(table) - sum(needed[table] for _, needed in earlier)

    def evict(self, table: int, count: int, *, before: object = None) -> None:
        """Empty slots, where needed, so that `count` are or will be free beside those that others wait for."""
        short = count - self.waiting[table] - self.unclaimed(table, before=before)
        if short > 0:
            self.give_later(table, self.cache.evict(table, short))

    def make_room(self, needed: Sequence[int], batch: object) -> bool:
        """Empty slots until each table has as many free ones as a batch needs; False when some are not free yet.

        Raises:
            CacheFullError: there are not so many slots.
        """
        for table, count in enumerate(needed):
            if count <= self.capacity[table]:
                self.evict(table, count, before=batch)
            if count > self.cache.free(table) + self.waiting[table]:
                name = self.shards[table].table.name
                raise CacheFullError(
                    f"table {name!r}: the rows of a batch, {count} of them read, do not fit in "
                    f"{self.capacity[table]} slots"
                )
        ready = all(count <= self.unclaimed(table, before=batch) for table, count in enumerate(needed))
        if ready and not self.in_flight.no_lookup:
            # With other lookups in flight an emptied slot is not free at once: some for the batch that comes next.
            for table, count in enumerate(needed):
                self.evict(table, count + min(count, self.capacity[table] // _AHEAD), before=batch)
        return ready


__all__ = ["Served", "SharedSlots", "UpdatableStore"]
