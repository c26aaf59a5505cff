"""What a missing row costs when it comes from the SSD store, and when it comes from the DRAM tier."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.figures import Figure
from benchmarks.gpu_context import GpuContext, caller
from benchmarks.gpu_serving import Batches
from benchmarks.gpu_streams import Shape, Stream, distinct_ids
from benchmarks.gpu_tables import INT8, hits_of, tier_of, warm
from benchmarks.gpu_timing import back_to_back, split_rounds
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.serving import ServingOptions, TurboSSDIntNBitTableBatchedEmbeddingBags

_SHAPE = Shape(tables=8, rows=200_000, bags=1024, length=20)
_QUICK = Shape(tables=2, rows=10_000, bags=64, length=10)
_SHARE = 0.1
_READ_THREADS = 8


def run_ssd(gpu: GpuContext) -> Iterator[Figure]:
    # Here and not above: the other rows need no RocksDB.
    from benchmarks.served import store_of, write_tables

    shape = gpu.pick(_SHAPE, _QUICK)
    tables = INT8.tables(shape.tables, shape.rows)
    stream = Stream(shape, device=gpu.device, seed=gpu.seed)
    batches = Batches.of(stream, *gpu.pick((12, 12, 0), (3, 3, 0)))
    slots = int(shape.rows * _SHARE)
    with gpu.scratch("gpu-ssd") as folder:
        write_tables(folder / "snapshot", tables, gpu.seed)
        with store_of(folder / "snapshot", folder / "store", tables, _READ_THREADS) as store:

            def made(dram: int | None) -> Any:
                return TurboSSDIntNBitTableBatchedEmbeddingBags(
                    [TableShard.whole(table) for table in tables],
                    [slots] * shape.tables,
                    list(range(shape.tables)),
                    store,
                    device=gpu.device,
                    options=ServingOptions(output_dtype=INT8.output),
                    **tier_of(dram, slots, shape.tables),
                )

            staged, tiered = made(None), made(shape.rows - slots if gpu.cuda else None)
            warm(tiered, distinct_ids(batches.all, shape.tables), slots)
            sides = {"staged": caller(staged, stream.offsets), "tiered": caller(tiered, stream.offsets)}
            for work in sides.values():
                work(batches.warming)
            if not torch.equal(staged(batches.timed[0], stream.offsets), tiered(batches.timed[0], stream.offsets)):
                raise RuntimeError("rows differ with and without the DRAM tier")
            before = hits_of(staged)
            turns = back_to_back(sides, split_rounds(batches.timed, gpu.pick(4, 1)), gpu.device)
            hits, reads = (b - a for a, b in zip(before, hits_of(staged), strict=True))
    missed = (reads - hits) / len(batches.timed)
    case = f"{shape}, INT8, {100 * _SHARE:g} % of rows in slots"
    note = f"{missed:,.0f} missing rows a batch, {hits / max(1, reads):.2%} of lookups hit; the store's page cache warm"
    pair = turns.pair("staged", "tiered")
    for what, unit, per in (("a batch", "ms a batch", 1.0), ("a missing row", "us a row", 1e3 / max(1.0, missed))):
        yield Figure(
            row="ssd",
            case=f"{case}, no DRAM tier: {what}",
            unit=unit,
            ours=pair.our_median * per,
            peer="ours with the DRAM tier",
            theirs=pair.their_median * per,
            note=note,
            details=pair.details() | {"missing rows a batch": missed},
        )


__all__ = ["run_ssd"]
