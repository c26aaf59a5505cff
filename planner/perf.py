"""How long tables take: stock estimates, and for tables on SSD the remapping of ids and the reads of misses on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torchrec.distributed.planner.estimator import EmbeddingPerfEstimatorConfig, EmbeddingPerfEstimatorFactory
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PerfModel,
    ShardEstimator,
    ShardingOption,
    Topology,
)

from torchrec_turbossd.planner.demand import Demand
from torchrec_turbossd.planner.kernel import HBM_DEVICES, TURBO_SSD, TurboCacheParams

SSD_BLOCK_BYTES = 4096
"""What an SSD reads at the least: a smaller row still moves a whole block."""

REMAP_COST = 1.3
"""Time of a lookup whose rows are all in slots, in lookups of a stock table in memory."""

TOTAL_SHARE = 0.01
"""How much the time of all ranks counts beside that of the slowest one."""


def miss_bytes(row_bytes: int) -> int:
    """Bytes that an SSD reads for one miss of a row of `row_bytes`."""
    return max(row_bytes, SSD_BLOCK_BYTES)


class TurboSSDPerfConfig(EmbeddingPerfEstimatorConfig):
    """TorchRec's hardware model, which also knows our kernel's bandwidth when every row is in a slot."""

    def get_device_bw(
        self,
        compute_device: str,
        compute_kernel: str,
        hbm_mem_bw: float,
        ddr_mem_bw: float,
        *args: Any,
        **kwargs: Any,
    ) -> float | None:
        """Bytes of rows per ms."""
        if compute_kernel == TURBO_SSD:
            return (hbm_mem_bw if compute_device in HBM_DEVICES else ddr_mem_bw) / REMAP_COST
        stock: float | None = super().get_device_bw(
            compute_device, compute_kernel, hbm_mem_bw, ddr_mem_bw, *args, **kwargs
        )
        return stock


class TurboSSDPerfEstimator(ShardEstimator):
    """TorchRec's estimates, with the reads of rows that are not in slots as `prefetch_compute`.

    Time per byte adds up: hits at the speed of fast memory, misses at the SSD's, where a row smaller than a block
    costs a block. Only the lookup pays for misses; its gradient finds the rows in slots. Each column shard reads its
    part of a row by itself, so that columns narrower than a block cost as many reads as whole rows, in every shard.

    It comes after the storage estimator, which decides the slots that the hit rates follow from. `Topology` prices
    the SSD: its default, `ssd_mem_bw` of 100 MB/s, is a hard disk's.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        *,
        demand: Demand,
    ) -> None:
        self._demand, self._ssd_mem_bw = demand, topology.ssd_mem_bw
        self._stock = EmbeddingPerfEstimatorFactory.create_with_config(
            TurboSSDPerfConfig(), topology=topology, constraints=dict(constraints or {})
        )

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Set `shard.perf` of every option."""
        self._stock.estimate(sharding_options, *args, **kwargs)
        for option in sharding_options:
            params = option.cache_params
            if option.compute_kernel != TURBO_SSD or not isinstance(params, TurboCacheParams):
                continue
            for shard, rate, size in zip(option.shards, params.hit_rates, params.row_bytes, strict=True):
                misses = self._demand.lookups(option, shard) * (1.0 - rate)
                reads = misses * miss_bytes(size) / self._ssd_mem_bw
                shard.perf = dataclasses.replace(shard.perf, prefetch_compute=shard.perf.prefetch_compute + reads)


class TurboSSDPerfModel(PerfModel):
    """Rates a plan by its slowest rank, as TorchRec does, plus 1 % of what all ranks do.

    With the slowest rank alone, tables of other ranks would go to SSD for nothing.
    """

    def __init__(self, topology: Topology) -> None:
        self._ranks = topology.world_size

    def rate(self, plan: list[ShardingOption]) -> float:
        """Milliseconds, the lower the better."""
        times = [0.0] * self._ranks
        for option in plan:
            for shard in option.shards:
                times[shard.rank] += shard.perf.total
        return max(times) + TOTAL_SHARE * sum(times)


__all__ = [
    "REMAP_COST",
    "SSD_BLOCK_BYTES",
    "TOTAL_SHARE",
    "TurboSSDPerfConfig",
    "TurboSSDPerfEstimator",
    "TurboSSDPerfModel",
    "miss_bytes",
]
