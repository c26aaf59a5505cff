"""The settings of a RocksDB row store that a user may have a reason to change, and what each is for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torchrec_turbossd.errors import ConfigError

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True, kw_only=True)
class RocksOptions:
    """Memory, disk and threads of one store. The defaults suit point lookups of rows of 100 bytes to a few KiB.

    Figures below: `python -m benchmarks.run --only rocks-options`, seed 20260101, 2 M rows of 132 bytes, cached ones by
    CPU time; 2 cores of an AMD EPYC, rocksdict 0.3.29, 2026-11-22.

    Attributes:
        write_buffer_bytes: rows of one table kept in memory before they become a file; larger means fewer files.
        max_write_buffers: buffers of one table, full ones included; a burst that fills all of them waits for the disk.
        total_write_buffer_bytes: limit over all tables, so that memory does not grow with their number.
        max_wal_bytes: log kept before old buffers are written out; bounds the time of reopening after a crash.
        block_cache_bytes: cache of file blocks. Small, because the tiers above already keep the rows in use, and the
            page cache the files: one for all data gave 5 % more rows.
        block_bytes: unit of a disk read; a page of an SSD, since a lookup wants one row of it. 8 KiB gave 10 % and
            16 KiB 24 % fewer cached rows, and as many cold ones.
        bloom_bits: bits for each row of the filter that spares a disk read for a row that a file lacks; 10 leaves 1 %.
            Asking it costs up to 15 % of the cached reads of rows that are there.
        cache_index_and_filters: keep indexes and filters in the block cache rather than all in memory (about 2 bytes
            for each row): slower, but bounded by `block_cache_bytes`.
        background_jobs: threads for flush and compaction together.
        max_open_files: file handles; -1 keeps every file open, which lookups like best.
        rate_limit_bytes_per_s: limit for flush and compaction, to leave the disk to lookups; 0 is no limit.
        hash_write_buffers: keep write buffers as hash tables rather than sorted: rows go in three times as fast, and
            reads pass them four times as fast, but the first window of a scan sorts what they hold, and buckets take
            3 % more memory. For stores that are written and read all the time, and scanned rarely.
        direct_reads: bypass the page cache, where its memory is needed for something better: a read of a row in the
            page cache becomes a disk read, one in twenty as fast, and a cold one gains nothing.
    """

    write_buffer_bytes: int = 64 * _MIB
    max_write_buffers: int = 4
    total_write_buffer_bytes: int = 512 * _MIB
    max_wal_bytes: int = 512 * _MIB
    block_cache_bytes: int = 64 * _MIB
    block_bytes: int = 4 * _KIB
    bloom_bits: int = 10
    cache_index_and_filters: bool = False
    background_jobs: int = 2
    max_open_files: int = -1
    rate_limit_bytes_per_s: int = 0
    hash_write_buffers: bool = False
    direct_reads: bool = False

    def __post_init__(self) -> None:
        least = {"max_write_buffers": 2, "max_open_files": -1, "rate_limit_bytes_per_s": 0, "block_cache_bytes": 0}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type == "bool":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(item.name, 1):
                raise ConfigError(f"{item.name} must be an int of at least {least.get(item.name, 1)}, got {value!r}")


__all__ = ["RocksOptions"]
