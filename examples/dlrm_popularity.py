"""How often the rows of a real DLRM's tables are asked for, and numbers of lookups drawn to be like that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

REUSE_ENDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Last numbers of lookups of the buckets; a further bucket holds what is above them all."""

# Source of both: facebookresearch/dlrm_datasets, locality statistics, fbgemm_t856_bs65536: one batch of 65,536 samples,
# 887,017,990 lookups in 856 tables (1,036,236 a table) of 128,435,723 distinct rows.
ROW_SHARES = (0.473, 0.152, 0.139, 0.112, 0.072, 0.032, 0.011, 0.005, 0.002, 0.001) + 7 * (0.0,)
"""Share of the distinct rows in each bucket."""
LOOKUP_SHARES = (
    *(0.069, 0.044, 0.068, 0.101, 0.121, 0.104, 0.073, 0.058, 0.052),
    *(0.050, 0.049, 0.048, 0.048, 0.043, 0.031, 0.023, 0.019),
)
"""Share of the lookups that ask for rows in each bucket."""
MEAN_REUSE = 6.9
"""Lookups for each distinct row."""

_BUCKETS = len(LOOKUP_SHARES)
# No row takes more than this part of a table's lookups, so that short days have no table of one row.
_LARGEST_PART = 1 / 16


@dataclass(frozen=True)
class Reuse:
    """A histogram of reuse: for each bucket, shares of distinct rows and of lookups, [17] float64 each."""

    rows: Floats
    lookups: Floats

    @classmethod
    def calibrated(cls) -> Reuse:
        """The one that is aimed at; published figures are rounded, so they are made to add up to 1."""
        rows, lookups = np.array(ROW_SHARES), np.array(LOOKUP_SHARES)
        return cls(rows / rows.sum(), lookups / lookups.sum())

    @classmethod
    def of(cls, counts: Counts) -> Reuse:
        """That of rows with these numbers of lookups: [N] int64, rows without any left out."""
        counts = counts[counts > 0]
        bucket = np.searchsorted(REUSE_ENDS, counts)
        rows = np.bincount(bucket, minlength=_BUCKETS)
        lookups = np.bincount(bucket, weights=counts, minlength=_BUCKETS)
        return cls(rows / rows.sum(), lookups / lookups.sum())

    def distance(self, other: Reuse) -> tuple[float, float]:
        """The part of the distinct rows, and of the lookups, that would have to change buckets to make them equal."""
        rows, lookups = np.abs(self.rows - other.rows).sum(), np.abs(self.lookups - other.lookups).sum()
        return 0.5 * float(rows), 0.5 * float(lookups)


def reuse_counts(lookups: int, table: int, rng: np.random.Generator) -> Counts:
    """Numbers of lookups of the distinct rows that one table is asked for in a day: [N] int64, falling, sum `lookups`.

    In every bucket rows of c lookups are as frequent as 1 / c**2: that gives the published shares of rows from those
    of lookups, to 0.003 in each bucket, and their mean.

    Args:
        lookups: in all.
        table: its number. Buckets with less than one row in a table have one in some tables.
        rng: what to draw with.
    """
    largest = max(1, int(lookups * _LARGEST_PART))
    counts: list[Counts] = []
    left, shares = lookups, np.array(LOOKUP_SHARES)
    for bucket in reversed(range(1, _BUCKETS)):
        first, last = _ends(bucket)
        wanted = left * shares[bucket] / shares[: bucket + 1].sum()
        if first > largest:
            continue
        values = np.arange(first, min(last, largest) + 1)
        weights = values**-2.0
        weights /= weights.sum()
        rows = wanted / float(weights @ values)
        drawn = rng.choice(values, _whole(rows, table), p=weights)
        counts.append(np.sort(drawn)[::-1])
        left -= int(drawn.sum())
    counts.append(np.ones(max(0, left), dtype=np.int64))
    return np.concatenate(counts)


def fold(counts: Counts, rows: int) -> Counts:
    """The numbers of lookups of the same accesses hashed to `rows` rows: [at most rows] int64."""
    if counts.size <= rows:
        return counts
    return np.bincount(np.arange(counts.size) % rows, weights=counts).astype(np.int64)


def _ends(bucket: int) -> tuple[int, int]:
    """First and last number of lookups in a bucket; the open one is taken to be as wide as its lower end."""
    ends = (0, *REUSE_ENDS, 2 * REUSE_ENDS[-1])
    return ends[bucket] + 1, ends[bucket + 1]


def _whole(rows: float, table: int) -> int:
    """`rows` rounded so that the first n tables together have n times `rows`, to within one row."""
    return int((table + 1) * rows) - int(table * rows)


__all__ = ["LOOKUP_SHARES", "MEAN_REUSE", "REUSE_ENDS", "ROW_SHARES", "Reuse", "fold", "reuse_counts"]
