"""Tables for the rows of the benchmark: their bytes, snapshots of them, stores and modules that serve them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from torchrec_turbossd import TurboSSDInferenceModule
from torchrec_turbossd.rows import quantise
from torchrec_turbossd.snapshot import write_serving_snapshot
from torchrec_turbossd.store.checkpoint import clone_directory
from torchrec_turbossd.store.contract import Rows
from torchrec_turbossd.store.layered import LayeredRowStore
from torchrec_turbossd.tables import TableSpec

_WINDOW = 65536


def int8_tables(rows: Sequence[int], dims: Sequence[int]) -> list[TableSpec]:
    """INT8 tables "t0", "t1" and so on."""
    return [
        TableSpec(name=f"t{place}", rows=count, dim=dim, data_type=SparseType.INT8)
        for place, (count, dim) in enumerate(zip(rows, dims, strict=True))
    ]


def row_windows(table: TableSpec, seed: int) -> Iterator[Rows]:
    """All rows of a table as bytes, in order of their ids.

    One window of random rows is made; the others differ from it in every byte but the scale and bias.
    """
    generator = torch.Generator().manual_seed(seed)
    first = quantise(torch.randn(min(_WINDOW, table.rows), table.dim, generator=generator), table.data_type)
    for number, start in enumerate(range(0, table.rows, _WINDOW)):
        rows = first[: table.rows - start].clone()
        rows[:, 4:] ^= number % 256
        yield torch.arange(start, start + rows.shape[0]), rows


def write_tables(path: Path, tables: Sequence[TableSpec], seed: int) -> None:
    """Write a serving snapshot of `row_windows` of each table."""
    write_serving_snapshot(path, list(tables), {t.name: row_windows(t, seed + i) for i, t in enumerate(tables)})


@contextmanager
def store_of(snapshot: Path, clone: Path, tables: Sequence[TableSpec], read_threads: int) -> Iterator[LayeredRowStore]:
    """The row store of a snapshot, opened in a clone of it; a clone that is there is opened again."""
    if not clone.exists():
        clone_directory(snapshot / "part-0", clone)
    widths, rows = {t.name: t.row_bytes for t in tables}, {t.name: t.rows for t in tables}
    store = LayeredRowStore(clone, widths, rows, read_threads=read_threads)
    try:
        yield store
    finally:
        store.close()


def stock_module(tables: Sequence[TableSpec], seed: int | None = None) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's own module that holds whole tables: `row_windows` with a seed, else zeros that take no memory yet."""
    stock = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(t.name, t.rows, t.dim, t.data_type, EmbeddingLocation.HOST) for t in tables],
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP16,
        device="cpu",
    )
    stock.initialize_weights()
    if seed is not None:
        for place, table in enumerate(tables):
            held = stock.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)[place][0]
            for ids, rows in row_windows(table, seed + place):
                held[ids[0] : ids[-1] + 1, : rows.shape[1]].copy_(rows)
    return stock


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's operators use `count` threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reads_of(module: TurboSSDInferenceModule) -> tuple[int, int]:
    """(lookups, those of them that were not answered from slots) of all tables since the module was made."""
    stats = module.read_stats().values()
    return sum(each.read_total_count for each in stats), sum(each.read_miss_count for each in stats)


def uniform_batch(tables: Sequence[TableSpec], per_table: int, generator: torch.Generator) -> Tensor:
    """[tables x per_table] int64 ids, table by table."""
    return torch.cat([torch.randint(t.rows, (per_table,), generator=generator) for t in tables])


__all__ = [
    "int8_tables",
    "reads_of",
    "row_windows",
    "stock_module",
    "store_of",
    "torch_threads",
    "uniform_batch",
    "write_tables",
]
