"""What the planner planned is what the sharded module allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.ranks import run_ranks
from torchrec_turbossd.planner import TURBO_SSD, describe_plan, turbo_ssd_planner
from torchrec_turbossd.sharding import get_turbo_ssd_sharders

MB = 1 << 20
ROWS = {"huge": 2_000_000, "large": 400_000, "small": 5_000}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=32, feature_names=[f"f_{name}"])
                for name, rows in ROWS.items()
            ],
        )


def _slot_bytes(ebc: Any) -> int:
    """Bytes that the slots and their bookkeeping really hold."""
    total = 0
    for kernel in ebc._kernels():
        tbe, cache = kernel.emb_module.tbe, kernel.emb_module.rows.cache
        tensors = [*tbe.split_embedding_weights(), *(s for state in tbe.split_optimizer_states() for s in state)]
        tensors += [cache._owners, cache._pins, cache._dirty, cache.map._slots]
        total += sum(t.numel() * t.element_size() for t in tensors) + sum(p.nbytes for p in cache._policies)
    return total


def _build(rank: int, world: int, sharding: str | None, directory: Path) -> dict[str, int]:
    model = Model()
    sharders = get_turbo_ssd_sharders(directory, {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    constraints = {name: ParameterConstraints(pooling_factors=[4.0]) for name in ROWS}
    if sharding is not None:
        constraints["huge"] = ParameterConstraints(
            sharding_types=[sharding], compute_kernels=[TURBO_SSD], pooling_factors=[4.0]
        )
    planner = turbo_ssd_planner(
        Topology(world_size=world, compute_device="cpu", local_world_size=world, ddr_cap=48 * MB, ssd_cap=10 << 30),
        batch_size=64,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(0.0),
    )
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    rows = [row for row in describe_plan(plan, model, sharders) if row.rank == rank]
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    ebc = dmp.module.ebc
    on_ssd = [row for row in rows if row.tier == "SSD"]
    if ebc.slots != {row.table: row.slots for row in on_ssd}:
        raise AssertionError(f"planned {on_ssd}, allocated {ebc.slots}")
    planned = sum(row.fast_bytes or 0 for row in on_ssd)
    if not planned == ebc.fast_bytes == _slot_bytes(ebc):
        raise AssertionError(f"planned {planned}, counted {ebc.fast_bytes}, allocated {_slot_bytes(ebc)}")
    resident = sum(row.fast_bytes or 0 for row in rows if row.tier != "SSD")
    if planned + resident > 48 * MB:
        raise AssertionError(f"{planned} + {resident} bytes in a budget of {48 * MB}")
    keys = [f"f_{name}" for name in ROWS]
    ids = torch.cat([torch.randint(0, n, (64,)) for n in ROWS.values()])
    out = dmp.module.ebc(KeyedJaggedTensor(keys=keys, values=ids, lengths=torch.ones(3 * 64, dtype=torch.int64)))
    out.values().sum().backward()
    ebc.close()
    return {row.table: row.slots or 0 for row in rows}


@pytest.mark.parametrize(("sharding", "world"), [(None, 2), ("row_wise", 2), ("table_wise", 1)])
def test_planned_is_allocated(tmp_path: Path, sharding: str | None, world: int) -> None:
    by_rank = run_ranks(world, _build, sharding, tmp_path)
    assert any(found.get("huge") for found in by_rank), "the table that cannot fit must be on SSD"
    assert not any(found.get("small") for found in by_rank), "the small one must stay in memory"
