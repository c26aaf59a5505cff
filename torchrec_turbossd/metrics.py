"""Counts of reads, hits and misses, exact and per table."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class TableReads:
    """Reads of one table: `hit + miss = total`.

    A read is one lookup. It is a miss when its row was in no slot; further lookups of that row in the same batch are
    hits, as they would be one after the other. `dram_hit_count` of the misses were answered by the DRAM tier of a GPU,
    the others by the row store.
    """

    read_hit_count: int
    read_miss_count: int
    dram_hit_count: int = 0

    @property
    def read_total_count(self) -> int:
        return self.read_hit_count + self.read_miss_count

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; 0 when there were none."""
        return self.read_hit_count / self.read_total_count if self.read_total_count else 0.0

    def __add__(self, other: TableReads) -> TableReads:
        """The reads of both, as of two shards of one table."""
        return TableReads(
            self.read_hit_count + other.read_hit_count,
            self.read_miss_count + other.read_miss_count,
            self.dram_hit_count + other.dram_hit_count,
        )


class ReadCounters:
    """Cumulative reads by table, safe to count and to read from several threads."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._lock = threading.Lock()
        self._lookups, self._misses, self._dram = (np.zeros(len(self._names), dtype=np.int64) for _ in range(3))
        self._taken = (0, 0)

    def add(self, lookups: Counts, misses: Counts, in_dram: Counts | int = 0) -> None:
        """Count one batch: lookups and misses of each table, and how many of these the DRAM tier had."""
        with self._lock:
            self._lookups += lookups
            self._misses += misses
            self._dram += in_dram

    def read_each(self) -> list[TableReads]:
        """Counts since the start of each table, in order; shards of one table count for themselves."""
        with self._lock:
            counts = (self._lookups - self._misses).tolist(), self._misses.tolist(), self._dram.tolist()
        return [TableReads(*each) for each in zip(*counts, strict=True)]

    def read(self) -> dict[str, TableReads]:
        """Counts since the start, by table."""
        counted: dict[str, TableReads] = {}
        for name, reads in zip(self._names, self.read_each(), strict=True):
            counted[name] = counted[name] + reads if name in counted else reads
        return counted

    def take(self) -> tuple[int, int, int]:
        """(hits, misses, reads) of all tables since the last call."""
        with self._lock:
            misses = int(self._misses.sum())
            hits = int(self._lookups.sum()) - misses
            hit, miss = hits - self._taken[0], misses - self._taken[1]
            self._taken = (hits, misses)
        return hit, miss, hit + miss


__all__ = ["ReadCounters", "TableReads"]
