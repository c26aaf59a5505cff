"""Triton kernels that bring rows of the DRAM tier into slots: which slots, and the exchange.

A program of `choose` belongs to a table, one of `exchange` to a feature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchrec_turbossd.cache.kernel_words import (
    AT_CHOSEN,
    AT_FEATURE_FIRST,
    AT_FEATURE_LIST,
    AT_FEATURES,
    AT_GHOSTS,
    AT_MISSING,
    AT_OWNERS,
    AT_PARTS,
    AT_PUBLISHED,
    AT_QUEUES,
    AT_REPORT,
    AT_RINGS,
    AT_SLOT_MAP,
    AT_STATE,
    AT_TABLES,
    BAD_OFFSETS,
    BASE,
    CELL_MASK,
    CELL_SHIFT,
    DIRTY,
    DIRTY_IN_DRAM,
    DRAM,
    DRAM_STRIDE,
    FACTOR,
    FIELDS,
    FREE,
    FRESH,
    GHOST_MASK,
    GHOST_SHIFT,
    HEADER,
    IN_DRAM,
    KEEP,
    KEEP_ALL,
    KEEP_COPIES,
    MAIN_BASE,
    MODIFIED,
    PART_FIELDS,
    PLACE,
    QUEUES,
    READS,
    SHIFT,
    SLOT_BASE,
    SLOTS,
    SMALL,
    SMALL_BASE,
    SMALL_PART,
    extent,
    int16_at,
    int32_at,
    int64_at,
)

QUEUE_BLOCK, QUEUE_WARPS = 2048, 16
EXCHANGE_ROWS, EXCHANGE_WORDS, EXCHANGE_WARPS = 8, 64, 2


@triton.jit
def _listed(published, feature):
    """Rows of a feature that the DRAM tier has; none where offsets are bad, so that nobody is brought in for them."""
    bad = (tl.load(published) & BAD_OFFSETS) > 0
    return tl.where(bad, 0, tl.load(published + 1 + feature))


@triton.jit
def _queues(at, table):
    """The ghosts of a table and their cells, its two rings with their places, and their heads and lengths."""
    of = int64_at(at, AT_TABLES) + table * FIELDS
    ghosts, cells = int16_at(at, AT_GHOSTS) + tl.load(of + SLOT_BASE), tl.load(of + SLOTS) + 1
    small, small_size = int32_at(at, AT_RINGS) + tl.load(of + SMALL_BASE), tl.load(of + SMALL).to(tl.int32)
    main, main_size = int32_at(at, AT_RINGS) + tl.load(of + MAIN_BASE), tl.load(of + SLOTS).to(tl.int32)
    return ghosts, cells, small, small_size, main, main_size, int32_at(at, AT_QUEUES) + table * QUEUES


@triton.jit
def _ghost(row, cells):
    """Cell and fingerprint of row ids."""
    mixed = row * FACTOR
    cell = (((mixed >> CELL_SHIFT) & CELL_MASK) * cells) >> CELL_SHIFT
    return cell, tl.maximum((mixed >> GHOST_SHIFT) & GHOST_MASK, 1).to(tl.int16)


@triton.jit
def _push(ring, head, count, size, slot, mask):
    """Put the masked slots at the back of a queue; returns how many are in it then."""
    flags = mask.to(tl.int32)
    place = head + count + tl.cumsum(flags, 0) - 1
    tl.store(ring + place % size, slot, mask=mask)
    return count + tl.sum(flags, 0)


@triton.jit
def _empty(owners, state, ghosts, cells, ring, place, inside, out, left, oldest, in_small):
    """Judge queue entries in order until `left` of them leave: (slots, which leave, wait, move on, how many passed)."""
    slot = tl.load(ring + place, mask=inside, other=0)
    word = tl.load(state + slot, mask=inside, other=0)
    pinned = (word >> SHIFT) >= oldest
    idle = inside & (pinned == 0) & ((word & READS) == 0)
    order = tl.cumsum(idle.to(tl.int32), 0)
    passed = inside & (order - idle.to(tl.int32) < left)
    leaves = passed & idle
    tl.store(out + order - 1, slot, mask=leaves)
    owner = tl.load(owners + slot, mask=leaves & in_small, other=0)
    cell, mark = _ghost(owner, cells)
    tl.store(ghosts + cell, mark, mask=leaves & in_small)
    stays = passed & (leaves == 0)
    waits = stays & pinned & in_small
    moves = stays & (waits == 0)
    tl.store(state + slot, tl.where(in_small, word & ~READS, word - 1), mask=moves & (pinned == 0))
    return slot, leaves, waits, moves, tl.sum(passed.to(tl.int32), 0)


@triton.jit
def _counts(queue):
    """Heads and lengths of the two queues of a table."""
    return tl.load(queue), tl.load(queue + 1), tl.load(queue + 2), tl.load(queue + 3)


@triton.jit
def _keep(queue, small_head, small_count, main_head, main_count):
    """Write them back, for every thread of the program to see."""
    tl.debug_barrier()
    tl.store(queue, small_head)
    tl.store(queue + 1, small_count)
    tl.store(queue + 2, main_head)
    tl.store(queue + 3, main_count)
    tl.debug_barrier()


@triton.jit
def _make_room(
    owners,
    state,
    ghosts,
    cells,
    small,
    small_size,
    main,
    main_size,
    queue,
    out,
    found,
    need,
    oldest,
    BLOCK: tl.constexpr,
):
    """Unread slots of the small queue as far as it exceeds its share, then of the main one, until there are enough."""
    small_head, small_count, main_head, main_count = _counts(queue)
    lane = tl.arange(0, BLOCK)
    share = tl.maximum((small_count + main_count) // SMALL_PART, 1)
    for phase in range(4):
        in_small = (phase % 2) == 0
        count = tl.where(in_small, small_count, main_count)
        quota = tl.where(in_small, small_count, 4 * main_count)
        if phase == 0:
            quota = tl.minimum(quota, small_count + need - found - share)
        while (found < need) & (quota > 0) & (count > 0):
            ring, size, head = small, small_size, small_head
            if (phase % 2) == 1:
                ring, size, head = main, main_size, main_head
            place, inside = (head + lane) % size, lane < tl.minimum(tl.minimum(count, quota), BLOCK)
            slot, leaves, waits, moves, gone = _empty(
                owners, state, ghosts, cells, ring, place, inside, out + found, need - found, oldest, in_small
            )
            small_head = tl.where(in_small, (small_head + gone) % small_size, small_head)
            main_head = tl.where(in_small, main_head, (main_head + gone) % main_size)
            small_count -= tl.where(in_small, gone, 0)
            main_count -= tl.where(in_small, 0, gone)
            small_count = _push(small, small_head, small_count, small_size, slot, waits)
            main_count = _push(main, main_head, main_count, main_size, slot, moves)
            found += tl.sum(leaves.to(tl.int32), 0)
            quota -= gone
            count = tl.where(in_small, small_count, main_count)
            # What was stored is read in the next round, by other threads.
            tl.debug_barrier()
    _keep(queue, small_head, small_count, main_head, main_count)
    return found


@triton.jit
def _enter(ghosts, cells, small, small_size, main, main_size, queue, row, slot, mask):
    """Slots of new rows go into the small queue while it has room, those of rows that left it lately into the main one.

    Any number of programs may do so at once.
    """
    cell, mark = _ghost(row, cells)
    known = mask & (tl.load(ghosts + cell, mask=mask, other=0) == mark)
    # Every warp has read a cell before one of them clears it.
    tl.debug_barrier()
    tl.store(ghosts + cell, 0, mask=known)
    fresh = (mask & (known == 0)).to(tl.int32)
    count = tl.sum(fresh, 0)
    place = tl.atomic_add(queue + 1, count) + tl.cumsum(fresh, 0) - 1
    low = (fresh > 0) & (place < small_size)
    # What was counted and has no place is taken back; nobody finds a place that is taken in the meantime.
    tl.atomic_add(queue + 1, tl.sum(low.to(tl.int32), 0) - count)
    tl.store(small + (tl.load(queue) + place) % small_size, slot, mask=low)
    high = (mask & (low == 0)).to(tl.int32)
    place = tl.atomic_add(queue + 3, tl.sum(high, 0)) + tl.cumsum(high, 0) - 1
    tl.store(main + (tl.load(queue + 2) + place) % main_size, slot, mask=high > 0)


@triton.jit(
    do_not_specialize=["lookups", "bags", "oldest"],
    do_not_specialize_on_alignment=["given", "given_first", "offsets"],
)
def choose(at, given, given_first, offsets, lookups, bags, oldest, BLOCK: tl.constexpr):
    """A slot for each row that the DRAM tier has: free ones that were given first, then those that S3-FIFO empties.

    Slots that batch `oldest` or a later one used stay. Where there are too few, the rest gets 0. A chosen slot is in no
    queue until `exchange` puts it there.
    """
    table = tl.program_id(0)
    slot_base = tl.load(int64_at(at, AT_TABLES) + table * FIELDS + SLOT_BASE)
    owners, state = int64_at(at, AT_OWNERS) + slot_base, int32_at(at, AT_STATE) + slot_base
    ghosts, cells, small, small_size, main, main_size, queue = _queues(at, table)
    published = int32_at(at, AT_PUBLISHED)
    lane, short = tl.arange(0, BLOCK), 0
    next_given, last_given = tl.load(given_first + table), tl.load(given_first + table + 1)
    features = int32_at(at, AT_FEATURE_FIRST) + table
    for place in range(tl.load(features), tl.load(features + 1)):
        feature = tl.load(int32_at(at, AT_FEATURE_LIST) + place)
        start, _ = extent(offsets, feature, bags, lookups)
        need = _listed(published, feature)
        out = int32_at(at, AT_CHOSEN) + start
        found = tl.minimum(need, last_given - next_given)
        for first in range(0, found, BLOCK):
            inside = first + lane < found
            tl.store(out + first + lane, tl.load(given + next_given + first + lane, mask=inside, other=0), mask=inside)
        next_given += found
        tl.debug_barrier()
        found = _make_room(
            owners,
            state,
            ghosts,
            cells,
            small,
            small_size,
            main,
            main_size,
            queue,
            out,
            found,
            need,
            oldest,
            BLOCK,
        )
        for first in range(found, need, BLOCK):
            tl.store(out + first + lane, 0, mask=first + lane < need)
        short += need - found
    tl.store(
        int32_at(at, AT_REPORT) + 1 + 3 * tl.load(int32_at(at, AT_FEATURE_FIRST) + tl.num_programs(0)) + table, short
    )


@triton.jit
def _swap(part, dram, slot, place, back, stride, mask, out, COLS: tl.constexpr, WORD: tl.constexpr):
    """One part of some rows: from their places in the tier into slots, and what is there, where `out`, to `back`."""
    start, row_stride = tl.load(part), tl.load(part + 1)
    words, offset = tl.load(part + 2), tl.load(part + 3)
    here = (start + slot * row_stride)[:, None].to(tl.pointer_type(WORD))
    there = (dram + place * stride)[:, None].to(tl.pointer_type(WORD))
    back = (dram + back * stride)[:, None].to(tl.pointer_type(WORD))
    for first in range(0, words, COLS):
        col = first + tl.arange(0, COLS)[None, :]
        inside = mask[:, None] & (col < words)
        comes = tl.load(there + offset + col, mask=inside, other=0)
        goes = tl.load(here + col, mask=inside & out[:, None], other=0)
        # Another thread than the one that read a word may write it.
        tl.debug_barrier()
        tl.store(here + col, comes, mask=inside)
        tl.store(back + offset + col, goes, mask=inside & out[:, None])


@triton.jit(do_not_specialize=["lookups", "bags", "stamp"], do_not_specialize_on_alignment=["offsets"])
def exchange(
    at,
    offsets,
    lookups,
    bags,
    stamp,
    MARK: tl.constexpr,
    PARTS: tl.constexpr,
    WORD: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rows of the DRAM tier go into their chosen slots, and what leaves these goes into their places.

    Where the tier keeps copies what leaves is in its own place already, or goes there."""
    missing, chosen = int64_at(at, AT_MISSING), int32_at(at, AT_CHOSEN)
    slot_map, state = int32_at(at, AT_SLOT_MAP), int32_at(at, AT_STATE)
    owners, published = int64_at(at, AT_OWNERS), int32_at(at, AT_PUBLISHED)
    parts_of = int64_at(at, AT_PARTS)
    group, feature = tl.program_id(0), tl.program_id(1)
    table = tl.load(int32_at(at, AT_FEATURES) + feature)
    of = int64_at(at, AT_TABLES) + table * FIELDS
    base, slot_base, keep = tl.load(of + BASE), tl.load(of + SLOT_BASE), tl.load(of + KEEP)
    ghosts, cells, small, small_size, main, main_size, queue = _queues(at, table)
    dram, stride, header = tl.load(of + DRAM), tl.load(of + DRAM_STRIDE), tl.load(of + HEADER)
    start, _ = extent(offsets, feature, bags, lookups)
    count = _listed(published, feature)
    for first in range(group * ROWS, count, tl.num_programs(0) * ROWS):
        item = first + tl.arange(0, ROWS)
        slot = tl.load(chosen + start + item, mask=item < count, other=0).to(tl.int64)
        inside = (item < count) & (slot > 0)
        row = tl.load(missing + start + item, mask=inside, other=0)
        entry = tl.load(slot_map + base + row, mask=inside, other=0)
        place = (entry & PLACE).to(tl.int64)
        owner = tl.load(owners + slot_base + slot, mask=inside, other=FREE)
        word = tl.load(state + slot_base + slot, mask=inside, other=0)
        # Every warp has read what is there before one of them writes what is there then.
        tl.debug_barrier()
        leaves = inside & (owner >= 0)
        dirty = (word & DIRTY) > 0
        out = leaves & (tl.where(keep == KEEP_ALL, 1, dirty.to(tl.int32)) > 0)
        copied = leaves & (keep == KEEP_COPIES)
        back = tl.where(copied, owner, place)
        dirty = dirty & (copied == 0)
        for part in tl.static_range(PARTS):
            which = parts_of + (table * PARTS + part) * PART_FIELDS
            _swap(which, dram, slot, place, back, stride, inside, out, COLS, WORD)
        said = tl.where(out, owner | FRESH | tl.where(dirty, MODIFIED, 0), FREE)
        told = inside & ((keep != KEEP_COPIES) | out)
        tl.store((dram + back * stride + header).to(tl.pointer_type(tl.int64)), said, mask=told)
        now = IN_DRAM | tl.where(dirty, DIRTY_IN_DRAM, 0) | back.to(tl.int32)
        tl.store(slot_map + base + owner, tl.where(out | copied, now, 0), mask=leaves)
        tl.store(slot_map + base + row, slot.to(tl.int32), mask=inside)
        tl.store(owners + slot_base + slot, row, mask=inside)
        word = (stamp << SHIFT) | tl.where((entry & DIRTY_IN_DRAM) > 0, DIRTY, 0)
        if MARK:
            word |= DIRTY
        tl.store(state + slot_base + slot, word, mask=inside)
        _enter(ghosts, cells, small, small_size, main, main_size, queue, row, slot.to(tl.int32), inside)


__all__ = ["EXCHANGE_ROWS", "EXCHANGE_WARPS", "EXCHANGE_WORDS", "QUEUE_BLOCK", "QUEUE_WARPS", "choose", "exchange"]
