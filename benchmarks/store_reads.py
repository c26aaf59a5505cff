"""Rows a second from the serving store: cached against `db_bench`, cold against the disk's random reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.context import Context
from benchmarks.figures import Figure, Goal
from benchmarks.served import int8_tables, row_windows, store_of, torch_threads, write_tables
from benchmarks.timing import Pair, interleave
from benchmarks.tools import db_bench, disk_bytes_read, drop_caches, fill_db_bench, fio_random_reads, need
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.tables import TableSpec

CACHED_GOAL = Goal(at_most=False, reach=1.0, aim=2.0)
COLD_GOAL = Goal(at_most=False, reach=0.65, aim=0.9)
_BATCH, _DIM, _PAGE = 4096, 128, 4096
_DEPTH = 32

Read = Callable[[Tensor], object]


def run_cached(context: Context) -> Iterator[Figure]:
    """Uniform reads of rows that the page cache holds, from the base layer and from the updated one."""
    need("db_bench")
    (table,) = int8_tables([context.pick(2_000_000, 200_000)], [_DIM])
    with ExitStack() as stack:
        folder = stack.enter_context(context.scratch("store"))
        write_tables(folder / "snapshot", [table], context.seed)
        fill_db_bench(folder / "peer", rows=table.rows, row_bytes=table.row_bytes, seed=context.seed)
        base = stack.enter_context(store_of(folder / "snapshot", folder / "base", [table], 1))
        updated = stack.enter_context(store_of(folder / "snapshot", folder / "updated", [table], 1))
        _update_all(updated, table, context.seed)
        base_read, updated_read = (partial(store.read, table.name) for store in (base, updated))
        for threads in (1, 2):
            case = f"{table.rows:,} rows of {table.row_bytes} B, batches of {_BATCH}, {threads} thread"
            case += "s" * (threads > 1)
            for layer, read in (("base layer", base_read), ("updated rows", updated_read)):
                pair = _against_db_bench(context, read, folder / "peer", table, threads=threads)
                yield _cached(f"{case}, {layer}", "page cache", pair, goal=True)
            pair = _against_db_bench(context, base_read, folder / "peer", table, threads=threads, block_cache=True)
            yield _cached(
                f"{case}, base layer against a block cache of all", "all in its block cache", pair, goal=False
            )
        with store_of(folder / "snapshot", folder / "pooled", [table], 2) as pooled:
            read = partial(pooled.read, table.name)
            pair = _against_db_bench(context, read, folder / "peer", table, threads=2, callers=1)
        yield _cached(
            f"{table.rows:,} rows of {table.row_bytes} B, 1 caller with read_threads=2", "2 threads", pair, goal=False
        )


def _update_all(store: RowStore, table: TableSpec, seed: int) -> None:
    for ids, rows in row_windows(table, seed + 1):
        store.write({table.name: (ids, rows)})
    store.flush()


def _against_db_bench(
    context: Context,
    read: Read,
    peer: Path,
    table: TableSpec,
    *,
    threads: int,
    callers: int | None = None,
    block_cache: bool = False,
) -> Pair:
    seconds = context.pick(1.0, 0.4)
    options = {
        "use_existing_db": 1,
        "batch_size": _BATCH,
        "multiread_batched": 1,
        "threads": threads,
        # By count, because db_bench's durations are whole seconds; this takes about one.
        "reads": context.pick(60, 25) * _BATCH,
        "seed": context.seed,
    }
    benchmarks = "multireadrandom"
    if block_cache:
        options["cache_size"] = 2 * table.rows * table.row_bytes
        # The first reads fill the block cache, the last are counted.
        benchmarks = "readseq,multireadrandom"

    def theirs() -> float:
        return db_bench(benchmarks, peer, rows=table.rows, row_bytes=table.row_bytes, **options)["multireadrandom"]

    def ours() -> float:
        with torch_threads(1):
            return rows_per_second(read, table.rows, callers or threads, seconds, context.seed)

    return interleave(ours, theirs, context.pick(3, 1))


def rows_per_second(read: Read, rows: int, callers: int, seconds: float, seed: int) -> float:
    """Rows a second of `callers` threads that read batches of uniform ids for `seconds`."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(rows, (_BATCH,), generator=generator) for _ in range(64)]

    def loop(first: int) -> int:
        turn = first
        while time.perf_counter() < end:
            read(batches[turn % len(batches)])
            turn += 1
        return (turn - first) * _BATCH

    for ids in batches:
        read(ids)
    start = time.perf_counter()
    end = start + seconds
    with ThreadPoolExecutor(callers) as pool:
        count = sum(pool.map(loop, range(0, 17 * callers, 17)))
    return count / (time.perf_counter() - start)


def _cached(case: str, peer: str, pair: Pair, *, goal: bool) -> Figure:
    return Figure(
        row="store-cached",
        case=case,
        unit="rows/s",
        ours=pair.our_median,
        peer=f"db_bench multireadrandom, {peer}",
        theirs=pair.their_median,
        goal=CACHED_GOAL if goal else None,
        details=pair.details(),
    )


def run_cold(context: Context) -> Iterator[Figure]:
    """Reads of rows that no cache holds, one of each page, against 4 KiB random reads of the same file."""
    need("fio")
    (table,) = int8_tables([context.pick(8_000_000, 1_000_000)], [_DIM])
    with context.scratch("cold") as folder:
        write_tables(folder / "snapshot", [table], context.seed)
        with store_of(folder / "snapshot", folder / "store", [table], 1):
            pass
        file = max((folder / "store").rglob("*"), key=lambda f: f.stat().st_size)
        for threads in (1, 2):
            yield _cold(context, folder, file, table, threads)


def _cold(context: Context, folder: Path, file: Path, table: TableSpec, threads: int) -> Figure:
    generator = torch.Generator().manual_seed(context.seed + threads)
    # One row of a page, so that none of them is read because of another.
    apart = -(-_PAGE // table.row_bytes) + 1
    ids = torch.randperm(table.rows // apart, generator=generator) * apart
    rounds = context.pick(3, 1)
    batches = torch.split(ids[: ids.numel() // 4], _BATCH)
    parts = iter([batches[turn::rounds] for turn in range(rounds)])
    read_bytes: list[float] = []

    def ours() -> float:
        drop_caches(folder / "store")
        with store_of(folder / "snapshot", folder / "store", [table], 1) as store:
            before = disk_bytes_read()
            rate, count = _read_once(partial(store.read, table.name), next(parts), threads, context.pick(3.0, 1.0))
            read_bytes.append((disk_bytes_read() - before) / count)
        return rate

    def theirs() -> float:
        drop_caches(folder / "store")
        return fio_random_reads(file, seconds=context.pick(2, 1), depth=_DEPTH, seed=context.seed)["iops"]

    pair = interleave(ours, theirs, rounds)
    return Figure(
        row="store-cold",
        case=f"{table.rows:,} rows of {table.row_bytes} B, batches of {_BATCH}, {threads} thread{'s' * (threads > 1)}",
        unit="rows/s",
        ours=pair.our_median,
        peer=f"fio 4 KiB random reads, direct, depth {_DEPTH}",
        theirs=pair.their_median,
        goal=COLD_GOAL,
        note=f"{read_bytes[-1] / 1024:.1f} KiB read from disk for each row",
        details={**pair.details(), "disk bytes a row by round": read_bytes},
    )


def _read_once(read: Read, batches: Sequence[Tensor], callers: int, seconds: float) -> tuple[float, int]:
    """Rows a second, and rows, until the time or the batches are over; no batch is read twice."""
    start = time.perf_counter()

    def loop(first: int) -> int:
        count = 0
        for ids in batches[first::callers]:
            if time.perf_counter() - start > seconds:
                break
            read(ids)
            count += ids.numel()
        return count

    with torch_threads(1), ThreadPoolExecutor(callers) as pool:
        total = sum(pool.map(loop, range(callers)))
    return total / (time.perf_counter() - start), total


__all__ = ["rows_per_second", "run_cached", "run_cold"]
