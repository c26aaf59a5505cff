"""Streams of lookups, and caches simulated one lookup at a time, slowly and plainly."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def zipf_chances(rows: int, alpha: float) -> Array:
    """Exact chances by rank."""
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -alpha
    chances: Array = weights / weights.sum()
    return chances


def zipf_ids(rows: int, alpha: float, lookups: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    ids: list[int] = rng.choice(rows, size=lookups, p=zipf_chances(rows, alpha)).tolist()
    return ids


def lru_hit_rate(ids: list[int], slots: int) -> float:
    """Hit rate of the second half, when the cache is warm."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, row in enumerate(ids):
        if row in held:
            held.move_to_end(row)
            hits += number >= len(ids) // 2
            continue
        held[row] = None
        if len(held) > slots:
            held.popitem(last=False)
    return hits / (len(ids) - len(ids) // 2)


def clock_hit_rate(ids: list[int], slots: int) -> float:
    """The same for CLOCK, where a new row starts without its mark."""
    rows, marks, where = [-1] * slots, [False] * slots, dict[int, int]()
    hand = hits = 0
    for number, row in enumerate(ids):
        if row in where:
            marks[where[row]] = True
            hits += number >= len(ids) // 2
            continue
        while marks[hand]:
            marks[hand], hand = False, (hand + 1) % slots
        where.pop(rows[hand], None)
        rows[hand], where[row] = row, hand
        hand = (hand + 1) % slots
    return hits / (len(ids) - len(ids) // 2)


def s3_fifo_hit_rate(ids: list[int], slots: int) -> float:
    """The same for S3-FIFO, whose ghost forgets an id when another takes its cell."""
    small, main = deque[int](), deque[int]()
    reads, ghost = dict[int, int](), dict[int, int]()
    hits = 0
    for number, row in enumerate(ids):
        if row in reads:
            reads[row] = min(3, reads[row] + 1)
            hits += number >= len(ids) // 2
            continue
        while len(reads) == slots:
            _s3_fifo_step(small, main, reads, ghost, slots)
        (main if ghost.pop(_cell(row, slots), None) == row else small).append(row)
        reads[row] = 0
    return hits / (len(ids) - len(ids) // 2)


def _s3_fifo_step(
    small: deque[int], main: deque[int], reads: dict[int, int], ghost: dict[int, int], slots: int
) -> None:
    """A row leaves, or changes its place."""
    if len(small) >= max(1, slots // 10) or not main:
        row = small.popleft()
        if reads[row]:
            reads[row] = 0
            main.append(row)
        else:
            ghost[_cell(row, slots)] = row
            del reads[row]
    else:
        row = main.popleft()
        if reads[row]:
            reads[row] -= 1
            main.append(row)
        else:
            del reads[row]


def _cell(row: int, slots: int) -> int:
    return (row + 1) * 0x9E3779B97F4A7C15 % (1 << 64) * slots >> 64
