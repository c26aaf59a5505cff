"""TorchRec's DLRM over the tables of a day, sharded twice on one plan: what does not fit on SSD, and all in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from dlrm_day import DENSE, FEATURES, Day
from dlrm_settings import Settings
from stock_training import fill_tables, in_memory_plan
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_turbossd.planner import PlanRow, describe_plan, turbo_ssd_planner
from torchrec_turbossd.sharding import get_turbo_ssd_sharders
from torchrec_turbossd.sizing import AccessProfile

TABLE_OPTIMIZER = {"lr": 0.05, "eps": 1e-6}
"""Of row-wise Adagrad."""

_DENSE_LAYERS, _OVER_LAYERS = (64, 32), (128, 64, 1)
_SSD_BYTES = 1 << 40
_TRACE_SAMPLES = 1 << 17

_Sharders = list[ModuleSharder[nn.Module]]


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A sharded model, its plan, and the plan in words."""

    model: DistributedModelParallel
    plan: ShardingPlan
    described: list[PlanRow]

    @property
    def tables(self) -> Any:
        """The sharded `EmbeddingBagCollection`."""
        return self.model.module.model.sparse_arch.embedding_bag_collection


def table_configs(day: Day, dim: int) -> list[EmbeddingBagConfig]:
    """A table for each categorical feature, of the feature's name."""
    return [
        EmbeddingBagConfig(name=feature, num_embeddings=rows, embedding_dim=dim, feature_names=[feature])
        for feature, rows in zip(FEATURES, day.rows, strict=True)
    ]


def on_ssd(settings: Settings, day: Day) -> Sharded:
    """The model with what does not fit the budget on SSD. Collective."""
    model = _new_model(settings, day)
    sharders = get_turbo_ssd_sharders(ssd_directory=settings.ssd_directory, seed=settings.seed)
    planner = turbo_ssd_planner(
        Topology(
            world_size=settings.ranks,
            compute_device=settings.device,
            ssd_cap=_SSD_BYTES,
            **{"hbm_cap" if settings.device == "cuda" else "ddr_cap": settings.budget_bytes},
        ),
        settings.batch_size,
        # The ways that tables on SSD can be sharded, so that all in memory are sharded alike.
        {feature: ParameterConstraints(sharding_types=["table_wise", "row_wise"]) for feature in FEATURES},
        access=_access(day),
        # On CUDA the pipeline prefetches the rows of the next batch.
        batches_in_flight=2 if settings.device == "cuda" else 1,
        # The budget is for tables alone.
        storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return _shard(settings, day, model, plan, sharders)


def in_memory(settings: Settings, day: Day, plan: ShardingPlan) -> Sharded:
    """The same model, plan and initial rows, all rows in memory. Collective."""
    sharders: _Sharders
    if settings.resume is None:
        sharders = [EmbeddingBagCollectionSharder()]
    else:
        # A snapshot goes back into modules of this package alone; tables in memory are TorchRec's own in those too.
        sharders = get_turbo_ssd_sharders(seed=settings.seed)
    return _shard(settings, day, _new_model(settings, day), in_memory_plan(plan), sharders)


def _new_model(settings: Settings, day: Day) -> DLRMTrain:
    torch.manual_seed(settings.seed)
    # On the meta device nothing is allocated: most rows will never be in memory.
    tables = EmbeddingBagCollection(tables=table_configs(day, settings.dim), device=torch.device("meta"))
    # Applied to the parameters, rather than given to the sharders, so that the planner counts its state.
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), TABLE_OPTIMIZER)
    return DLRMTrain(
        DLRM(
            embedding_bag_collection=tables,
            dense_in_features=DENSE,
            dense_arch_layer_sizes=[*_DENSE_LAYERS, settings.dim],
            over_arch_layer_sizes=list(_OVER_LAYERS),
        )
    )


def _access(day: Day) -> dict[str, AccessProfile]:
    """How often rows are asked for, from the first part of the day, as from yesterday's log."""
    trace = day.ids[:_TRACE_SAMPLES]
    return {
        feature: AccessProfile.from_trace(trace[:, column], rows)
        for column, (feature, rows) in enumerate(zip(FEATURES, day.rows, strict=True))
    }


def _shard(settings: Settings, day: Day, model: DLRMTrain, plan: ShardingPlan, sharders: _Sharders) -> Sharded:
    device = torch.device("cuda", torch.cuda.current_device()) if settings.device == "cuda" else torch.device("cpu")
    described = describe_plan(plan, model, sharders)
    sharded = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    fill_tables(sharded, plan, table_configs(day, settings.dim), settings.seed)
    return Sharded(model=sharded, plan=plan, described=described)


__all__ = ["TABLE_OPTIMIZER", "Sharded", "in_memory", "on_ssd", "table_configs"]
