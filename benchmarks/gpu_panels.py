"""Lookup times as one thing changes: the batch, the number of tables, their rows, and the share of rows in slots."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from benchmarks.figures import Figure
from benchmarks.gpu_context import GpuContext, Narrow, caller
from benchmarks.gpu_serving import all_hit, compare, faster, unmeasured, zipf, zipf_over
from benchmarks.gpu_streams import Shape, Stream, distinct_ids
from benchmarks.gpu_tables import INT8, Served, clean_up, fill_serving, ours_serving, stock_serving, warm
from benchmarks.gpu_timing import Turns, back_to_back, split_rounds

_BAGS, _QUICK_BAGS = (256, 1024, 4096, 16384, 65536), (16, 64)
_TABLES, _QUICK_TABLES = (1, 8, 64, 512), (1, 4)
_ROWS, _QUICK_ROWS = (10**6, 10**7, 10**8, 10**9), (10_000, 100_000)
_SHARES, _QUICK_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), (0.1, 0.5)
_HOT = 100_000
_WHOLE_MOST = 100_000_000
"""Rows of a table of which stock gets a copy; more do not fit in the memory of one GPU."""
_BATCHES, _ROUNDS = 10, 5
_FRESH_LOOKUPS = 6_000_000
"""Of a table, in the batches of one measurement."""


def point(panel: str, line: str, x: float, ms: float) -> dict[str, Any]:
    """A dot of the picture."""
    return {"panel": panel, "line": line, "x": x, "ms": ms}


def _figure(row: str, case: str, turns: Turns, points: list[dict[str, Any]], note: str = "") -> Figure:
    known = "stock" in turns.rounds
    pair = turns.pair("ours", "stock", lambda ms: ms * 1e3) if known else None
    return Figure(
        row=row,
        case=case,
        unit="us a batch",
        ours=pair.our_median if pair else turns.median("ours") * 1e3,
        peer="stock, whole tables in HBM" if known else "",
        theirs=pair.their_median if pair else None,
        note=note,
        details=(pair.details() if pair else {}) | {"points": points},
    )


def _timed(
    gpu: GpuContext, served: Served, stock: IntNBitTableBatchedEmbeddingBagsCodegen | None, stream: Stream
) -> tuple[Turns, float]:
    """Times of batches whose rows are all in slots or in the DRAM tier, and the share of lookups that hit.

    Where slots are for a part of the rows, every batch that is timed is a fresh one.
    """
    fresh = served.slots < min(stream.shape.rows, stream.asked)
    batches = stream.batches(gpu.pick(_fresh_batches(stream.shape) if fresh else _BATCHES, 4))
    warm(served.module, distinct_ids(batches, stream.shape.tables), served.slots)
    sides = {"ours": caller(served.module, stream.offsets)}
    if stock is not None:
        served.check(batches[0], stream.offsets, stock)
        sides["stock"] = Narrow(batches, stream.offsets).caller(stock)
    warming, *rounds = split_rounds(batches, 4) if fresh else [batches, *split_rounds(batches, 2) * _ROUNDS]
    back_to_back(sides, [warming], gpu.device)
    before = served.hits()
    turns = back_to_back(sides, rounds, gpu.device)
    hits, reads = (b - a for a, b in zip(before, served.hits(), strict=True))
    return turns, hits / max(1, reads)


def _fresh_batches(shape: Shape) -> int:
    """As many as leave few rows to be fetched before."""
    return max(4, min(24, _FRESH_LOOKUPS // shape.each // 4 * 4))


def run_batch(gpu: GpuContext) -> Iterator[Figure]:
    hit, part = all_hit(gpu), zipf(gpu)
    lines = (("every row in slots", hit.served, hit.stock), ("10 % of rows in slots", part.ours(gpu, 0.1), part.stock))
    for bags in gpu.pick(_BAGS, _QUICK_BAGS):
        for line, served, stock in lines:
            gpu.check_time()
            table = served.tables[0]
            shape = Shape(tables=len(served.tables), rows=table.rows, bags=bags, length=20)
            turns, rate = _timed(gpu, served, stock, Stream(shape, device=gpu.device, seed=gpu.seed))
            points = [
                point("bags a batch", f"{who}, {line}", bags, turns.median(side))
                for who, side in (("ours", "ours"), ("stock", "stock"))
            ]
            yield _figure("batch", f"{shape}, {line}", turns, points, f"{rate:.2%} of lookups hit")


def run_tables(gpu: GpuContext) -> Iterator[Figure]:
    rows, bags = gpu.pick((8_000_000, 32768), (40_000, 256))
    for tables in gpu.pick(_TABLES, _QUICK_TABLES):
        gpu.check_time()
        shape = Shape(tables=tables, rows=rows // tables, bags=bags // tables, length=20)
        served = ours_serving(INT8, tables, shape.rows, slots=shape.rows, dram=None, device=gpu.device)
        stock = stock_serving(INT8, served.tables, gpu.device)
        fill_serving(stock, served.pattern, served.tables)
        turns, rate = _timed(gpu, served, stock, Stream(shape, device=gpu.device, seed=gpu.seed))
        points = [point("tables", side, tables, turns.median(side)) for side in turns.rounds]
        yield _figure("tables", f"{shape}, every row in slots", turns, points, f"{rate:.2%} of lookups hit")
        del served, stock
        clean_up(gpu.device)


def run_rows(gpu: GpuContext) -> Iterator[Figure]:
    bags, hot = gpu.pick((32768, _HOT), (256, 5_000))
    for rows in gpu.pick(_ROWS, _QUICK_ROWS):
        gpu.check_time()
        shape = Shape(tables=1, rows=rows, bags=bags, length=20)
        served = ours_serving(INT8, 1, rows, slots=2 * hot, dram=None, device=gpu.device)
        stock = None
        if rows <= _WHOLE_MOST:
            stock = stock_serving(INT8, served.tables, gpu.device)
            fill_serving(stock, served.pattern, served.tables)
        turns, rate = _timed(gpu, served, stock, Stream(shape, device=gpu.device, seed=gpu.seed, hot=hot))
        points = [point("rows of the table", side, rows, turns.median(side)) for side in turns.rounds]
        size = rows * 144 / 1e9
        note = f"{served.nbytes / 1e9:.3g} GB of HBM; whole tables would take {size:.3g} GB; {rate:.2%} of lookups hit"
        yield _figure("rows", f"{shape}, {hot:,} of them asked for, {2 * hot:,} slots", turns, points, note)
        del served, stock
        clean_up(gpu.device)


def run_cache_share(gpu: GpuContext) -> Iterator[Figure]:
    whole = Shape(tables=8, rows=2_000_000, bags=1024, length=20)
    shape = gpu.pick(whole, Shape(tables=2, rows=20_000, bags=64, length=10))
    made = zipf_over(gpu, shape, gpu.pick((20, 18, 4), (4, 4, 2)))
    for share in gpu.pick(_SHARES, _QUICK_SHARES):
        gpu.check_time()
        found = compare(gpu, made, share, (CacheAlgorithm.LRU,))
        case = f"{shape}, INT8, {100 * share:g} % of rows in slots"
        names = {"ours": "ours", "stock": "stock", "LRU": "UVM caching"}
        for side in found.turns.rounds:
            if side == "ours":
                continue
            figure = faster("cache-share", case, made, found, side, None)
            figure.details["points"] = [
                point("share of rows in slots", names[each], share, statistics.median(found.turns.rounds[each]))
                for each in ("ours", side)
            ]
            yield figure
        yield from unmeasured("cache-share", case, found)
        del made.tiered[share]
        clean_up(gpu.device)


__all__ = ["point", "run_batch", "run_cache_share", "run_rows", "run_tables"]
