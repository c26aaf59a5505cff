"""Our modules and the stock ones that the GPU benchmark compares them with, over the same rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
    BoundsCheckMode,
    CacheAlgorithm,
    EmbeddingLocation,
    PoolingMode,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from benchmarks.gpu_store import Pattern, PatternStore
from benchmarks.gpu_streams import warming_batches
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.serving import ServingOptions, TurboSSDIntNBitTableBatchedEmbeddingBags
from torchrec_turbossd.tbe.training import TrainingOptions, TurboSSDTableBatchedEmbeddingBags, row_state

_WAYS = 32
_WARM_ROWS = 1 << 20
"""Rows, of all tables, that one warming batch asks for at most."""


def held_bytes(device: torch.device) -> int:
    """Bytes of device memory that tensors hold."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def clean_up(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def tier_of(dram: int | None, slots: int, tables: int) -> dict[str, Any]:
    """The keyword that gives each table room for `dram` rows in host memory, in whole slots; none for None."""
    return {} if dram is None or dram < 1 else {"dram_slots": [dram] * tables}


@dataclass(frozen=True, kw_only=True)
class Served:
    """Our serving module of equal tables over a pattern. `nbytes`: of device memory, by the larger of two counts."""

    module: TurboSSDIntNBitTableBatchedEmbeddingBags
    tables: list[TableSpec]
    pattern: Pattern
    slots: int
    nbytes: int

    def check(self, ids: Tensor, offsets: Tensor, stock: IntNBitTableBatchedEmbeddingBagsCodegen) -> None:
        """Raise unless a batch has the very bits that the stock module gives."""
        mine, other = self.module(ids, offsets), stock(ids.int(), offsets.int())
        if not torch.equal(mine, other):
            raise RuntimeError(f"a lookup differs from stock's by up to {float((mine - other).abs().max())}")

    def hits(self) -> tuple[int, int]:
        """(hits, reads) that the module has counted."""
        return hits_of(self.module)


def hits_of(module: TurboSSDIntNBitTableBatchedEmbeddingBags | TurboSSDTableBatchedEmbeddingBags) -> tuple[int, int]:
    """(hits, reads) of all tables so far."""
    reads = module.rows.counters.read().values()
    return sum(each.read_hit_count for each in reads), sum(each.read_total_count for each in reads)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What equal serving tables are made of."""

    dim: int = 128
    data_type: SparseType = SparseType.INT8
    output: SparseType = SparseType.FP16

    def tables(self, count: int, rows: int) -> list[TableSpec]:
        return [TableSpec(name=f"t{t}", rows=rows, dim=self.dim, data_type=self.data_type) for t in range(count)]


INT8 = Kind()


def ours_serving(
    kind: Kind, count: int, rows: int, *, slots: int, dram: int | None, device: torch.device, seed: int = 0
) -> Served:
    """`count` tables of `rows` rows, `slots` of each in the TBE and `dram` beside them in host memory."""
    tables = kind.tables(count, rows)
    pattern = Pattern(tables, seed)
    before = held_bytes(device)
    module = TurboSSDIntNBitTableBatchedEmbeddingBags(
        [TableShard.whole(table) for table in tables],
        [slots] * count,
        list(range(count)),
        PatternStore(tables, pattern),
        device=device,
        options=ServingOptions(output_dtype=kind.output),
        **tier_of(dram, slots, count),
    )
    nbytes = max(int(module.rows.nbytes), held_bytes(device) - before)
    return Served(module=module, tables=tables, pattern=pattern, slots=slots, nbytes=nbytes)


def warm(module: Any, ids: Sequence[Tensor], slots: int) -> None:
    """Ask once for every one of `ids` of each table, the last ones to be found in slots."""
    chunk = max(1, min(slots // 2, _WARM_ROWS // len(ids)))
    with torch.no_grad():
        for batch, offsets in warming_batches(ids, chunk):
            module(batch, offsets)


def stock_serving(
    kind: Kind, tables: Sequence[TableSpec], device: torch.device, *, bounds: BoundsCheckMode = BoundsCheckMode.NONE
) -> IntNBitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's module with whole tables in device memory; its rows are not set."""
    where = EmbeddingLocation.DEVICE if device.type == "cuda" else EmbeddingLocation.HOST
    stock = IntNBitTableBatchedEmbeddingBagsCodegen(
        [(t.name, t.rows, t.dim, t.data_type, where) for t in tables],
        bounds_check_mode=bounds,
        output_dtype=kind.output,
        device=device,
    )
    stock.initialize_weights()
    return stock


def fill_serving(stock: IntNBitTableBatchedEmbeddingBagsCodegen, pattern: Pattern, tables: Sequence[TableSpec]) -> None:
    """Set all rows, wherever they are."""
    splits = stock.split_embedding_weights_with_scale_bias(split_scale_bias_mode=0)
    for table, (weights, *_) in zip(tables, splits, strict=True):
        pattern.fill(table.name, weights)


@dataclass(frozen=True)
class CacheCost:
    """Device bytes of UVM caching: some for each row of the tables, and for each set of `_WAYS` cached rows.

    Beside the row itself an entry has a tag and, with LRU, a time, of 8 bytes each; every row of the tables has 4
    bytes that say its table, and with LFU 8 more that count its uses.
    """

    row_bytes: int
    lfu: bool

    def fixed(self, rows: int) -> int:
        return (12 if self.lfu else 4) * rows

    @property
    def of_set(self) -> int:
        return _WAYS * (self.row_bytes + (8 if self.lfu else 16))

    def sets(self, rows: int, budget: int, least: int) -> int:
        """Sets that fit `budget` bytes, and no fewer than `least` rows need."""
        return max((budget - self.fixed(rows)) // self.of_set, -(-least // _WAYS), 1)


class UvmServing:
    """FBGEMM's inference module that keeps tables in host memory and caches rows on the device.

    Args:
        budget: bytes of device memory for the cache and its bookkeeping. least: rows that it holds in any case.
        shared: another such module, over the same tables, whose rows are these as well.
    """

    def __init__(
        self,
        kind: Kind,
        tables: Sequence[TableSpec],
        algorithm: CacheAlgorithm,
        *,
        budget: int,
        least: int,
        device: torch.device,
        shared: UvmServing | None = None,
    ) -> None:
        self._device = device
        # Rows of a CUDA module begin at multiples of 16 bytes.
        padded = -(-tables[0].row_bytes // 16) * 16
        cost = CacheCost(padded, algorithm is CacheAlgorithm.LFU)
        rows = sum(table.rows for table in tables)
        before = held_bytes(device)
        self.module = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(t.name, t.rows, t.dim, t.data_type, EmbeddingLocation.MANAGED_CACHING) for t in tables],
            bounds_check_mode=BoundsCheckMode.NONE,
            output_dtype=kind.output,
            cache_algorithm=algorithm,
            cache_sets=cost.sets(rows, budget, least),
            device=device,
        )
        if shared is None:
            self.module.initialize_weights()
        else:
            stock = self.module
            places, starts = stock.weights_physical_placements, stock.weights_physical_offsets
            stock._apply_split(stock.dev_size, stock.host_size, 0, places, starts, False)
            stock.weights_uvm, stock.uvm_size = shared.module.weights_uvm, shared.module.uvm_size
        self.nbytes = held_bytes(device) - before

    def misses(self, ids: Tensor, offsets: Tensor) -> int:
        """Different rows of a batch that are not in the cache now."""
        stock = self.module
        linear = torch.ops.fbgemm.linearize_cache_indices(stock.cache_hash_size_cumsum, ids, offsets)
        found = torch.ops.fbgemm.lxu_cache_lookup(
            torch.unique(linear),
            stock.lxu_cache_state,
            stock.total_cache_hash_size,
            False,
            stock.local_uvm_cache_stats,
        )
        return int((found < 0).sum())


@dataclass(frozen=True, kw_only=True)
class TrainKind:
    """What equal training tables are made of, and how they train."""

    dim: int
    data_type: SparseType = SparseType.FP32
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    arguments: dict[str, Any] = field(
        default_factory=lambda: {"learning_rate": 0.05, "eps": 1e-6, "stochastic_rounding": False}
    )

    @property
    def tbe_args(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, **self.arguments}

    def tables(self, count: int, rows: int) -> list[TableSpec]:
        state = row_state(self.optimizer)
        return [
            TableSpec(name=f"t{t}", rows=rows, dim=self.dim, data_type=self.data_type, state=state)
            for t in range(count)
        ]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Our training module of equal tables over a pattern."""

    module: TurboSSDTableBatchedEmbeddingBags
    tables: list[TableSpec]
    pattern: Pattern
    slots: int
    nbytes: int


def ours_training(
    kind: TrainKind, count: int, rows: int, *, slots: int, dram: int | None, device: torch.device, seed: int = 0
) -> Trained:
    """As `ours_serving`, of a training module."""
    tables = kind.tables(count, rows)
    pattern = Pattern(tables, seed)
    before = held_bytes(device)
    module = TurboSSDTableBatchedEmbeddingBags(
        [TableShard.whole(table) for table in tables],
        [slots] * count,
        list(range(count)),
        PatternStore(tables, pattern),
        device=device,
        options=TrainingOptions(tbe_args=kind.tbe_args),
        **tier_of(dram, slots, count),
    )
    nbytes = max(int(module.rows.nbytes), held_bytes(device) - before)
    return Trained(module=module, tables=tables, pattern=pattern, slots=slots, nbytes=nbytes)


def stock_training(
    kind: TrainKind, tables: Sequence[TableSpec], device: torch.device, *, cached: int | None = None
) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's training module with whole tables in device memory, or in host memory with `cached` rows on the device
    (LRU, no prefetch pipeline); its rows are not set."""
    cuda = device.type == "cuda"
    where, how = (EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST), {}
    if cached is not None:
        where = EmbeddingLocation.MANAGED_CACHING
        how = {"cache_algorithm": CacheAlgorithm.LRU, "cache_sets": max(1, cached // _WAYS)}
    compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(t.rows, t.dim, where, compute) for t in tables],
        weights_precision=kind.data_type,
        bounds_check_mode=BoundsCheckMode.NONE,
        pooling_mode=PoolingMode.SUM,
        device=device,
        **how,
        **kind.tbe_args,
    )


def fill_training(stock: SplitTableBatchedEmbeddingBagsCodegen, pattern: Pattern, tables: Sequence[TableSpec]) -> None:
    """Set the weights of all rows; the state starts at zero."""
    for table, weights in zip(tables, stock.split_embedding_weights(), strict=True):
        pattern.fill(table.name, weights.detach().view(torch.uint8))


__all__ = [
    "INT8",
    "CacheCost",
    "Kind",
    "Served",
    "TrainKind",
    "Trained",
    "UvmServing",
    "clean_up",
    "fill_serving",
    "fill_training",
    "held_bytes",
    "hits_of",
    "ours_serving",
    "ours_training",
    "stock_serving",
    "stock_training",
    "tier_of",
    "warm",
]
