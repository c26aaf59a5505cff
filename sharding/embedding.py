"""`EmbeddingCollection` with tables on SSD: the sharded module, and the sharder that makes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from torchrec_turbossd.sharding.lookup import LookupContext, TurboSSDSequenceLookup
from torchrec_turbossd.sharding.module import TurboSSDOptions, TurboSSDShardedModule
from torchrec_turbossd.sharding.sharder import TurboSSDSharder, on_turbo_ssd

SEQUENCE_SHARDING_TYPES = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
)
"""How SSD-backed tables of sequences can be sharded: all that TorchRec has for them."""


class TurboSSDShardedEmbeddingCollection(TurboSSDShardedModule, ShardedEmbeddingCollection):
    """A sharded `EmbeddingCollection` whose plan may place tables on SSD.

    Made by `TurboSSDEmbeddingCollectionSharder`. Beyond TorchRec's module it has `streaming_update`, `flush`,
    `read_stats`, `slots` and `close`.
    """

    _TABLES = "embeddings"
    _SHARDING_TYPES = SEQUENCE_SHARDING_TYPES

    def __init__(self, options: TurboSSDOptions, module: EmbeddingCollection, **stock: Any) -> None:
        self._prepare(options, module, module.embedding_configs(), stock)
        try:
            # Weights of a module off the meta device are loaded by the stock constructor, through `load_state_dict`.
            super().__init__(module=module, **stock)
        except BaseException:
            self._close_stores()
            raise

    def _shardings(self) -> Iterable[Any]:
        found: Any = self._sharding_type_to_sharding
        return list(found.values())

    def _make_lookup(self, sharding_type: str, sharding: Any, context: LookupContext) -> nn.Module:
        return TurboSSDSequenceLookup(
            context,
            grouped_configs=sharding._grouped_embedding_configs_per_rank[self._env.rank],
            device=sharding._device,
            pg=sharding._pg,
            env=sharding._env,
        )

    def reset_parameters(self) -> None:
        """Initialise stock tables; rows of SSD-backed ones start from their rule."""
        every = self._embedding_configs  # type: ignore[has-type]
        try:
            self._embedding_configs = [c for c in every if c.name not in self._ours]
            super().reset_parameters()
        finally:
            self._embedding_configs = every


class TurboSSDEmbeddingCollectionSharder(TurboSSDSharder, EmbeddingCollectionSharder):
    """Shards `EmbeddingCollection`s, tables on SSD among them; see `TurboSSDSharder` for its arguments.

    `use_index_dedup` is TorchRec's: ids of a batch are looked up once.
    """

    _OURS = SEQUENCE_SHARDING_TYPES
    _STOCK = ("use_index_dedup",)

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> TurboSSDShardedEmbeddingCollection:
        """Shard one module on this rank; the interface of TorchRec's sharders."""
        return TurboSSDShardedEmbeddingCollection(
            self._turbo_options,
            module,
            table_name_to_parameter_sharding=on_turbo_ssd(params),
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[TurboSSDShardedEmbeddingCollection]:
        return TurboSSDShardedEmbeddingCollection


__all__ = [
    "SEQUENCE_SHARDING_TYPES",
    "TurboSSDEmbeddingCollectionSharder",
    "TurboSSDShardedEmbeddingCollection",
]
