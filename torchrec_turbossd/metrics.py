"""Counts of reads, hits and misses, exact and per table."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TableReads:
    """Reads of one table: `hit + miss = total`.

    A read is one lookup. It is a miss when its row had to be fetched from the row store; further lookups of that row
    in the same batch are hits, as they would be one after the other.
    """

    read_hit_count: int
    read_miss_count: int

    @property
    def read_total_count(self) -> int:
        return self.read_hit_count + self.read_miss_count

    @property
    def hit_rate(self) -> float:
        """Hits per lookup; 0 when there were none."""
        return self.read_hit_count / self.read_total_count if self.read_total_count else 0.0

    def __add__(self, other: TableReads) -> TableReads:
        """The reads of both, as of two shards of one table."""
        return TableReads(self.read_hit_count + other.read_hit_count, self.read_miss_count + other.read_miss_count)


class ReadCounters:
    """Cumulative reads by table, safe to count and to read from several threads."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._lock = threading.Lock()
        self._hits = [0] * len(self._names)
        self._misses = [0] * len(self._names)
        self._taken = (0, 0)

    def add(self, lookups: Sequence[int], misses: Sequence[int]) -> None:
        """Count one batch: lookups and misses of each table."""
        with self._lock:
            for table, (total, missed) in enumerate(zip(lookups, misses, strict=True)):
                self._hits[table] += total - missed
                self._misses[table] += missed

    def read_each(self) -> list[TableReads]:
        """Counts since the start of each table, in order; shards of one table count for themselves."""
        with self._lock:
            return [TableReads(hit, miss) for hit, miss in zip(self._hits, self._misses, strict=True)]

    def read(self) -> dict[str, TableReads]:
        """Counts since the start, by table."""
        counted: dict[str, TableReads] = {}
        for name, reads in zip(self._names, self.read_each(), strict=True):
            counted[name] = counted[name] + reads if name in counted else reads
        return counted

    def take(self) -> tuple[int, int, int]:
        """(hits, misses, reads) of all tables since the last call."""
        with self._lock:
            hits, misses = sum(self._hits), sum(self._misses)
            hit, miss = hits - self._taken[0], misses - self._taken[1]
            self._taken = (hits, misses)
        return hit, miss, hit + miss


__all__ = ["ReadCounters", "TableReads"]
