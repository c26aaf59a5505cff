"""Bytes of fast memory that the slots of one table or shard take."""

from __future__ import annotations

from torchrec_turbossd.errors import BudgetError

BYTES_PER_SLOT = 26
"""Bookkeeping of one slot: owner (8), pin count (4), dirty mark (1), the default eviction policy's (13)."""

SLOT_MAP_BYTES_PER_ROW = 4
"""One int32 slot map entry for each row of the shard, cached or not."""


def slot_bytes(row_bytes: int) -> int:
    """Bytes that one more slot takes: its row and its bookkeeping."""
    return row_bytes + BYTES_PER_SLOT


def shard_fast_bytes(slots: int, rows: int, row_bytes: int) -> int:
    """Bytes of fast memory (HBM on CUDA, DRAM on a CPU machine) of a shard with `slots` usable slots.

    Counts the reserved slot 0, the bookkeeping of every slot, and the slot map over all `rows` of the shard. A shard
    without rows takes nothing.

    Args:
        slots: usable slots, 0 to `rows`.
        rows: rows of the shard.
        row_bytes: weights and optimizer state of one row of the shard.

    Raises:
        BudgetError: a negative number, or more slots than rows.
    """
    if min(slots, rows, row_bytes) < 0 or slots > rows:
        raise BudgetError(f"a shard has 0 <= slots <= rows, got {slots} slots, {rows} rows, {row_bytes} bytes a row")
    if rows == 0:
        return 0
    return (slots + 1) * slot_bytes(row_bytes) + SLOT_MAP_BYTES_PER_ROW * rows


__all__ = ["BYTES_PER_SLOT", "SLOT_MAP_BYTES_PER_ROW", "shard_fast_bytes", "slot_bytes"]
