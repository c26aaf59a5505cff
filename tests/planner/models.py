"""Models, sharders and topologies of the planner's tests; tables are on the meta device."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, Topology

from torchrec_turbossd.planner import TurboSSDPlanner, turbo_ssd_planner
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, TurboSSDEmbeddingCollectionSharder

MB, GB = 10**6, 10**9


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


def sharders(dram_budget_gb: float | None = None, **fused_params: Any) -> list[Any]:
    """Those of the package, which offer every sharding type."""
    options: dict[str, Any] = {"fused_params": fused_params or None, "dram_budget_gb": dram_budget_gb}
    return [TurboSSDEmbeddingBagCollectionSharder(**options), TurboSSDEmbeddingCollectionSharder(**options)]


def topology(
    device: str, ranks: int = 1, fast: int = GB, ssd: int = 100 * GB, local: int | None = None, **speeds: float
) -> Topology:
    """`ranks` in hosts of `local` (None: one host), each with `fast` bytes where slots are."""
    caps = {"hbm_cap": fast, "ddr_cap": GB} if device == "cuda" else {"ddr_cap": fast}
    return Topology(
        world_size=ranks, local_world_size=local or ranks, compute_device=device, ssd_cap=ssd, **caps, **speeds
    )


def planner(
    where: Topology, batch_size: int = 512, constraints: dict[str, ParameterConstraints] | None = None, **kwargs: Any
) -> TurboSSDPlanner:
    """A planner that may use all of the memory."""
    kwargs.setdefault("storage_reservation", FixedPercentageStorageReservation(0.0))
    return turbo_ssd_planner(where, batch_size, constraints, **kwargs)


def printed_under_hash_seeds(program: str, *seeds: str) -> set[str]:
    """What a program prints in a process of its own under each hash seed."""
    return {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in seeds
    }
