"""The model that the demo trains, on one sharding plan twice: with tables on SSD, and all in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo_settings import Settings
from source_tokens import CLASSES, FEATURES, TABLES, Corpus, table_configs
from stock_training import fill_tables, in_memory_plan
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_turbossd.planner import PlanRow, describe_plan, turbo_ssd_planner
from torchrec_turbossd.sharding import get_turbo_ssd_sharders
from torchrec_turbossd.sizing import AccessProfile

TABLE_OPTIMIZER = {"lr": 0.1, "eps": 1e-6}
"""Of row-wise Adagrad."""

DENSE_LEARNING_RATE = 2e-3

OnSSD = tuple[DistributedModelParallel, ShardingPlan, list[PlanRow]]
"""A sharded model, its plan, and the plan in words."""

_HIDDEN = 128


class NextToken(nn.Module):
    """Guesses the next token's class from bags of rows: an `EmbeddingBagCollection` and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        # On the meta device nothing is allocated: most rows will never be in memory.
        self.bags = EmbeddingBagCollection(tables=table_configs(), device=torch.device("meta"))
        width = sum(TABLES[feature.table][1] for feature in FEATURES)
        self.dense = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, CLASSES))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Scores of the classes: [B, CLASSES]."""
        # By name: a sharded module has its columns in an order that depends on the plan.
        (columns,) = KeyedTensor.regroup([self.bags(features)], [[feature.name for feature in FEATURES]])
        scores: Tensor = self.dense(columns)
        return scores


def access_profiles(corpus: Corpus) -> dict[str, AccessProfile]:
    """How often each row of each table is asked for: exact, as samples are drawn from the corpus at random."""
    return {table: AccessProfile.from_counts(corpus.counts(table)) for table in TABLES}


def on_ssd(settings: Settings, corpus: Corpus, directory: Path) -> OnSSD:
    """The model with what does not fit the budget on SSD under `directory`. Collective."""
    model = _new_model(settings.seed)
    sharders = get_turbo_ssd_sharders(ssd_directory=directory, seed=settings.seed)
    fast = "hbm_cap" if settings.device == "cuda" else "ddr_cap"
    planner = turbo_ssd_planner(
        Topology(
            world_size=settings.ranks,
            compute_device=settings.device,
            ssd_cap=100 << 30,
            **{fast: settings.budget_bytes},
        ),
        settings.batch_size,
        {
            table: ParameterConstraints(pooling_factors=[float(f.window) for f in FEATURES if f.table == table])
            for table in TABLES
        },
        access=access_profiles(corpus),
        # This loop prefetches nothing: only one batch needs its rows at a time.
        batches_in_flight=1,
        # The budget is for tables alone.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    described = describe_plan(plan, model, sharders)
    return _shard(settings, model, plan, sharders), plan, described


def in_memory(settings: Settings, plan: ShardingPlan) -> DistributedModelParallel:
    """The same model, plan and initial rows with TorchRec's own sharder and kernel, all rows in memory. Collective."""
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    return _shard(settings, _new_model(settings.seed), in_memory_plan(plan), sharders)


def _new_model(seed: int) -> NextToken:
    torch.manual_seed(seed)
    model = NextToken()
    # Applied to the parameters, rather than given to the sharders, so that the planner counts its state.
    apply_optimizer_in_backward(RowWiseAdagrad, model.bags.parameters(), TABLE_OPTIMIZER)
    return model


def _shard(
    settings: Settings, model: NextToken, plan: ShardingPlan, sharders: list[ModuleSharder[nn.Module]]
) -> DistributedModelParallel:
    device = torch.device("cuda", torch.cuda.current_device()) if settings.device == "cuda" else torch.device("cpu")
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    fill_tables(sharded, plan, table_configs(), settings.seed)
    return sharded


__all__ = [
    "DENSE_LEARNING_RATE",
    "TABLE_OPTIMIZER",
    "NextToken",
    "access_profiles",
    "in_memory",
    "on_ssd",
]
