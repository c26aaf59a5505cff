"""Models, sharders and topologies of the planner's tests; tables are on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType

from torchrec_turbossd.planner import TURBO_SSD, TurboSSDPlanner, turbo_ssd_planner

MB, GB = 10**6, 10**9


class BagSharder(EmbeddingBagCollectionSharder):
    """Offers our kernel, as the package's own sharders do."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused", TURBO_SSD]


class SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return ["fused", TURBO_SSD]


class Model(nn.Module):
    """An EBC with a table for each `(name, rows, dim)`, looked up by one feature, or by the features given."""

    def __init__(
        self, *tables: tuple[str, int, int], features: dict[str, list[str]] | None = None, sequences: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        features = features or {}
        self.ebc = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[
                EmbeddingBagConfig(
                    name=name, num_embeddings=rows, embedding_dim=dim, feature_names=features.get(name, [f"f_{name}"])
                )
                for name, rows, dim in tables
            ],
        )
        if sequences:
            self.ec = EmbeddingCollection(
                device=torch.device("meta"),
                tables=[
                    EmbeddingConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[f"f_{name}"])
                    for name, rows, dim in sequences
                ],
            )


def sharders(**fused_params: Any) -> list[Any]:
    params = fused_params or None
    return [BagSharder(fused_params=params), SequenceSharder(fused_params=params)]


def topology(device: str, ranks: int = 1, fast: int = GB, ssd: int = 100 * GB) -> Topology:
    if device == "cuda":
        return Topology(world_size=ranks, compute_device=device, hbm_cap=fast, ddr_cap=GB, ssd_cap=ssd)
    return Topology(world_size=ranks, compute_device=device, ddr_cap=fast, ssd_cap=ssd)


def planner(
    where: Topology, batch_size: int = 512, constraints: dict[str, ParameterConstraints] | None = None, **kwargs: Any
) -> TurboSSDPlanner:
    """A planner that may use all of the memory."""
    kwargs.setdefault("storage_reservation", FixedPercentageStorageReservation(0.0))
    return turbo_ssd_planner(where, batch_size, constraints, **kwargs)
