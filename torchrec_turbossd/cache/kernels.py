"""Triton kernels that turn the ids of a batch into slots.

Each works on all tables of a module at once; a program belongs to one feature, so that what it must know of its table
is read once. No number of threads in a warp appears anywhere: what runs together is a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchrec_turbossd.cache.kernel_words import (
    AT_COUNTS,
    AT_DONE,
    AT_FEATURES,
    AT_MISSING,
    AT_PUBLISHED,
    AT_REPORT,
    AT_SLOT_MAP,
    AT_STATE,
    AT_TABLES,
    BAD_OFFSETS,
    BASE,
    CLAIMED,
    DIRTY,
    FIELDS,
    MISSES,
    OUT_OF_BOUNDS,
    READS,
    ROWS,
    SHIFT,
    SLOT_BASE,
    extent,
    int32_at,
    int64_at,
)

BLOCK, WARPS = 256, 2


@triton.jit
def _check_offsets(offsets, safe, feature, features, bags, lookups, part, parts, lane, BLOCK: tl.constexpr):
    """1 where offsets fall, or do not go from 0 to the number of lookups; each program judges a part.

    `safe` gets a copy of them.
    """
    wrong = tl.zeros((BLOCK,), tl.int32)
    start = feature.to(tl.int64) * bags
    for first in range(part * BLOCK, bags, parts * BLOCK):
        bag = first + lane
        here = tl.load(offsets + start + bag, mask=bag < bags, other=0)
        after = tl.load(offsets + start + bag + 1, mask=bag < bags, other=0)
        wrong |= (after < here).to(tl.int32)
        tl.store(safe + start + bag, here, mask=bag < bags)
    wrong |= ((feature == 0) & (tl.load(offsets) != 0)).to(tl.int32)
    end = tl.load(offsets + features.to(tl.int64) * bags)
    wrong |= ((feature == features - 1) & (end != lookups)).to(tl.int32)
    tl.store(safe + features.to(tl.int64) * bags, end)
    return tl.max(wrong, 0)


@triton.jit
def _publish(at, offsets, safe, slots, features, bags, lookups, lane, BLOCK: tl.constexpr):
    """What was counted goes to the host and to the kernels that follow, and counting starts anew."""
    counts, published = int32_at(at, AT_COUNTS), int32_at(at, AT_PUBLISHED)
    report = int32_at(at, AT_REPORT)
    for first in range(0, 1 + 2 * features, BLOCK):
        item = first + lane
        inside = item < 1 + 2 * features
        value = tl.load(counts + item, mask=inside, other=0, cache_modifier=".cg")
        tl.store(report + item, value, mask=inside)
        tl.store(published + item, value, mask=inside)
        tl.store(counts + item, 0, mask=inside)
    for first in range(0, features, BLOCK):
        item = first + lane
        inside = item < features
        end = tl.load(offsets + (item.to(tl.int64) + 1) * bags, mask=inside, other=0).to(tl.int32)
        tl.store(report + 1 + 2 * features + item, end, mask=inside)
    if (tl.load(published) & BAD_OFFSETS) > 0:
        # Bags may be of other features' lookups, or end before they begin, and the lookup may be on its way.
        for start in range(0, lookups, BLOCK):
            tl.store(slots + start + lane, 0, mask=start + lane < lookups)
        for start in range(0, features * bags + 1, BLOCK):
            tl.store(safe + start + lane, 0, mask=start + lane < features * bags + 1)


@triton.jit(
    do_not_specialize=["lookups", "bags", "stamp"], do_not_specialize_on_alignment=["ids", "offsets", "safe", "slots"]
)
def remap(
    at, ids, offsets, safe, slots, lookups, bags, stamp, TOUCH: tl.constexpr, MARK: tl.constexpr, BLOCK: tl.constexpr
):
    """Ids to slots (0: the row is in none), slots touched, each absent row listed and claimed once."""
    slot_map = int32_at(at, AT_SLOT_MAP)
    state = int32_at(at, AT_STATE)
    missing = int64_at(at, AT_MISSING)
    tables = int64_at(at, AT_TABLES)
    feature_table = int32_at(at, AT_FEATURES)
    counts = int32_at(at, AT_COUNTS)
    done = int32_at(at, AT_DONE)
    part, feature = tl.program_id(0), tl.program_id(1)
    parts, features = tl.num_programs(0), tl.num_programs(1)
    of = tables + tl.load(feature_table + feature) * FIELDS
    base, rows = tl.load(of + BASE), tl.load(of + ROWS)
    slot_base = tl.load(of + SLOT_BASE)
    start, stop = extent(offsets, feature, bags, lookups)
    lane = tl.arange(0, BLOCK)
    outside = tl.zeros((BLOCK,), tl.int32)
    missed = tl.zeros((BLOCK,), tl.int32)
    for first in range(start + part * BLOCK, stop, parts * BLOCK):
        item = first + lane
        inside = item < stop
        row = tl.load(ids + item, mask=inside, other=0).to(tl.int64)
        known = (row >= 0) & (row < rows)
        outside |= (inside & (known == 0)).to(tl.int32)
        row = tl.where(known, row, 0)
        entry = tl.load(slot_map + base + row, mask=inside, other=0)
        here = inside & (entry > 0) & (entry < CLAIMED)
        tl.store(slots + item, tl.where(here, entry, 0), mask=inside)
        if TOUCH:
            old = tl.load(state + slot_base + entry, mask=here, other=0)
            reads = tl.minimum((old & READS) + 1, READS)
            # Held slots stay so.
            new = tl.where((old >> SHIFT) >= stamp, old, (stamp << SHIFT) | (old & DIRTY) | reads)
            if MARK:
                new |= DIRTY
            tl.store(state + slot_base + entry, new, mask=here & (new != old))
        absent = inside & (here == 0)
        missed |= absent.to(tl.int32)
        if tl.max(absent.to(tl.int32), 0) > 0:
            unclaimed = absent & ((entry & CLAIMED) == 0)
            seen = tl.atomic_or(slot_map + base + row, CLAIMED, mask=unclaimed)
            mine = unclaimed & ((seen & CLAIMED) == 0)
            low = (mine & (seen < 0)).to(tl.int32)
            high = (mine & (seen >= 0)).to(tl.int32)
            # Rows of the DRAM tier are listed from the front of the feature's extent, the others from its end.
            front = tl.atomic_add(counts + 1 + feature, tl.sum(low, 0))
            back = tl.atomic_add(counts + 1 + features + feature, tl.sum(high, 0))
            tl.store(missing + start + front + tl.cumsum(low, 0) - 1, row, mask=low > 0)
            tl.store(missing + stop - back - tl.cumsum(high, 0), row, mask=high > 0)
    flags = BAD_OFFSETS * _check_offsets(offsets, safe, feature, features, bags, lookups, part, parts, lane, BLOCK)
    flags |= OUT_OF_BOUNDS * tl.max(outside, 0) | MISSES * tl.max(missed, 0)
    if flags > 0:
        tl.atomic_or(counts, flags)
    tl.debug_barrier()
    if tl.atomic_add(done, 1) == parts * features - 1:
        _publish(at, offsets, safe, slots, features, bags, lookups, lane, BLOCK)
        tl.store(done, 0)


@triton.jit(do_not_specialize=["lookups", "bags"], do_not_specialize_on_alignment=["ids", "offsets", "slots"])
def refill(at, ids, offsets, slots, lookups, bags, BLOCK: tl.constexpr):
    """Slots of those lookups that had none, now that their rows are in some."""
    slot_map = int32_at(at, AT_SLOT_MAP)
    tables = int64_at(at, AT_TABLES)
    feature_table = int32_at(at, AT_FEATURES)
    part, feature = tl.program_id(0), tl.program_id(1)
    of = tables + tl.load(feature_table + feature) * FIELDS
    base, rows = tl.load(of + BASE), tl.load(of + ROWS)
    start, stop = extent(offsets, feature, bags, lookups)
    for first in range(start + part * BLOCK, stop, tl.num_programs(0) * BLOCK):
        item = first + tl.arange(0, BLOCK)
        lacks = (item < stop) & (tl.load(slots + item, mask=item < stop, other=1) == 0)
        row = tl.load(ids + item, mask=lacks, other=0).to(tl.int64)
        row = tl.where((row >= 0) & (row < rows), row, 0)
        entry = tl.load(slot_map + base + row, mask=lacks, other=0)
        tl.store(slots + item, tl.where(entry < CLAIMED, tl.maximum(entry, 0), 0), mask=lacks)


@triton.jit(do_not_specialize=["lookups", "bags"], do_not_specialize_on_alignment=["offsets"])
def unclaim(at, offsets, lookups, bags, BLOCK: tl.constexpr):
    """Give up the claims on what a remap listed."""
    missing = int64_at(at, AT_MISSING)
    slot_map = int32_at(at, AT_SLOT_MAP)
    tables = int64_at(at, AT_TABLES)
    feature_table = int32_at(at, AT_FEATURES)
    published = int32_at(at, AT_PUBLISHED)
    part, feature = tl.program_id(0), tl.program_id(1)
    base = tl.load(tables + tl.load(feature_table + feature) * FIELDS + BASE)
    start, stop = extent(offsets, feature, bags, lookups)
    low = tl.load(published + 1 + feature)
    high = tl.load(published + 1 + tl.num_programs(1) + feature)
    for first in range(part * BLOCK, low + high, tl.num_programs(0) * BLOCK):
        item = first + tl.arange(0, BLOCK)
        inside = item < low + high
        row = tl.load(missing + tl.where(item < low, start + item, stop - 1 - (item - low)), mask=inside, other=0)
        entry = tl.load(slot_map + base + row, mask=inside, other=0)
        # A row that came into a slot meanwhile has no claim.
        claimed = inside & ((entry < 0) | (entry >= CLAIMED))
        tl.store(slot_map + base + row, entry & ~CLAIMED, mask=claimed)


@triton.jit(do_not_specialize=["lookups", "bags", "stamp"], do_not_specialize_on_alignment=["offsets", "slots"])
def restamp(at, offsets, slots, lookups, bags, stamp, BLOCK: tl.constexpr):
    """Slots of a batch get another batch's number."""
    part, feature = tl.program_id(0), tl.program_id(1)
    table = tl.load(int32_at(at, AT_FEATURES) + feature)
    state = int32_at(at, AT_STATE) + tl.load(int64_at(at, AT_TABLES) + table * FIELDS + SLOT_BASE)
    start, stop = extent(offsets, feature, bags, lookups)
    for first in range(start + part * BLOCK, stop, tl.num_programs(0) * BLOCK):
        item = first + tl.arange(0, BLOCK)
        slot = tl.load(slots + item, mask=item < stop, other=0)
        # 0 for a row that is still on its way.
        word = tl.load(state + slot, mask=slot > 0, other=0)
        tl.store(state + slot, (stamp << SHIFT) | (word & (READS | DIRTY)), mask=slot > 0)


__all__ = ["BLOCK", "WARPS", "refill", "remap", "restamp", "unclaim"]
