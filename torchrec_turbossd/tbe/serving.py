"""The quantised serving TBE: stock FBGEMM inference kernels on slots in front of a row store."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from torchrec_turbossd.cache import DEFAULT_POLICY, SlotCache
from torchrec_turbossd.cache.device_cache import DeviceCache
from torchrec_turbossd.errors import CacheFullError, ConfigError, InputError, UnsupportedError
from torchrec_turbossd.tables import FP8_EXPONENT_BIAS, FP8_EXPONENT_BITS, MAX_SLOTS, TableShard
from torchrec_turbossd.tbe.device_serving import DeviceServingRows
from torchrec_turbossd.tbe.held import HeldBatch
from torchrec_turbossd.tbe.layout import Batch, Bounds, UnplacedBatch
from torchrec_turbossd.tbe.served import UpdatableStore
from torchrec_turbossd.tbe.serving_rows import ServingRows
from torchrec_turbossd.tbe.slot_memory import ServingMemory
from torchrec_turbossd.tbe.stock_lookup import StockLookup

OUTPUT_TYPES = {SparseType.FP32: torch.float32, SparseType.FP16: torch.float16, SparseType.BF16: torch.bfloat16}
_WIDTHS = {SparseType.INT4: 4, SparseType.INT2: 8}
"""FBGEMM quantises these types two bytes at a time."""


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """How a serving TBE looks rows up.

    output_dtype: FP32, FP16 or BF16. policy: an eviction policy by name. bounds: what an id outside its table does.
    """

    pooling_mode: PoolingMode = PoolingMode.SUM
    output_dtype: SparseType = SparseType.FP16
    policy: str = DEFAULT_POLICY
    bounds: Bounds = Bounds.RAISE


class TurboSSDIntNBitTableBatchedEmbeddingBags(nn.Module):
    """Embedding bags of serving tables whose rows live in a row store; the rows in use are in slots.

    Called like the stock module: `forward(indices [N], offsets [features * B + 1], per_sample_weights [N])` gives
    [B, sum of dims], or [N, D] with `PoolingMode.NONE`, of the output type. Numbers are those of the stock module
    holding whole tables. Several threads may look up at once.

    Args:
        shards: local tables, without state; of one width with `PoolingMode.NONE`.
        slots: usable slots of each table, between 1 and its rows.
        feature_table_map: for each feature, its table; every table needs one.
        store: holds rows by `TableShard.key`; the caller closes it.
        dram_slots: on a GPU, for each table, rows that host memory holds beside the slots. None: only rows on
            their way from the store.
    """

    def __init__(
        self,
        shards: Sequence[TableShard],
        slots: Sequence[int],
        feature_table_map: Sequence[int],
        store: UpdatableStore,
        *,
        device: torch.device | str = "cpu",
        options: ServingOptions | None = None,
        dram_slots: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.options = options or ServingOptions()
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        _check_tables(shards, slots)
        _check_features([s.cols for s in shards], feature_table_map, self.options)
        _check_output(shards, self.options, self.device)
        self.feature_table_map = list(feature_table_map)
        self._specs = [(s.table.name, s.cols, s.table.data_type) for s in shards]
        self._row_bytes = [s.row_bytes for s in shards]
        self.tbe = self._stock(slots)
        self._lookup = StockLookup(self.tbe)
        self.rows = self._rows(shards, slots, store, dram_slots)
        self._id_type = torch.int32 if self.device.type == "cuda" else torch.int64
        self._warned = False

    def _rows(
        self,
        shards: Sequence[TableShard],
        slots: Sequence[int],
        store: UpdatableStore,
        dram_slots: Sequence[int] | None,
    ) -> ServingRows | DeviceServingRows:
        memory = ServingMemory(self.tbe, self._row_bytes)
        rows, policy = [s.rows for s in shards], self.options.policy
        if self.device.type == "cpu" and dram_slots is None:
            cache = SlotCache(rows, slots, policy=policy)
            return ServingRows(shards, self.feature_table_map, memory, store, cache, self.options.bounds)
        on_device = DeviceCache(
            rows,
            slots,
            [memory.parts(table) for table in range(len(shards))],
            row_bytes=self._row_bytes,
            dram_slots=dram_slots,
            feature_table=self.feature_table_map,
            policy=policy,
            # Updates are written to wherever rows are.
            changes=False,
        )
        return DeviceServingRows(shards, self.feature_table_map, memory, store, on_device, self.options.bounds)

    def _stock(self, slots: Sequence[int]) -> IntNBitTableBatchedEmbeddingBagsCodegen:
        """A stock TBE with `slots` rows a table and the reserved row before them, all zero."""
        where = EmbeddingLocation.DEVICE if self.device.type == "cuda" else EmbeddingLocation.HOST
        tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
            [
                (name, count + 1, cols, data_type, where)
                for count, (name, cols, data_type) in zip(slots, self._specs, strict=True)
            ],
            feature_table_map=self.feature_table_map,
            pooling_mode=self.options.pooling_mode,
            output_dtype=self.options.output_dtype,
            # Bounds are checked on row ids, before they become slots.
            bounds_check_mode=BoundsCheckMode.NONE,
            device=self.device,
            fp8_exponent_bits=FP8_EXPONENT_BITS,
            fp8_exponent_bias=FP8_EXPONENT_BIAS,
        )
        tbe.initialize_weights()
        return tbe

    def forward(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None) -> Tensor:
        """Look a batch up; see the class.

        Raises:
            InputError: dtype, shape, device or offsets that do not fit; weights with `PoolingMode.NONE`.
            RowIndexError: an id outside its table.
        """
        weights = self._check_weights(per_sample_weights, indices)
        if isinstance(self.rows, DeviceServingRows):
            return self._look_up_on_device(self.rows, self.rows.place(indices, offsets), weights)
        batch = self.rows.layout.place(indices, offsets, later=True)
        offsets = offsets.to(self._id_type).contiguous()
        try:
            with self.rows.slots_of(batch) as slots:
                return self._call(self._lookup, slots, offsets, weights)
        except CacheFullError as full:
            self._warn_outside(full)
            return self._run_outside(batch, offsets, weights)

    def prefetch(self, indices: Tensor, offsets: Tensor) -> None:
        """Bring the rows of a batch into slots ahead of its lookup; returns when they are there or on their way.

        They are not counted as read, and stay until others need the slots more. On a GPU call it on a CUDA stream of
        its own, and it runs beside the last lookup. What the store is read for is waited for: another thread can do
        that while this one looks up. A batch that does not fit in the slots is left to its lookup.

        Raises:
            InputError, RowIndexError: as a lookup.
        """
        if isinstance(self.rows, DeviceServingRows):
            self.rows.prefetch(self.rows.place(indices, offsets))
        else:
            self.rows.prefetch(self.rows.layout.place(indices, offsets))

    def hold(self, indices: Tensor, offsets: Tensor) -> HeldBatch:
        """Bring the rows of a batch into slots and hold them there, for a lookup that a CUDA graph captures.

        Raises:
            InputError, RowIndexError: as a lookup.
            CacheFullError: the rows do not fit in the slots.
            UnsupportedError: the slots are not on a GPU.
        """
        if not isinstance(self.rows, DeviceServingRows):
            raise UnsupportedError(f"only batches on a GPU can be held, and slots are on {self.device}; look them up")
        return HeldBatch(self.rows, self._lookup, self._check_weights, indices, offsets)

    def _look_up_on_device(self, rows: DeviceServingRows, batch: UnplacedBatch, weights: Tensor | None) -> Tensor:
        def run(slots: Tensor, offsets: Tensor) -> Tensor:
            return self._call(self._lookup, slots, offsets, weights)

        try:
            return rows.look_up(batch, self._id_type, run)
        except CacheFullError as full:
            self._warn_outside(full)
            return self._run_outside(batch, batch.offsets.to(self._id_type), weights)

    def _call(self, lookup: StockLookup, slots: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        return lookup(slots.to(self._id_type), offsets, weights)

    def _run_outside(self, batch: Batch, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Run a batch on a stock TBE of just its distinct rows."""
        distinct = self.rows.take_out(batch)
        tbe = self._stock([max(1, each.numel()) for each in distinct.ids])
        memory = ServingMemory(tbe, self._row_bytes)
        for table, rows in enumerate(distinct.rows):
            memory.write(table, torch.arange(1, rows.shape[0] + 1, device=self.device), rows)
        return self._call(StockLookup(tbe), distinct.slots, offsets, weights)

    def _warn_outside(self, full: CacheFullError) -> None:
        if self._warned or self.rows.squeezed:
            return
        self._warned = True
        names = ", ".join(f"{name}: {n}" for (name, *_), n in zip(self._specs, self.rows.cache.slots, strict=True))
        warnings.warn(
            f"a batch did not fit in the slots ({full}) and was answered outside them, slower; raise the memory budget "
            f"or the target hit rate, or send smaller batches (slots: {names}). Said once",
            RuntimeWarning,
            stacklevel=6,
        )

    def _check_weights(self, weights: Tensor | None, indices: Tensor) -> Tensor | None:
        if weights is None:
            return None
        if self.options.pooling_mode == PoolingMode.NONE:
            raise InputError("per_sample_weights have no meaning without pooling; pass None")
        if not isinstance(weights, Tensor):
            raise InputError(f"per_sample_weights must be a tensor, got {type(weights).__name__}")
        if weights.shape != indices.shape or not weights.is_floating_point() or weights.device != indices.device:
            raise InputError(
                f"per_sample_weights must be floating of shape {tuple(indices.shape)} on {indices.device}, got "
                f"{weights.dtype} {tuple(weights.shape)} on {weights.device}"
            )
        return weights.to(torch.float32).contiguous()


def _check_tables(shards: Sequence[TableShard], slots: Sequence[int]) -> None:
    if not shards:
        raise ConfigError("a serving TBE needs at least one table, got none")
    if len(slots) != len(shards):
        raise ConfigError(f"{len(shards)} tables need as many slot counts, got {len(slots)}")
    for shard, count in zip(shards, slots, strict=True):
        name, multiple = shard.table.name, _WIDTHS.get(shard.table.data_type, 1)
        if shard.table.state:
            raise ConfigError(f"table {name!r}: serving rows carry no optimizer state, got {shard.table.state}")
        if shard.cols % multiple:
            raise ConfigError(
                f"table {name!r}: {shard.table.data_type.name} rows have a width that is a multiple of {multiple}, got "
                f"{shard.cols}"
            )
        if not 1 <= count <= min(shard.rows, MAX_SLOTS):
            raise ConfigError(f"table {name!r}: slots must be 1 to {min(shard.rows, MAX_SLOTS)}, got {count}")


def _check_features(cols: Sequence[int], feature_table_map: Sequence[int], options: ServingOptions) -> None:
    if sorted(set(feature_table_map)) != list(range(len(cols))):
        raise ConfigError(
            f"feature_table_map must name each of the {len(cols)} tables (0 to {len(cols) - 1}) at least once, got "
            f"{list(feature_table_map)}"
        )
    if options.pooling_mode == PoolingMode.NONE and len(set(cols)) > 1:
        raise ConfigError(f"tables of one module without pooling must have one width, got {list(cols)}")
    if options.output_dtype not in OUTPUT_TYPES:
        raise UnsupportedError(
            f"output type {options.output_dtype} is not supported; use one of {', '.join(t.name for t in OUTPUT_TYPES)}"
        )


def _check_output(shards: Sequence[TableShard], options: ServingOptions, device: torch.device) -> None:
    int2 = [s.table.name for s in shards if s.table.data_type is SparseType.INT2]
    if int2 and device.type == "cuda" and options.output_dtype is SparseType.FP32:
        raise UnsupportedError(
            f"table {int2[0]!r}: FBGEMM's CUDA kernel leaves most columns of INT2 rows unwritten in FP32; use "
            "output_dtype FP16 or BF16"
        )


__all__ = ["OUTPUT_TYPES", "ServingOptions", "TurboSSDIntNBitTableBatchedEmbeddingBags"]
