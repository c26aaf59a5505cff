"""What the numbers of a device-resident cache mean: slot map entries, slot states and the fields of its tables."""

from __future__ import annotations

CLAIMED = 1 << 30
"""Set in the slot map entry of an absent row while one batch brings it in; slots of a table are below it."""

IN_DRAM = -(1 << 31)
"""Set where a row is in the DRAM tier: a negative entry."""

DIRTY_IN_DRAM = 1 << 29
"""Set where that row differs from the store's."""

PLACE = (1 << 29) - 1
"""The part of a negative entry that says where in the DRAM tier."""

READS, DIRTY, STAMP_SHIFT = 3, 4, 3
"""State of a slot, an int32: reads since it last moved on in its queue (2 bits), dirty mark, last batch's number.

Dirty is a row that the row store does not have; where the tier keeps copies, one that has none there."""

HELD = (1 << 28) - 1
"""The number of no batch: what has it is held until it gets another."""

LAST_STAMP = HELD
"""Batch numbers must stay below."""

# What the DRAM tier keeps of rows that leave slots: those that the row store does not have, all, or of every row that
# was ever there a copy, each in a place of its own, whose number is the row's id.
KEEP_CHANGED, KEEP_ALL, KEEP_COPIES = range(3)

# The header behind a row of the DRAM tier, an int64: who it is, and these marks; FREE where there is no row.
FREE = -1
HEADER_FRESH = 1 << 62
HEADER_DIRTY = 1 << 61
HEADER_ID = (1 << 61) - 1
HEADER_BYTES = 8

# Columns of the int64 tensor that describes tables.
BASE, ROWS, SLOT_BASE, SLOTS, SMALL_BASE, SMALL_SIZE, MAIN_BASE, DRAM, DRAM_STRIDE, HEADER, KEEP = range(11)
FIELDS = 11

# Columns of the int64 tensor that describes the parts of a row in a slot.
PART_AT, PART_STRIDE, PART_WORDS, PART_OFFSET = range(4)
PART_FIELDS = 4

# Columns of the int32 tensor that describes the queues of a table.
SMALL_HEAD, SMALL_COUNT, MAIN_HEAD, MAIN_COUNT = range(4)
QUEUE_FIELDS = 4

# Columns of the int64 tensor that says where everything is.
(
    AT_SLOT_MAP,
    AT_STATE,
    AT_MISSING,
    AT_CHOSEN,
    AT_OWNERS,
    AT_RINGS,
    AT_QUEUES,
    AT_GHOSTS,
    AT_TABLES,
    AT_PARTS,
    AT_FEATURES,
    AT_FEATURE_FIRST,
    AT_FEATURE_LIST,
    AT_COUNTS,
    AT_PUBLISHED,
    AT_REPORT,
    AT_DONE,
) = range(17)

# What a remap reports: flags first, then for each feature rows found in the DRAM tier, rows absent, and its end.
BAD_OFFSETS, OUT_OF_BOUNDS, MISSES = 1, 2, 4

GHOST_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)
"""2**64 divided by the golden ratio, made odd (D. Knuth, TAOCP 3, 6.4), as an int64."""

GHOST_SHIFT, GHOST_MASK, CELL_SHIFT, CELL_MASK = 12, (1 << 15) - 1, 32, (1 << 32) - 1
SMALL_PART, SMALL_MOST = 10, 4
"""A tenth of the rows belong into the small queue; it has places for a quarter of the slots."""

__all__ = [
    "AT_CHOSEN",
    "AT_COUNTS",
    "AT_DONE",
    "AT_FEATURES",
    "AT_FEATURE_FIRST",
    "AT_FEATURE_LIST",
    "AT_GHOSTS",
    "AT_MISSING",
    "AT_OWNERS",
    "AT_PARTS",
    "AT_PUBLISHED",
    "AT_QUEUES",
    "AT_REPORT",
    "AT_RINGS",
    "AT_SLOT_MAP",
    "AT_STATE",
    "AT_TABLES",
    "BAD_OFFSETS",
    "BASE",
    "CELL_MASK",
    "CELL_SHIFT",
    "CLAIMED",
    "DIRTY",
    "DIRTY_IN_DRAM",
    "DRAM",
    "DRAM_STRIDE",
    "FIELDS",
    "FREE",
    "GHOST_FACTOR",
    "GHOST_MASK",
    "GHOST_SHIFT",
    "HEADER",
    "HEADER_BYTES",
    "HEADER_DIRTY",
    "HEADER_FRESH",
    "HEADER_ID",
    "HELD",
    "IN_DRAM",
    "KEEP",
    "KEEP_ALL",
    "KEEP_CHANGED",
    "KEEP_COPIES",
    "LAST_STAMP",
    "MAIN_BASE",
    "MAIN_COUNT",
    "MAIN_HEAD",
    "MISSES",
    "OUT_OF_BOUNDS",
    "PART_AT",
    "PART_FIELDS",
    "PART_OFFSET",
    "PART_STRIDE",
    "PART_WORDS",
    "PLACE",
    "QUEUE_FIELDS",
    "READS",
    "ROWS",
    "SLOTS",
    "SLOT_BASE",
    "SMALL_BASE",
    "SMALL_COUNT",
    "SMALL_HEAD",
    "SMALL_MOST",
    "SMALL_PART",
    "SMALL_SIZE",
    "STAMP_SHIFT",
]
