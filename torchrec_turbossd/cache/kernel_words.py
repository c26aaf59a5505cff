"""What the kernels of a device-resident cache share: the numbers of `entries` as constants, and where things are.

The tensors of a cache never move, so that kernels are given one tensor of addresses in their stead: to look at every
argument of a launch takes longer than many a kernel runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchrec_turbossd.cache import entries

CLAIMED, IN_DRAM = tl.constexpr(entries.CLAIMED), tl.constexpr(entries.IN_DRAM)
DIRTY_IN_DRAM, PLACE = tl.constexpr(entries.DIRTY_IN_DRAM), tl.constexpr(entries.PLACE)
READS, DIRTY, SHIFT = tl.constexpr(entries.READS), tl.constexpr(entries.DIRTY), tl.constexpr(entries.STAMP_SHIFT)
FREE, FRESH, MODIFIED = (
    tl.constexpr(entries.FREE),
    tl.constexpr(entries.HEADER_FRESH),
    tl.constexpr(entries.HEADER_DIRTY),
)
BASE, ROWS, SLOT_BASE = tl.constexpr(entries.BASE), tl.constexpr(entries.ROWS), tl.constexpr(entries.SLOT_BASE)
SLOTS, SMALL_BASE, SMALL = (
    tl.constexpr(entries.SLOTS),
    tl.constexpr(entries.SMALL_BASE),
    tl.constexpr(entries.SMALL_SIZE),
)
MAIN_BASE, DRAM = tl.constexpr(entries.MAIN_BASE), tl.constexpr(entries.DRAM)
DRAM_STRIDE, HEADER = tl.constexpr(entries.DRAM_STRIDE), tl.constexpr(entries.HEADER)
FIELDS, PART_FIELDS = tl.constexpr(entries.FIELDS), tl.constexpr(entries.PART_FIELDS)
QUEUES = tl.constexpr(entries.QUEUE_FIELDS)
BAD_OFFSETS, OUT_OF_BOUNDS = tl.constexpr(entries.BAD_OFFSETS), tl.constexpr(entries.OUT_OF_BOUNDS)
MISSES = tl.constexpr(entries.MISSES)
FACTOR, GHOST_SHIFT = tl.constexpr(entries.GHOST_FACTOR), tl.constexpr(entries.GHOST_SHIFT)
GHOST_MASK, CELL_SHIFT = tl.constexpr(entries.GHOST_MASK), tl.constexpr(entries.CELL_SHIFT)
CELL_MASK = tl.constexpr(entries.CELL_MASK)
SMALL_PART = tl.constexpr(entries.SMALL_PART)

AT_SLOT_MAP, AT_STATE = tl.constexpr(entries.AT_SLOT_MAP), tl.constexpr(entries.AT_STATE)
AT_MISSING, AT_CHOSEN = tl.constexpr(entries.AT_MISSING), tl.constexpr(entries.AT_CHOSEN)
AT_OWNERS, AT_RINGS = tl.constexpr(entries.AT_OWNERS), tl.constexpr(entries.AT_RINGS)
AT_QUEUES, AT_GHOSTS = tl.constexpr(entries.AT_QUEUES), tl.constexpr(entries.AT_GHOSTS)
AT_TABLES, AT_PARTS = tl.constexpr(entries.AT_TABLES), tl.constexpr(entries.AT_PARTS)
AT_FEATURES, AT_FEATURE_FIRST = tl.constexpr(entries.AT_FEATURES), tl.constexpr(entries.AT_FEATURE_FIRST)
AT_FEATURE_LIST, AT_COUNTS = tl.constexpr(entries.AT_FEATURE_LIST), tl.constexpr(entries.AT_COUNTS)
AT_PUBLISHED, AT_REPORT = tl.constexpr(entries.AT_PUBLISHED), tl.constexpr(entries.AT_REPORT)
AT_DONE = tl.constexpr(entries.AT_DONE)
KEEP, KEEP_ALL = tl.constexpr(entries.KEEP), tl.constexpr(entries.KEEP_ALL)
KEEP_COPIES = tl.constexpr(entries.KEEP_COPIES)


@triton.jit
def int16_at(at, which: tl.constexpr):
    return tl.load(at + which).to(tl.pointer_type(tl.int16))


@triton.jit
def int32_at(at, which: tl.constexpr):
    return tl.load(at + which).to(tl.pointer_type(tl.int32))


@triton.jit
def int64_at(at, which: tl.constexpr):
    return tl.load(at + which).to(tl.pointer_type(tl.int64))


@triton.jit
def extent(offsets, feature, bags, lookups):
    """Where the lookups of a feature are, never outside the batch whatever the offsets hold."""
    first = tl.load(offsets + feature.to(tl.int64) * bags).to(tl.int64)
    last = tl.load(offsets + (feature.to(tl.int64) + 1) * bags).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), lookups)
    return first, tl.minimum(tl.maximum(last, first), lookups)


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
    "FACTOR",
    "FIELDS",
    "FREE",
    "FRESH",
    "GHOST_MASK",
    "GHOST_SHIFT",
    "HEADER",
    "IN_DRAM",
    "KEEP",
    "KEEP_ALL",
    "KEEP_COPIES",
    "MAIN_BASE",
    "MISSES",
    "MODIFIED",
    "OUT_OF_BOUNDS",
    "PART_FIELDS",
    "PLACE",
    "QUEUES",
    "READS",
    "ROWS",
    "SHIFT",
    "SLOTS",
    "SLOT_BASE",
    "SMALL",
    "SMALL_BASE",
    "SMALL_PART",
    "extent",
    "int16_at",
    "int32_at",
    "int64_at",
]
