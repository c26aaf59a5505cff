"""The shards that a rank holds, ours and stock ones alike, as rows of bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from torchrec_turbossd.errors import UnsupportedError
from torchrec_turbossd.sharding.kernel import TurboSSDKernel, group_optimizer, table_shard
from torchrec_turbossd.tables import TableShard
from torchrec_turbossd.tbe.slot_memory import TrainingMemory
from torchrec_turbossd.tbe.training import TurboSSDTableBatchedEmbeddingBags


@dataclass(frozen=True, kw_only=True)
class LocalTable:
    """One shard of a table on this rank.

    on_ssd: whether this package's kernel holds it. place: its number in the TBE. metadata: TorchRec's.
    """

    shard: TableShard
    metadata: ShardMetadata
    place: int
    owner: TurboSSDTableBatchedEmbeddingBags | TrainingMemory

    @property
    def on_ssd(self) -> bool:
        return isinstance(self.owner, TurboSSDTableBatchedEmbeddingBags)

    def read(self, ids: Tensor) -> Tensor:
        """Weights and state of local `ids` [N]: [N, row_bytes] uint8 on the CPU."""
        if isinstance(self.owner, TurboSSDTableBatchedEmbeddingBags):
            return self.owner.read_rows(self.place, ids)
        return self.owner.read(self.place, ids)

    def write(self, ids: Tensor, rows: Tensor) -> None:
        """Overwrite distinct local `ids` [N] with `rows` [N, row_bytes] uint8."""
        if isinstance(self.owner, TurboSSDTableBatchedEmbeddingBags):
            self.owner.write_rows(self.place, ids, rows)
        else:
            self.owner.write(self.place, ids, rows)


def local_tables(lookups: Iterable[nn.Module], seed: int, names: Collection[str]) -> list[LocalTable]:
    """The shards of tables `names` in `lookups`, which can be read and written row by row.

    Data-parallel tables are left out: TorchRec keeps them with the dense parameters. Raises `UnsupportedError` for a
    stock kernel or optimizer whose rows cannot be read.
    """
    found: list[LocalTable] = []
    for lookup in lookups:
        for kernel in getattr(lookup, "_emb_modules", []):
            found.extend(_tables_of(kernel, seed, names))
    return found


def _tables_of(kernel: Any, seed: int, names: Collection[str]) -> list[LocalTable]:
    config = kernel.config
    wanted = [(place, table) for place, table in enumerate(config.embedding_tables) if table.name in names]
    if not wanted or config.compute_kernel == EmbeddingComputeKernel.DENSE:
        return []
    owner: TurboSSDTableBatchedEmbeddingBags | TrainingMemory
    if isinstance(kernel, TurboSSDKernel):
        owner = kernel.emb_module
    elif isinstance(kernel.emb_module, SplitTableBatchedEmbeddingBagsCodegen):
        kernel.flush()
        owner = _memory(kernel.emb_module)
    else:
        raise UnsupportedError(
            f"tables {', '.join(t.name for t in config.embedding_tables)} use kernel {config.compute_kernel}, which "
            "cannot be read row by row; use FUSED, or place them on SSD"
        )
    optimizer = group_optimizer(config)
    return [
        LocalTable(shard=table_shard(table, optimizer, seed), metadata=table.local_metadata, place=place, owner=owner)
        for place, table in wanted
    ]


def _memory(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> TrainingMemory:
    if tbe.lxu_cache_weights.numel():
        raise UnsupportedError("tables in UVM caching are not supported beside a snapshot; use FUSED or SSD")
    return TrainingMemory(tbe)


def in_windows(rows: int, window: int) -> Iterable[Tensor]:
    """Local ids 0 to `rows` - 1, `window` at a time."""
    for first in range(0, rows, window):
        yield torch.arange(first, min(first + window, rows))


__all__ = ["LocalTable", "in_windows", "local_tables"]
