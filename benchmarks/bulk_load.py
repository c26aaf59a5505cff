"""Writing a whole table as a serving snapshot, against RocksDB's own benchmark filling a database in key order."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import torch

from benchmarks.context import Context
from benchmarks.figures import Figure, Goal
from benchmarks.served import int8_tables, row_windows
from benchmarks.timing import interleave
from benchmarks.tools import fill_db_bench, need
from torchrec_turbossd.snapshot import write_serving_snapshot
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.tables import TableSpec

GOAL = Goal(at_most=False, reach=0.5, aim=1.0)
_DIM, _WINDOW = 128, 65536


def run(context: Context) -> Iterator[Figure]:
    """Float rows, quantised on the way, and rows that are bytes already."""
    need("db_bench")
    (table,) = int8_tables([context.pick(2_000_000, 200_000)], [_DIM])
    yield _compare(context, table, "uint8 rows", list(row_windows(table, context.seed)))
    yield _compare(context, table, "float rows to INT8", _float_windows(table, context.seed))


def _float_windows(table: TableSpec, seed: int) -> list[Rows]:
    # All windows share their numbers, so that a large table takes no memory.
    floats = torch.randn(_WINDOW, table.dim, generator=torch.Generator().manual_seed(seed))
    starts = range(0, table.rows, _WINDOW)
    return [(torch.arange(i, min(i + _WINDOW, table.rows)), floats[: table.rows - i]) for i in starts]


def _compare(context: Context, table: TableSpec, what: str, windows: list[Rows]) -> Figure:
    with context.scratch("load") as folder:

        def ours() -> float:
            start = time.perf_counter()
            write_serving_snapshot(folder / "snapshot", [table], {table.name: iter(windows)})
            rate = table.rows / (time.perf_counter() - start)
            shutil.rmtree(folder / "snapshot")
            return rate

        def theirs() -> float:
            rate = fill_db_bench(folder / "peer", rows=table.rows, row_bytes=table.row_bytes, seed=context.seed)
            shutil.rmtree(folder / "peer")
            return rate

        pair = interleave(ours, theirs, context.pick(3, 1))
    return Figure(
        row="bulk-load",
        case=f"{table.rows:,} rows of {table.row_bytes} B, {what}",
        unit="rows/s",
        ours=pair.our_median,
        peer="db_bench fillseq, no log, 1000 rows a batch",
        theirs=pair.their_median,
        goal=GOAL,
        note="ours is a durable snapshot with digests; the peer's files are not synced",
        details=pair.details(),
    )


__all__ = ["run"]
