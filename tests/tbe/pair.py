"""Our training TBE beside the stock one that holds whole tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor

from torchrec_turbossd.rows import initial_rows
from torchrec_turbossd.store import MemoryRowStore
from torchrec_turbossd.tables import InitRule, TableShard, TableSpec
from torchrec_turbossd.tbe.slot_memory import TrainingMemory
from torchrec_turbossd.tbe.training import TrainingOptions, TurboSSDTableBatchedEmbeddingBags, row_state

ROWS, DIMS, FEATURES, BATCH = (500, 300), (8, 16), (0, 0, 1), 8
DRAM_SLOTS: tuple[int, int] | None = None
"""Of the DRAM tier behind the slots; where a test has one."""
OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD]


def shards_of(
    optimizer: EmbOptimType, data_type: SparseType = SparseType.FP32, dims: Sequence[int] = DIMS
) -> list[TableShard]:
    init = InitRule(seed=1, low=-0.1, high=0.1, data_type=data_type)
    return [
        TableShard.whole(
            TableSpec(name=name, rows=rows, dim=dim, data_type=data_type, state=row_state(optimizer), init=init)
        )
        for name, rows, dim in zip("ab", ROWS, dims, strict=True)
    ]


class Pair:
    """Ours and the stock module, with the same rows and options."""

    def __init__(
        self,
        device: str,
        slots: Sequence[int],
        optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        pooling: PoolingMode = PoolingMode.SUM,
        data_type: SparseType = SparseType.FP32,
        **tbe_args: Any,
    ) -> None:
        tbe_args = {"optimizer": optimizer, "learning_rate": 0.1, "eps": 1e-8, **tbe_args}
        dims = (8, 8) if pooling is PoolingMode.NONE else DIMS
        self.device = device
        self.shards = shards_of(optimizer, data_type, dims)
        self.store = MemoryRowStore({s.key: s.row_bytes for s in self.shards})
        options = TrainingOptions(pooling_mode=pooling, tbe_args=tbe_args)
        self.ours = TurboSSDTableBatchedEmbeddingBags(
            self.shards, slots, FEATURES, self.store, device=device, options=options, dram_slots=DRAM_SLOTS
        )
        cuda = device != "cpu"
        where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
        self.stock = SplitTableBatchedEmbeddingBagsCodegen(
            [(s.rows, s.cols, *where) for s in self.shards],
            feature_table_map=list(FEATURES),
            pooling_mode=pooling,
            weights_precision=data_type,
            device=torch.device(device),
            **tbe_args,
        )
        memory = TrainingMemory(self.stock)
        for table, shard in enumerate(self.shards):
            ids = torch.arange(shard.rows)
            memory.write(table, ids.to(device), initial_rows(shard, ids))

    def batch(self, seed: int, size: int = BATCH, most: int = 6) -> tuple[Tensor, Tensor]:
        """(ids, offsets) with hot and cold rows, duplicates and empty bags."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, most, (len(FEATURES) * size,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        per_feature = lengths.view(len(FEATURES), size).sum(1).tolist()
        rows = torch.cat([torch.full((n,), ROWS[t]) for t, n in zip(FEATURES, per_feature, strict=True)])
        ids = (torch.rand(rows.numel(), generator=generator) ** 3 * rows).long()
        return ids.to(self.device), offsets.to(self.device)

    def tensor(self, *values: float) -> Tensor:
        """A tensor on the pair's device."""
        return torch.tensor(values, device=self.device)

    def step(self, seed: int, *, weighted: bool = False) -> None:
        """Forward and backward on both, which must agree."""
        ids, offsets = self.batch(seed)
        weights = torch.rand(ids.numel(), device=self.device) if weighted else None
        mine, theirs = self.ours(ids, offsets, weights), self.stock(ids, offsets, weights)
        assert torch.equal(mine, theirs), f"forward of step {seed}"
        gradient = torch.randn(mine.shape, device=self.device)
        mine.backward(gradient)
        theirs.backward(gradient)

    def same(self) -> None:
        """Every row and every state is the same; every pin is gone."""
        memory = TrainingMemory(self.stock)
        for table, shard in enumerate(self.shards):
            ids = torch.arange(shard.rows)
            assert torch.equal(self.ours.read_rows(table, ids), memory.read(table, ids.to(self.device)))
        self.ours.rows.cache.check()
        assert self.ours.rows.cache.pinned_slots == 0
