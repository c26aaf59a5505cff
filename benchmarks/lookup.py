"""Lookups whose rows are all in slots, against FBGEMM's own module that holds whole tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from benchmarks.context import Context
from benchmarks.figures import Figure, Goal
from benchmarks.served import int8_tables, reads_of, stock_module, torch_threads, uniform_batch, write_tables
from benchmarks.streams import bag_offsets
from benchmarks.timing import interleave, seconds_of
from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.tables import TableSpec

GOAL = Goal(at_most=True, reach=1.35, aim=1.15)
_TABLES, _DIM, _LENGTH, _BATCHES = 8, 128, 20, 4
Batches = Sequence[tuple[Tensor, Tensor]]


def run(context: Context) -> Iterator[Figure]:
    """Two batch sizes, each with one thread and with two."""
    rows = context.pick(100_000, 10_000)
    tables = int8_tables([rows] * _TABLES, [_DIM] * _TABLES)
    with context.scratch("lookup") as folder:
        write_tables(folder / "snapshot", tables, context.seed)
        stock = stock_module(tables, context.seed)
        with TurboSSDInferenceModule.from_embedding_specs(
            tables, ssd_directory=folder, cache_hit_rate=1.0, device="cpu"
        ) as module:
            module.load_snapshot(folder / "snapshot")
            _bring_in(module, tables)
            for threads in (1, 2):
                for bags in context.pick((512, 4096), (64, 512)):
                    with torch_threads(threads):
                        yield _compare(context, module, stock, tables, bags=bags)


def _bring_in(module: TurboSSDInferenceModule, tables: Sequence[TableSpec]) -> None:
    order = [torch.randperm(t.rows) for t in tables]
    for parts in zip(*(torch.split(ids, 4096) for ids in order), strict=True):
        module(torch.cat(parts), torch.arange(0, sum(p.numel() for p in parts) + 1))


def _compare(
    context: Context,
    module: TurboSSDInferenceModule,
    stock: IntNBitTableBatchedEmbeddingBagsCodegen,
    tables: Sequence[TableSpec],
    *,
    bags: int,
) -> Figure:
    generator = torch.Generator().manual_seed(context.seed)
    offsets = bag_offsets(len(tables), bags, _LENGTH)
    batches = [uniform_batch(tables, bags * _LENGTH, generator) for _ in range(_BATCHES)]
    for ids in batches:
        if not torch.equal(module(ids, offsets), stock(ids, offsets)):
            raise RuntimeError("a lookup differs from FBGEMM's module with the same rows")
    missed = reads_of(module)[1]
    calls = max(2, context.pick(8192, 256) // bags)
    pair = interleave(
        lambda: seconds_of(lambda i: module(batches[i % _BATCHES], offsets), calls),
        lambda: seconds_of(lambda i: stock(batches[i % _BATCHES], offsets), calls),
        context.pick(25, 5),
    )
    if reads_of(module)[1] != missed:
        raise RuntimeError("rows were missing from the slots while lookups without misses were timed")
    return Figure(
        row="lookup",
        case=f"{len(tables)} x {tables[0].rows:,} x {_DIM} INT8, {bags} bags x {_LENGTH}, "
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}",
        unit="ms a batch",
        ours=pair.our_median * 1e3,
        peer="IntNBitTableBatchedEmbeddingBags, whole tables",
        theirs=pair.their_median * 1e3,
        goal=GOAL,
        details=pair.details(),
    )


__all__ = ["run"]
