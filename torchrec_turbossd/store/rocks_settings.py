"""RocksDB's own settings for a row store and each of its tables."""

from __future__ import annotations

from collections.abc import Mapping

import rocksdict

from torchrec_turbossd.store.rocks_options import RocksOptions

_KEY_BYTES = 8
_LEAST_BUCKETS, _MOST_BUCKETS = 1 << 10, 1 << 18


def table_settings(options: RocksOptions, row_bytes: Mapping[str, int]) -> dict[str | None, rocksdict.Options]:
    """The settings of each table, and under None those of the database and of any other table."""
    cache = rocksdict.Cache(options.block_cache_bytes)
    common = _settings(options, cache)
    if not options.hash_write_buffers:
        return {None: common, **dict.fromkeys(row_bytes, common)}
    # RocksDB's other kinds of write buffer take one writer at a time.
    common.set_allow_concurrent_memtable_write(False)
    settings: dict[str | None, rocksdict.Options] = {None: common}
    room = min(options.write_buffer_bytes, options.total_write_buffer_bytes // max(1, len(row_bytes)))
    for table, width in row_bytes.items():
        settings[table] = _settings(options, cache)
        settings[table].set_allow_concurrent_memtable_write(False)
        # The whole key is the prefix by which rows are spread over buckets.
        settings[table].set_prefix_extractor(rocksdict.SliceTransform.create_fixed_prefix(_KEY_BYTES))
        settings[table].set_memtable_factory(_buckets(room // (width + _KEY_BYTES)))
    return settings


def _buckets(rows: int) -> rocksdict.MemtableFactory:
    """A hash table of about one row a bucket when it is full."""
    count = min(max(1 << max(0, rows - 1).bit_length(), _LEAST_BUCKETS), _MOST_BUCKETS)
    # The stub leaves the argument out.
    return rocksdict.MemtableFactory.hash_link_list(count)  # type: ignore[call-arg]


def scan_options() -> rocksdict.ReadOptions:
    """For iterators that go from key to key: by prefix, as a table with hashed buffers is read, they would stop."""
    options = rocksdict.ReadOptions()
    options.set_total_order_seek(True)
    return options


def _settings(options: RocksOptions, cache: rocksdict.Cache) -> rocksdict.Options:
    block = rocksdict.BlockBasedOptions()
    block.set_block_cache(cache)
    block.set_block_size(options.block_bytes)
    block.set_bloom_filter(options.bloom_bits, False)
    block.set_cache_index_and_filter_blocks(options.cache_index_and_filters)
    block.set_pin_l0_filter_and_index_blocks_in_cache(options.cache_index_and_filters)
    # Finds a row within its block by one probe instead of a search; the ratio is RocksDB's own default.
    block.set_data_block_index_type(rocksdict.DataBlockIndexType.binary_and_hash())
    block.set_data_block_hash_ratio(0.75)
    block.set_checksum_type(rocksdict.ChecksumType.xxh3())
    db = rocksdict.Options(raw_mode=True)
    db.set_block_based_table_factory(block)
    # Rows of floats hardly shrink.
    db.set_compression_type(rocksdict.DBCompressionType.none())
    db.create_if_missing(True)
    db.create_missing_column_families(True)
    db.set_write_buffer_size(options.write_buffer_bytes)
    db.set_max_write_buffer_number(options.max_write_buffers)
    db.set_db_write_buffer_size(options.total_write_buffer_bytes)
    db.set_max_total_wal_size(options.max_wal_bytes)
    db.set_max_background_jobs(options.background_jobs)
    db.set_max_open_files(options.max_open_files)
    db.set_use_direct_reads(options.direct_reads)
    if options.rate_limit_bytes_per_s:
        db.set_ratelimiter(options.rate_limit_bytes_per_s, 100_000, 10)
    # RocksDB's diary would otherwise grow without end.
    db.set_max_log_file_size(4 << 20)
    db.set_keep_log_file_num(4)
    return db


__all__ = ["scan_options", "table_settings"]
