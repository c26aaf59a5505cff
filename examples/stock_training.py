"""The yardstick of training on SSD: the same plan and initial rows, all in memory, by TorchRec's own kernel."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchrec import EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ShardingPlan

from torchrec_turbossd.planner import TURBO_SSD
from torchrec_turbossd.rows import initial_weights
from torchrec_turbossd.tables import InitRule

_WINDOW_ROWS = 65536


def in_memory_plan(plan: ShardingPlan) -> ShardingPlan:
    """A copy of `plan` that shards as it does, with all rows in memory."""
    plan = copy.deepcopy(plan)
    for module_plan in plan.plan.values():
        for sharding in module_plan.values():
            sharding.compute_kernel = EmbeddingComputeKernel.FUSED.value
            sharding.cache_params = None
    return plan


def fill_tables(
    model: DistributedModelParallel, plan: ShardingPlan, tables: Sequence[EmbeddingBagConfig], seed: int
) -> None:
    """Give the tables that are in memory the rows that those on SSD start from, under the sharders' `seed`."""
    state = model.state_dict()
    for path, module_plan in plan.plan.items():
        for table in tables:
            if table.name in module_plan and module_plan[table.name].compute_kernel != TURBO_SSD:
                rule = InitRule(seed=seed, low=table.get_weight_init_min(), high=table.get_weight_init_max())
                _fill(local_shards(state, path, table.name), table.name, rule)


def local_shards(state: Mapping[str, Any], path: str, table: str) -> list[tuple[int, int, Tensor]]:
    """This rank's shards of a table of the module at `path`, from a model's state: (first row, first column, rows)."""
    weight = state[f"{path}.embedding_bags.{table}.weight"]
    return [(*shard.metadata.shard_offsets, shard.tensor.detach()) for shard in weight.local_shards()]


def _fill(shards: Sequence[tuple[int, int, Tensor]], table: str, rule: InitRule) -> None:
    for row, col, rows in shards:
        for window in range(0, rows.shape[0], _WINDOW_ROWS):
            part = rows[window : window + _WINDOW_ROWS]
            ids = torch.arange(row + window, row + window + part.shape[0])
            part.copy_(initial_weights(rule, table, ids, col_offset=col, cols=part.shape[1]))


__all__ = ["fill_tables", "in_memory_plan", "local_shards"]
