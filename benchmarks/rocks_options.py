"""Which RocksDB settings read rows fastest, one changed at a time from those that the store uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rocksdict

from benchmarks.context import Context
from benchmarks.figures import Figure
from benchmarks.timing import Pair, interleave
from benchmarks.tools import drop_caches
from torchrec_turbossd.store.rocks_options import RocksOptions

_ROW_BYTES, _BATCH = 132, 4096
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to set RocksDB up, in the terms of `RocksOptions`; bloom_bits 0 is no filter."""

    block_bytes: int = RocksOptions().block_bytes
    hash_index: bool = True
    bloom_bits: int = RocksOptions().bloom_bits
    direct_reads: bool = RocksOptions().direct_reads
    block_cache_bytes: int = RocksOptions().block_cache_bytes
    threads: int = 1

    def options(self) -> Any:
        block = rocksdict.BlockBasedOptions()
        block.set_block_cache(rocksdict.Cache(self.block_cache_bytes))
        block.set_block_size(self.block_bytes)
        if self.bloom_bits:
            block.set_bloom_filter(self.bloom_bits, False)
        if self.hash_index:
            block.set_data_block_index_type(rocksdict.DataBlockIndexType.binary_and_hash())
            block.set_data_block_hash_ratio(0.75)
        block.set_checksum_type(rocksdict.ChecksumType.xxh3())
        options = rocksdict.Options(raw_mode=True)
        options.set_block_based_table_factory(block)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        options.create_if_missing(True)
        options.set_write_buffer_size(RocksOptions().write_buffer_bytes)
        options.set_max_open_files(-1)
        options.set_use_direct_reads(self.direct_reads)
        return options


@dataclass(frozen=True)
class Question:
    """Settings to compare, the store's own first, cached and cold.

    Cached reads are counted by the seconds that the CPU worked, which other programs disturb least; `wall` counts
    seconds that passed, as for cold reads, where settings differ in threads.
    """

    settings: dict[str, Setting]
    wall: bool = False


def _questions(data_bytes: int) -> dict[str, Question]:
    store = Setting()
    return {
        "block size": Question({f"{k} KiB": replace(store, block_bytes=k << 10) for k in (4, 8, 16)}),
        "data-block hash index": Question({"on": store, "off": replace(store, hash_index=False)}),
        "bloom filter, rows that are there": Question({"10 bits": store, "none": replace(store, bloom_bits=0)}),
        "direct reads": Question({"off": store, "on": replace(store, direct_reads=True)}, wall=True),
        "block cache": Question({"64 MiB": store, "all data": replace(store, block_cache_bytes=2 * data_bytes)}),
        "read threads": Question({str(n): replace(store, threads=n) for n in (2, 1, 4)}, wall=True),
    }


def run(context: Context) -> Iterator[Figure]:
    """Rows a second of each setting against the store's own; the note names the winner."""
    rows = context.pick(2_000_000, 200_000)
    with context.scratch("rocks") as folder:
        bench = _Bench(context, folder, rows)
        for name, question in _questions(rows * _ROW_BYTES).items():
            for cold in (False, True):
                yield from bench.ask(name, question, cold)


@dataclass(frozen=True)
class _Bench:
    context: Context
    folder: Path
    rows: int
    built: dict[tuple[Any, ...], Path] = field(default_factory=dict)

    def ask(self, question: str, asked: Question, cold: bool) -> Iterator[Figure]:
        """A figure for each setting but the first."""
        wall = asked.wall or cold
        first, *others = asked.settings
        mine = partial(self._rate, asked.settings[first], cold, wall)
        pairs: dict[str, Pair] = {}
        for name in others:
            theirs = partial(self._rate, asked.settings[name], cold, wall)
            pairs[name] = interleave(theirs, mine, self.context.pick(3, 1))
        best = max(pairs, key=lambda name: pairs[name].ratio)
        for name, pair in pairs.items():
            yield Figure(
                row="rocks-options",
                case=f"{question}: {name}, {self.rows:,} rows of {_ROW_BYTES} B, {'cold' if cold else 'cached'}",
                unit="rows/s" if wall else "rows/CPU s",
                ours=pair.our_median,
                peer=f"{first}",
                theirs=pair.their_median,
                note=f"fastest: {best if pairs[best].ratio > 1 else first}",
                details=pair.details(),
            )

    def _database(self, setting: Setting) -> Path:
        """A database as `setting` has it; settings that give the same files share one."""
        key = (setting.block_bytes, setting.hash_index, setting.bloom_bits)
        if key not in self.built:
            self.built[key] = self.folder / f"db-{len(self.built)}"
            random = np.random.default_rng(self.context.seed)
            values = random.integers(0, 256, (_BATCH, _ROW_BYTES), dtype=np.uint8)
            db = rocksdict.Rdict(str(self.built[key]), setting.options())
            for start in range(0, self.rows, _BATCH):
                batch = rocksdict.WriteBatch(raw_mode=True)
                for id_, row in zip(_keys(np.arange(start, min(start + _BATCH, self.rows))), values, strict=False):
                    batch.put(id_, row.tobytes())
                db.write(batch)
            db.flush()
            db.compact_range(None, None)
            db.close()
        return self.built[key]

    def _rate(self, setting: Setting, cold: bool, wall: bool) -> float:
        """Rows a second of uniform reads, batches sorted as the store sorts them and split among the threads."""
        path = self._database(setting)
        if cold:
            drop_caches(path)
        db = rocksdict.Rdict(str(path), setting.options(), access_type=rocksdict.AccessType.read_only(False))
        random = np.random.default_rng(self.context.seed)
        batches = [np.sort(random.integers(0, self.rows, _BATCH)) for _ in range(self.context.pick(64, 16))]
        clock = time.perf_counter if wall else time.process_time
        try:
            with ThreadPoolExecutor(setting.threads) as pool:

                def read(ids: np.ndarray) -> None:
                    list(pool.map(lambda part: db[_keys(part)], np.array_split(ids, setting.threads)))

                if cold:
                    # Few enough that most of their blocks are read for the first time.
                    batches = batches[: max(1, self.rows // (128 * _BATCH))]
                else:
                    for ids in batches:
                        read(ids)
                start = clock()
                for ids in batches:
                    read(ids)
                return len(batches) * _BATCH / (clock() - start)
        finally:
            db.close()


def _keys(ids: np.ndarray) -> list[Any]:
    return ids.astype(">i8").view("V8").tolist()


__all__ = ["Question", "Setting", "run"]
