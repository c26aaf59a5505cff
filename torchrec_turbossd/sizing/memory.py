"""Bytes of memory that one table or shard takes, and a row store behind it: on an accelerator, and on the host.

All of it is counted as it is when every row was asked for: untouched pages of a slot map cost nothing on a CPU machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torchrec_turbossd.cache.dram_tier import LEAST_DRAM_ROWS, dram_row_bytes
from torchrec_turbossd.cache.entries import PLACE
from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.tables import MAX_SLOTS

BYTES_PER_SLOT = 26
"""Bookkeeping of one slot on a CPU machine: owner (8), pin count (4), dirty mark (1), reads (1), and what the default
eviction policy keeps, rings (6), place (4), ghost (2)."""

DEVICE_BYTES_PER_SLOT = 19
"""Bookkeeping of one slot on an accelerator, all of it there: owner (8), state (4), rings (5), ghost (2)."""

SLOT_MAP_BYTES_PER_ROW = 4
"""One int32 slot map entry for each row of the shard, cached or not; where rows are."""

LOOKUP_BYTES = 28
"""One lookup of a batch in flight on a CPU machine: position (8), slot found (4), slot (8), pinned slot (8)."""

DEVICE_LOOKUP_BYTES = 20
"""The same on an accelerator: slot (8), and where it may be missing its row (8) and the slot chosen for it (4)."""

MOST_DRAM_ROWS = MOST_DEVICE_SLOTS = PLACE
"""Rows of one table that host memory holds on a GPU, and slots there, at most: numbers of both have 29 bits."""

STORE_BYTES_PER_ROW = 3
"""Index and filter of a row that was written to a store's files: 1.7 to 3.0 measured, for rows of 68 to 516 bytes."""

PENDING_BYTES = 256 << 20
"""Rows on their way into a store that a module keeps in memory, at most."""


class StoreSettings(Protocol):
    """The settings of a row store that bound its memory; `RocksOptions` has them."""

    @property
    def write_buffer_bytes(self) -> int:
        """Of one buffer of one table."""

    @property
    def max_write_buffers(self) -> int:
        """Of one table."""

    @property
    def total_write_buffer_bytes(self) -> int:
        """Of all tables together."""

    @property
    def block_cache_bytes(self) -> int:
        """Of all tables together."""


def has_dram_tier(compute_device: str) -> bool:
    """Whether host memory holds rows between slots and store, on this type of device."""
    return compute_device == "cuda"


def most_slots(rows: int, compute_device: str = "cpu") -> int:
    """Slots beyond which a table of `rows` rows can have no more."""
    return min(rows, MOST_DEVICE_SLOTS if has_dram_tier(compute_device) else MAX_SLOTS)


def slot_bytes(row_bytes: int, compute_device: str = "cpu") -> int:
    """Bytes of fast memory that one more slot takes: its row, and its bookkeeping; nothing of it is elsewhere.

    Args:
        row_bytes: weights and optimizer state of one row.
        compute_device: where slots are, a device type.
    """
    return row_bytes + (BYTES_PER_SLOT if compute_device == "cpu" else DEVICE_BYTES_PER_SLOT)


def lookup_bytes(compute_device: str = "cpu") -> int:
    """Bytes of fast memory that one lookup of a batch in flight takes."""
    return LOOKUP_BYTES if compute_device == "cpu" else DEVICE_LOOKUP_BYTES


def least_dram_slots(rows: int) -> int:
    """Rows of the DRAM tier that a shard of `rows` rows has in any case."""
    return min(rows, LEAST_DRAM_ROWS)


def most_dram_slots(slots: int, rows: int) -> int:
    """Rows of the DRAM tier beyond which more bring no hits: those that have no slot, and the least."""
    return max(least_dram_slots(rows), min(rows - slots, MOST_DRAM_ROWS))


def dram_slots_in(budget_bytes: int, shards: Sequence[tuple[int, int, int]]) -> list[int]:
    """Rows of the DRAM tier of each shard of one table that together fit `budget_bytes`: the same share of the rows
    without a slot of all of them.

    Args:
        budget_bytes: of host memory, 0 or more.
        shards: (slots, rows, row bytes) of each. A shard gets its least rows even where the budget holds fewer.
    """
    whole = sum((rows - slots) * dram_row_bytes(size) for slots, rows, size in shards)
    found = []
    for slots, rows, _ in shards:
        share = rows - slots if budget_bytes >= whole else (rows - slots) * budget_bytes // whole
        found.append(min(max(share, least_dram_slots(rows)), most_dram_slots(slots, rows)))
    return found


def shard_fast_bytes(slots: int, rows: int, row_bytes: int, compute_device: str = "cpu") -> int:
    """Bytes of fast memory (HBM on CUDA, DRAM on a CPU machine) of a shard with `slots` usable slots.

    Counts the reserved slot 0, the bookkeeping of every slot, and the slot map over all `rows` of the shard. A shard
    without rows takes nothing. Batches in flight come on top (`lookup_bytes`), and what TorchRec counts as input and
    output.

    Args:
        slots: usable slots, 0 to `rows`.
        rows: rows of the shard.
        row_bytes: weights and optimizer state of one row of the shard.
        compute_device: where slots are, a device type.

    Raises:
        BudgetError: a negative number, or more slots than rows.
    """
    _check(slots, rows, row_bytes)
    if rows == 0:
        return 0
    return (slots + 1) * slot_bytes(row_bytes, compute_device) + SLOT_MAP_BYTES_PER_ROW * rows


def shard_host_bytes(rows: int, row_bytes: int, compute_device: str = "cpu", dram_slots: int = 0) -> int:
    """Bytes of host memory that a shard takes beside `shard_fast_bytes`.

    Counts a bit for each row, which says whether the store may have it, and on CUDA the DRAM tier: `dram_slots` rows,
    and never fewer than `least_dram_slots`.

    Args:
        rows: rows of the shard. A shard without rows takes nothing.
        row_bytes: weights and optimizer state of one row, as the store has it.
        compute_device: where slots are, a device type.
        dram_slots: rows of the DRAM tier, 0 to `rows`; 0 for no more than the least.

    Raises:
        BudgetError: a negative number, more rows in the tier than there are, or a tier on another device than CUDA.
    """
    _check(dram_slots, rows, row_bytes)
    tier = 0
    if has_dram_tier(compute_device):
        tier = max(dram_slots, least_dram_slots(rows)) * dram_row_bytes(row_bytes)
    elif dram_slots:
        raise BudgetError(f"only CUDA has a DRAM tier, got {dram_slots} of its rows on {compute_device!r}; pass 0")
    return tier + -(-rows // 8)


def store_bytes(tables: int, rows: int, settings: StoreSettings, pending_bytes: int = PENDING_BYTES) -> int:
    """The most host memory that one row store takes, beside what its shards take.

    Counts full write buffers, the block cache, rows on their way into the store, and index and filter of every row.
    RocksDB may exceed its limit on write buffers for a moment, by an eighth in what was measured.

    Args:
        tables: how many it holds.
        rows: of all of them together, as if all were written.
        settings: `RocksOptions`.
        pending_bytes: rows and ids that wait to be written.
    """
    each = settings.write_buffer_bytes * settings.max_write_buffers
    buffers = min(tables * each, settings.total_write_buffer_bytes)
    return buffers + settings.block_cache_bytes + pending_bytes + STORE_BYTES_PER_ROW * rows


def _check(slots: int, rows: int, row_bytes: int) -> None:
    if min(slots, rows, row_bytes) < 0 or slots > rows:
        raise BudgetError(
            f"a shard has 0 <= slots <= rows in each tier, got {slots} slots, {rows} rows, {row_bytes} bytes a row"
        )


__all__ = [
    "BYTES_PER_SLOT",
    "DEVICE_BYTES_PER_SLOT",
    "DEVICE_LOOKUP_BYTES",
    "LEAST_DRAM_ROWS",
    "LOOKUP_BYTES",
    "MOST_DEVICE_SLOTS",
    "MOST_DRAM_ROWS",
    "PENDING_BYTES",
    "SLOT_MAP_BYTES_PER_ROW",
    "STORE_BYTES_PER_ROW",
    "StoreSettings",
    "dram_row_bytes",
    "dram_slots_in",
    "has_dram_tier",
    "least_dram_slots",
    "lookup_bytes",
    "most_dram_slots",
    "most_slots",
    "shard_fast_bytes",
    "shard_host_bytes",
    "slot_bytes",
    "store_bytes",
]
