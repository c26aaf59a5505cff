"""Bytes of memory that one table or shard takes, and a row store behind it: on an accelerator, and on the host.

All of it is counted as it is when every row was asked for: untouched pages of a slot map cost nothing on a CPU machine.
"""

from __future__ import annotations

from typing import Protocol

from torchrec_turbossd.errors import BudgetError

DEVICE_BYTES_PER_SLOT = 14
"""Bookkeeping of one slot where rows are: owner (8), pin count (4), dirty mark (1), reads (1)."""

HOST_BYTES_PER_SLOT = 12
"""What the default eviction policy keeps of one slot on the host: rings (6), place (4), ghost (2)."""

BYTES_PER_SLOT = DEVICE_BYTES_PER_SLOT + HOST_BYTES_PER_SLOT
"""Bookkeeping of one slot, wherever it is; on a CPU machine all of it is in the one memory."""

SLOT_MAP_BYTES_PER_ROW = 4
"""One int32 slot map entry for each row of the shard, cached or not; where rows are."""

LOOKUP_BYTES = 28
"""One lookup of a batch in flight, where rows are: position (8), slot found (4), slot (8), pinned slot (8)."""

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


def slot_bytes(row_bytes: int, compute_device: str = "cpu") -> int:
    """Bytes of fast memory that one more slot takes: its row, and its bookkeeping that is there.

    Args:
        row_bytes: weights and optimizer state of one row.
        compute_device: where slots are, a device type.
    """
    return row_bytes + BYTES_PER_SLOT - host_slot_bytes(compute_device)


def host_slot_bytes(compute_device: str = "cpu") -> int:
    """Bytes of host memory that one more slot takes beside fast memory; 0 where that is the host's."""
    return 0 if compute_device == "cpu" else HOST_BYTES_PER_SLOT


def shard_fast_bytes(slots: int, rows: int, row_bytes: int, compute_device: str = "cpu") -> int:
    """Bytes of fast memory (HBM on CUDA, DRAM on a CPU machine) of a shard with `slots` usable slots.

    Counts the reserved slot 0, the bookkeeping of every slot that is in fast memory, and the slot map over all `rows`
    of the shard. A shard without rows takes nothing. Batches in flight come on top (`LOOKUP_BYTES`), and what TorchRec
    counts as input and output.

    Args:
        slots: usable slots, 0 to `rows`.
        rows: rows of the shard.
        row_bytes: weights and optimizer state of one row of the shard.
        compute_device: where slots are, a device type; on anything but "cpu" a part of the bookkeeping is on the host.

    Raises:
        BudgetError: a negative number, or more slots than rows.
    """
    _check(slots, rows, row_bytes)
    if rows == 0:
        return 0
    return (slots + 1) * slot_bytes(row_bytes, compute_device) + SLOT_MAP_BYTES_PER_ROW * rows


def shard_host_bytes(slots: int, rows: int, compute_device: str = "cpu") -> int:
    """Bytes of host memory that a shard takes beside `shard_fast_bytes`.

    Counts a bit for each row, which says whether the store may have it, and on an accelerator the bookkeeping of every
    slot that is on the host. Args and errors: as `shard_fast_bytes`.
    """
    _check(slots, rows, 0)
    if rows == 0:
        return 0
    return (slots + 1) * host_slot_bytes(compute_device) + -(-rows // 8)


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
        raise BudgetError(f"a shard has 0 <= slots <= rows, got {slots} slots, {rows} rows, {row_bytes} bytes a row")


__all__ = [
    "BYTES_PER_SLOT",
    "DEVICE_BYTES_PER_SLOT",
    "HOST_BYTES_PER_SLOT",
    "LOOKUP_BYTES",
    "PENDING_BYTES",
    "SLOT_MAP_BYTES_PER_ROW",
    "STORE_BYTES_PER_ROW",
    "StoreSettings",
    "host_slot_bytes",
    "shard_fast_bytes",
    "shard_host_bytes",
    "slot_bytes",
    "store_bytes",
]
