"""The compute kernel: one group of SSD-backed tables on one rank, in the shape TorchRec's lookups expect."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from torch import nn
from torch.distributed import ProcessGroup
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_turbossd.cache import DEFAULT_POLICY
from torchrec_turbossd.errors import ConfigError, UnsupportedError
from torchrec_turbossd.planner.demand import ROW_STATE
from torchrec_turbossd.sharding.optimizer import TurboSSDFusedOptimizer
from torchrec_turbossd.sizing.memory import has_dram_tier, least_dram_slots
from torchrec_turbossd.sizing.shortage import named_budgets
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.tables import InitRule, StateSpec, TableShard, TableSpec
from torchrec_turbossd.tbe.layout import Bounds
from torchrec_turbossd.tbe.training import TrainingOptions, TurboSSDTableBatchedEmbeddingBags

TBE_ARGUMENTS = frozenset({
    "optimizer", "learning_rate", "eps", "weight_decay", "weight_decay_mode", "beta1", "beta2", "momentum", "eta",
    "max_gradient", "gradient_clipping", "max_norm", "stochastic_rounding", "output_dtype",
})  # fmt: skip
"""`fused_params` that act row by row and reach the stock TBE as they are."""

_PLACEMENT = frozenset({
    "cache_load_factor", "cache_algorithm", "cache_precision", "cache_reserved_memory", "prefetch_pipeline",
    "multipass_prefetch_config", "enforce_hbm", "bounds_check_mode", "embedding_table_index_type",
    "embedding_table_offset_type",
})  # fmt: skip
"""`fused_params` that say where rows of other kernels are cached, or that are read elsewhere."""


_FEWER_SLOTS = (
    "lower what decides how many they are: the memory that the planner may use (hbm_cap, ddr_cap), "
    "CacheParams.load_factor of the tables, or cache_load_factor in fused_params and load_factor of the sharder"
)
_FEWER_ROWS = (
    "lower KeyValueParams.l2_cache_size of the tables, dram_budget_gb of the sharders, or the planner's ddr_cap"
)


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """What the sharder decides for every SSD-backed table.

    seed: of the rows never written. policy: eviction policy.
    """

    seed: int = 0
    policy: str = DEFAULT_POLICY


@dataclass(frozen=True, kw_only=True)
class KernelNeeds:
    """What a kernel needs beyond TorchRec's config.

    slots: usable slots of each table of the group. dram_slots: rows of each that the DRAM tier of a GPU keeps, 0 for
    none; of no meaning on a CPU machine. store: holds the rows of all of them. group: of the ranks.
    """

    slots: Sequence[int]
    dram_slots: Sequence[int]
    store: RowStore
    group: ProcessGroup | None
    options: KernelOptions = field(default_factory=KernelOptions)


def _state(name: str, optimizer: EmbOptimType) -> tuple[StateSpec, ...]:
    # Resident tables have more optimizers than tables on SSD, whose TBE refuses the rest.
    if optimizer not in ROW_STATE:
        raise UnsupportedError(
            f"table {name!r}: rows trained with {getattr(optimizer, 'name', optimizer)} cannot be read and written one "
            f"by one; use one of {', '.join(o.name for o in ROW_STATE)}"
        )
    return ROW_STATE[optimizer]


def table_spec(config: Any, optimizer: EmbOptimType | None, seed: int) -> TableSpec:
    """The engine's description of a table that TorchRec trains with a fused optimizer (None: FBGEMM's default)."""
    data_type = data_type_to_sparse_type(config.data_type)
    return TableSpec(
        name=config.name,
        rows=config.num_embeddings,
        dim=config.embedding_dim,
        data_type=data_type,
        state=_state(config.name, optimizer or EmbOptimType.EXACT_SGD),
        init=InitRule(
            seed=seed, low=config.get_weight_init_min(), high=config.get_weight_init_max(), data_type=data_type
        ),
    )


def table_shard(table: ShardedEmbeddingTable, optimizer: EmbOptimType, seed: int) -> TableShard:
    """The engine's description of a TorchRec shard."""
    offsets = table.local_metadata.shard_offsets if table.local_metadata else [0, 0]
    return TableShard(
        table=table_spec(table, optimizer, seed),
        row_offset=offsets[0],
        rows=table.local_rows,
        col_offset=offsets[1],
        cols=table.local_cols,
    )


def group_optimizer(config: GroupedEmbeddingConfig) -> EmbOptimType:
    """The fused optimizer of a group; FBGEMM's default when none is given."""
    found: EmbOptimType = (config.fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)
    return found


def _tbe_arguments(config: GroupedEmbeddingConfig) -> dict[str, Any]:
    given = config.fused_params or {}
    # An option that is off asks for nothing.
    on = {name for name, value in given.items() if value is not None and value is not False}
    unknown = sorted(on - TBE_ARGUMENTS - _PLACEMENT)
    if unknown:
        raise UnsupportedError(
            f"fused_params not supported for SSD-backed tables "
            f"{', '.join(dict.fromkeys(t.name for t in config.embedding_tables))}: {', '.join(unknown)}; supported: "
            f"{', '.join(sorted(TBE_ARGUMENTS))}"
        )
    return {name: value for name, value in given.items() if name in TBE_ARGUMENTS}


def _bounds(config: GroupedEmbeddingConfig) -> Bounds:
    mode = (config.fused_params or {}).get("bounds_check_mode")
    if mode is None:
        return Bounds.RAISE
    if not isinstance(mode, BoundsCheckMode):
        raise ConfigError(f"bounds_check_mode must be a BoundsCheckMode, got {mode!r}")
    if mode.name.endswith("WARNING"):
        return Bounds.WARN
    return Bounds.IGNORE if mode.name.endswith("IGNORE") else Bounds.RAISE


def _tier(shards: Sequence[TableShard], rows: Sequence[int]) -> list[int] | None:
    """Rows of each table as the TBE takes them; None where none is kept."""
    if not any(rows):
        return None
    return [max(count, least_dram_slots(shard.rows)) for shard, count in zip(shards, rows, strict=True)]


class TurboSSDKernel(FusedOptimizerModule):
    """A group of tables whose rows live in a row store; the part that bags and sequences share.

    Comes before one of TorchRec's kernel base classes, whose constructor has run when `_build` is called.
    """

    _config: GroupedEmbeddingConfig
    _feature_table_map: list[int]

    def _build(self, needs: KernelNeeds, pooling: PoolingMode, device: torch.device | None) -> None:
        """Make the TBE and its optimizer."""
        config = self._config
        optimizer, where = group_optimizer(config), device or torch.device("cpu")
        shards = [table_shard(table, optimizer, needs.options.seed) for table in config.embedding_tables]
        self._dram_slots = _tier(shards, needs.dram_slots) if has_dram_tier(where.type) else None
        tier: dict[str, Any] = {"dram_slots": self._dram_slots} if has_dram_tier(where.type) else {}
        with named_budgets(where, _FEWER_SLOTS, _FEWER_ROWS):
            self._emb_module = TurboSSDTableBatchedEmbeddingBags(
                shards,
                needs.slots,
                self._feature_table_map,
                needs.store,
                device=where,
                options=TrainingOptions(
                    pooling_mode=pooling,
                    policy=needs.options.policy,
                    bounds=_bounds(config),
                    tbe_args=_tbe_arguments(config),
                ),
                **tier,
            )
        self._group = needs.group
        self._optim = TurboSSDFusedOptimizer(self._emb_module, config.embedding_tables, needs.group)

    @property
    def config(self) -> GroupedEmbeddingConfig:
        return self._config

    @property
    def emb_module(self) -> Any:
        return self._emb_module

    @property
    def dram_slots(self) -> list[int]:
        """Rows of each table of the group that the DRAM tier of a GPU keeps besides those in slots."""
        return self._dram_slots or [0] * len(self._emb_module.shards)

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        return self._optim

    def forward(self, features: KeyedJaggedTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Look `features` up: [B, sum of dims] pooled, [N, dim] as a sequence."""
        if features.variable_stride_per_key():
            raise UnsupportedError(
                "a batch size per feature (variable stride) is not supported on SSD-backed tables "
                f"{', '.join(t.name for t in self._config.embedding_tables)}; give every feature the same batch size"
            )
        weights = features.weights_or_none()
        if weights is not None and not weights.is_floating_point():
            weights = None
        # As they are: a prefetched batch is known by the memory of its ids.
        out: torch.Tensor = self._emb_module(features.values(), features.offsets(), weights)
        return out

    def prefetch(self, features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """Bring the rows of a batch into slots ahead of its forward."""
        self._emb_module.prefetch(features.values(), features.offsets(), forward_stream)

    def flush(self) -> None:
        self._emb_module.flush()

    def purge(self) -> None:
        """Nothing: loads write through, and leave no stale slot behind."""

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Nothing of its own: the sharded module adds lazy rows."""
        return OrderedDict() if destination is None else destination

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ()

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ()

    def named_parameters_by_table(self) -> Iterator[tuple[str, Any]]:
        for name in dict.fromkeys(table.name for table in self._config.embedding_tables):
            parameter = placeholder()
            own = TurboSSDFusedOptimizer(
                self._emb_module, self._config.embedding_tables, self._group, (name, parameter)
            )
            parameter._in_backward_optimizers = [own]  # type: ignore[attr-defined]
            yield name, parameter


class TurboSSDEmbeddingBag(TurboSSDKernel, BaseBatchedEmbeddingBag[torch.Tensor]):
    """Pooled lookups of a group of tables on SSD."""

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        sharding_type: ShardingType | None,
        needs: KernelNeeds,
    ) -> None:
        super().__init__(config, needs.group, device, sharding_type)
        self._build(needs, self._pooling, device)


class TurboSSDEmbedding(TurboSSDKernel, BaseBatchedEmbedding[torch.Tensor]):
    """Sequence lookups of a group of tables on SSD."""

    def __init__(self, config: GroupedEmbeddingConfig, device: torch.device | None, needs: KernelNeeds) -> None:
        super().__init__(config, needs.group, device)
        self._build(needs, PoolingMode.NONE, device)


def placeholder() -> nn.Parameter:
    """What TorchRec registers for a table without local weights: an empty parameter that no optimizer steps."""
    parameter = nn.Parameter(torch.empty(0))
    parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
    return parameter


__all__ = [
    "TBE_ARGUMENTS",
    "KernelNeeds",
    "KernelOptions",
    "TurboSSDEmbedding",
    "TurboSSDEmbeddingBag",
    "TurboSSDKernel",
    "group_optimizer",
    "placeholder",
    "table_shard",
    "table_spec",
]
