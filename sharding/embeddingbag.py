"""`EmbeddingBagCollection` with tables on SSD: the sharded module, and the sharder that makes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_turbossd.sharding.lookup import LookupContext, TurboSSDPooledLookup
from torchrec_turbossd.sharding.module import TurboSSDOptions, TurboSSDShardedModule
from torchrec_turbossd.sharding.sharder import TurboSSDSharder, on_turbo_ssd

SHARDING_TYPES = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
    ShardingType.GRID_SHARD.value,
)
"""How SSD-backed bags can be sharded."""

# MEAN pooling is a SUM in a row shard, divided after the shards are added up; the stock lookup is told by this.
_ROW_SHARDED = {
    ShardingType.ROW_WISE.value: ShardingType.ROW_WISE,
    ShardingType.TABLE_ROW_WISE.value: ShardingType.TABLE_ROW_WISE,
    ShardingType.GRID_SHARD.value: ShardingType.TABLE_ROW_WISE,
}


class TurboSSDShardedEmbeddingBagCollection(TurboSSDShardedModule, ShardedEmbeddingBagCollection):
    """A sharded `EmbeddingBagCollection` whose plan may place tables on SSD.

    Made by `TurboSSDEmbeddingBagCollectionSharder`. Beyond TorchRec's module it has `streaming_update`, `flush`,
    `read_stats`, `slots` and `close`.
    """

    _TABLES = "embedding_bags"
    _SHARDING_TYPES = SHARDING_TYPES

    def __init__(self, options: TurboSSDOptions, module: EmbeddingBagCollection, **stock: Any) -> None:
        self._prepare(options, module, module.embedding_bag_configs(), stock)
        try:
            super().__init__(module=module, **stock)
            self._load_initial(module)
        except BaseException:
            self._close_stores()
            raise

    def _shardings(self) -> Iterable[Any]:
        found: Any = self._embedding_shardings
        return list(found)

    def _make_lookup(self, sharding_type: str, sharding: Any, context: LookupContext) -> nn.Module:
        return TurboSSDPooledLookup(
            context,
            grouped_configs=sharding._grouped_embedding_configs_per_rank[sharding._rank],
            device=sharding._device,
            pg=sharding._pg,
            sharding_type=_ROW_SHARDED.get(sharding_type),
            env=sharding._env,
        )

    def reset_parameters(self) -> None:
        """Initialise stock tables; rows of SSD-backed ones start from their rule."""
        every = self._embedding_bag_configs  # type: ignore[has-type]
        try:
            self._embedding_bag_configs = [c for c in every if c.name not in self._ours]
            super().reset_parameters()
        finally:
            self._embedding_bag_configs = every


class TurboSSDEmbeddingBagCollectionSharder(TurboSSDSharder, EmbeddingBagCollectionSharder):
    """Shards `EmbeddingBagCollection`s, tables on SSD among them; see `TurboSSDSharder` for its arguments."""

    _OURS = SHARDING_TYPES

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> TurboSSDShardedEmbeddingBagCollection:
        """Shard one module on this rank; the interface of TorchRec's sharders."""
        return TurboSSDShardedEmbeddingBagCollection(
            self._turbo_options,
            module,
            table_name_to_parameter_sharding=on_turbo_ssd(params),
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[TurboSSDShardedEmbeddingBagCollection]:
        return TurboSSDShardedEmbeddingBagCollection


__all__ = [
    "SHARDING_TYPES",
    "TurboSSDEmbeddingBagCollectionSharder",
    "TurboSSDShardedEmbeddingBagCollection",
]
