"""TorchRec's grouped lookup with our kernel in the groups that ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import (
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_turbossd.errors import ConfigError
from torchrec_turbossd.planner.kernel import dram_slots_of, slots_of
from torchrec_turbossd.sharding.kernel import (
    KernelNeeds,
    KernelOptions,
    TurboSSDEmbedding,
    TurboSSDEmbeddingBag,
    TurboSSDKernel,
)
from torchrec_turbossd.sharding.tier import ShardPlace, TierNeed
from torchrec_turbossd.sizing.memory import most_dram_slots
from torchrec_turbossd.store.contract import RowStore
from torchrec_turbossd.tables import TableShard


def is_ours(config: GroupedEmbeddingConfig) -> bool:
    """Whether a group of tables uses this package's kernel."""
    return bool(config.compute_kernel == EmbeddingComputeKernel.CUSTOMIZED_KERNEL)


@dataclass(frozen=True, kw_only=True)
class LookupContext:
    """What the groups of a sharded module need beyond TorchRec's config.

    plan: each table's sharding, which carries the slots of its shards.
    load_factor: share of a shard's rows that get slots when the plan gives no number.
    tier: rows of local shards in the DRAM tier of a GPU; none of those left out.
    """

    plan: Mapping[str, ParameterSharding]
    store: RowStore
    load_factor: float = 0.2
    kernel: KernelOptions = field(default_factory=KernelOptions)
    tier: Mapping[ShardPlace, int] = field(default_factory=dict)

    def slots(self, table: ShardedEmbeddingTable) -> int:
        """Slots of one local shard: the plan's, else by load factor; at least one, at most its rows."""
        sharding = self.plan[table.name]
        count = _planned(table, slots_of(sharding))
        if count is None:
            cache = sharding.cache_params
            factor = cache.load_factor if cache is not None and cache.load_factor is not None else self.load_factor
            if not 0.0 < factor <= 1.0:
                raise ConfigError(f"table {table.name!r}: load_factor must be in (0, 1], got {factor}")
            count = -int(-table.local_rows * factor // 1)
        return max(1, min(count, table.local_rows))

    def tier_need(self, table: ShardedEmbeddingTable, shard: TableShard) -> TierNeed:
        """What decides the rows of one local shard in the DRAM tier."""
        sharding, slots = self.plan[table.name], self.slots(table)
        planned = _planned(table, dram_slots_of(sharding))
        if planned is not None:
            planned = max(0, min(planned, most_dram_slots(slots, shard.rows)))
        return TierNeed(shard=shard, slots=slots, features=table.num_features(), sharding=sharding, planned=planned)

    def dram_slots(self, table: ShardedEmbeddingTable) -> int:
        """Rows of one local shard in the DRAM tier."""
        first_row, first_col = table.local_metadata.shard_offsets
        return self.tier.get((table.name, first_row, first_col), 0)


def _planned(table: ShardedEmbeddingTable, counts: Sequence[int] | None) -> int | None:
    """Of counts that a plan has for each shard, the local one's."""
    if counts is None:
        return None
    offsets = [list(s.shard_offsets) for s in table.global_metadata.shards_metadata]
    if len(counts) != len(offsets):
        raise ConfigError(
            f"table {table.name!r}: the plan has slots for {len(counts)} shards, but there are {len(offsets)}"
        )
    return counts[offsets.index(list(table.local_metadata.shard_offsets))]


class _Lookup:
    """The part that pooled and sequence lookups share."""

    _context: LookupContext
    _emb_modules: nn.ModuleList
    _feature_splits: list[int]

    def _needs(self, config: GroupedEmbeddingConfig, group: ProcessGroup | None) -> KernelNeeds:
        return KernelNeeds(
            slots=[self._context.slots(table) for table in config.embedding_tables],
            dram_slots=[self._context.dram_slots(table) for table in config.embedding_tables],
            store=self._context.store,
            group=group,
            options=self._context.kernel,
        )

    def _prefetch_ours(self, features: KeyedJaggedTensor, forward_stream: Any) -> None:
        for kernel, part in zip(self._emb_modules, features.split(self._feature_splits), strict=True):
            if isinstance(kernel, TurboSSDKernel):
                kernel.prefetch(part, forward_stream)


class TurboSSDPooledLookup(_Lookup, GroupedPooledEmbeddingsLookup):
    """Pooled lookups of a sharding type, stock groups and ours side by side."""

    def __init__(self, context: LookupContext, **stock: Any) -> None:
        # Set first: the stock constructor builds the kernels.
        self._context = context
        super().__init__(**stock)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> BaseEmbedding:
        if not is_ours(config):
            return super()._create_embedding_kernel(config, device, pg, sharding_type, env)
        return TurboSSDEmbeddingBag(config, device, sharding_type, self._needs(config, pg))

    def prefetch(self, sparse_features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """Prefetch stock groups as TorchRec does, and ours."""
        super().prefetch(sparse_features, forward_stream)
        self._prefetch_ours(sparse_features, forward_stream)


class TurboSSDSequenceLookup(_Lookup, GroupedEmbeddingsLookup):
    """Sequence lookups of a sharding type, stock groups and ours side by side."""

    def __init__(self, context: LookupContext, **stock: Any) -> None:
        self._context = context
        super().__init__(**stock)

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: ProcessGroup | None,
        device: torch.device | None,
        env: ShardingEnv | None = None,
    ) -> BaseEmbedding:
        if not is_ours(config):
            return super()._create_embedding_kernel(config, pg, device, env)
        return TurboSSDEmbedding(config, device, self._needs(config, pg))

    def prefetch(self, sparse_features: KeyedJaggedTensor, forward_stream: Any = None) -> None:
        """Prefetch stock groups as TorchRec does, and ours."""
        if self._need_prefetch:
            # TorchRec then prefetches every kernel that can, ours among them.
            super().prefetch(sparse_features, forward_stream)
        else:
            self._prefetch_ours(sparse_features, forward_stream)


__all__ = ["LookupContext", "TurboSSDPooledLookup", "TurboSSDSequenceLookup", "is_ours"]
