"""What is planned for every sharding type, in bags and in sequences, is what the sharded model allocates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.types import ParameterConstraints

from tests.planner.models import MB, Model, planner, topology
from tests.ranks import run_ranks
from torchrec_turbossd.planner import describe_plan
from torchrec_turbossd.sharding import get_turbo_ssd_sharders

TYPES = ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"]
FAST = 6 * MB


def build(rank: int, world: int, directory: Path) -> list[tuple[int, int, dict[str, int], dict[str, int]]]:
    """Of each module: bytes planned and allocated, slots by table planned and allocated."""
    # Four column shards of 64 columns, two for a grid: some ranks hold two of a table.
    constraints = {
        f"{prefix}{kind}": ParameterConstraints(
            sharding_types=[kind], compute_kernels=["key_value"], min_partition=32 if kind == "grid_shard" else 16
        )
        for prefix, kinds in (("", TYPES), ("seq_", TYPES[:3]))
        for kind in kinds
    }
    model = Model(*((kind, 9_001, 64) for kind in TYPES), sequences=[(f"seq_{kind}", 9_001, 64) for kind in TYPES[:3]])
    sharders = get_turbo_ssd_sharders(directory, {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    where = topology("cpu", world, fast=FAST, local=int(os.environ["LOCAL_WORLD_SIZE"]))
    plan = planner(where, 16, constraints).collective_plan(model, sharders, dist.group.WORLD)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    found = []
    for name in ("ebc", "ec"):
        sharded = getattr(dmp.module, name)
        rows = [row for row in describe_plan(plan, model, sharders) if (row.module, row.rank) == (name, rank)]
        slots: dict[str, int] = {}
        for row in rows:
            slots[row.table] = slots.get(row.table, 0) + (row.slots or 0)
        found.append((sum(row.fast_bytes or 0 for row in rows), sharded.fast_bytes, slots, sharded.slots))
        sharded.close()
    return found


@pytest.mark.slow
def test_planned_is_allocated_for_every_sharding_type(tmp_path: Path) -> None:
    by_rank = run_ranks(4, build, tmp_path, local=2)
    assert {table for found in by_rank for _, _, slots, _ in found for table in slots} == {
        *TYPES,
        *(f"seq_{kind}" for kind in TYPES[:3]),
    }
    for found in by_rank:
        for planned, allocated, slots, made in found:
            assert planned == allocated and slots == made
        assert 0 < sum(planned for planned, *_ in found) <= FAST
