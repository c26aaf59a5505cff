"""How long tables take: stock estimates, and for tables on SSD the remapping of ids and the reads of misses on top."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
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
from torchrec_turbossd.planner.space import PERF, facts_of
from torchrec_turbossd.planner.ssd import SSD_BLOCK_BYTES, MissPrice, SsdSpeed

REMAP_COST = 1.3
"""Time of a lookup whose rows are all in slots, in lookups of a stock table in memory."""

MEAN_SHARE = 0.02
"""How much the mean time of all ranks counts beside that of the slowest one."""


SSD_SURCHARGE = 1.1
"""How much more a plan counts that has tables on SSD: row stores take memory and threads that no estimate knows of, so
that where all tables fit in memory, a slightly quicker plan is no reason for them."""

_PREFETCH = PERF.index("prefetch_compute")


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
    """TorchRec's estimates, with the misses of rows that are not in slots as `prefetch_compute`, in ms a batch.

    A miss costs what the SSD takes for it, `SsdSpeed.miss_ms`: a read, and at least a block of bytes; one that the DRAM
    tier of a GPU answers, its bytes on the link to the host (`topology.hbm_to_ddr_mem_bw`) instead. Misses add up
    over the tables of a rank, which errs on the slow side where some want for reads and others for bytes. Only the
    lookup pays for misses; its gradient finds the rows in slots. Each column shard reads its part of a row by itself,
    so that columns narrower than a block cost as many reads as whole rows, in every shard. Rows that misses push out of
    slots are counted as `SsdSpeed.writes_per_read` says.

    It comes after the storage estimator, which decides the slots that the hit rates follow from.

    Args:
        topology: speeds of memory, and of the SSD where `ssd` is None.
        constraints: the user's.
        demand: lookups.
        ssd: of one rank; None: `SsdSpeed.of(topology)`.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        *,
        demand: Demand,
        ssd: SsdSpeed | None = None,
    ) -> None:
        self._demand, self._price = demand, MissPrice.of(topology, ssd)
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
            for shard, size, rate, dram in zip(
                option.shards,
                params.row_bytes,
                params.hit_rates,
                params.dram_hit_rates or [0.0] * len(option.shards),
                strict=True,
            ):
                misses = self._price.ms(self._demand.lookups(option, shard), size, rate, dram)
                wait = shard.perf.prefetch_compute + misses
                shard.perf = dataclasses.replace(shard.perf, prefetch_compute=wait)


class TurboSSDPerfModel(PerfModel):
    """Rates a plan by the step of its slowest rank, plus 2 % of what a rank does on average, hidden or not.

    With two batches or more in flight, the misses of a batch are read while the one before goes forward and backward,
    so that a rank's step takes the longer of its embeddings' compute and communication, and its prefetch. With one,
    nothing hides them, and the two add up. Dense layers, which hide misses too, are unknown here and not counted.

    TorchRec always adds the two up (`Perf.total`), which its proposers and partitioners go by before a plan comes here:
    they balance work over ranks, not steps.

    With the slowest rank alone, tables of other ranks would go to SSD for nothing, and so would tables whose misses
    are hidden. A plan that has tables on SSD counts a tenth more than one that needs none.

    Args:
        topology: its number of ranks.
        batches_in_flight: as `turbo_ssd_planner`'s.
        saved: ms of prefetch that each rank of a plan will be spared once its leftover memory is shared: [ranks].
            None: plans are rated as they are. It matters: a table that just fits in memory may leave the others none.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        batches_in_flight: int = 2,
        saved: Callable[[list[ShardingOption]], npt.NDArray[np.float64]] | None = None,
    ) -> None:
        self._ranks = topology.world_size
        self._prefetches = batches_in_flight > 1
        self._saved = saved

    def rate(self, plan: list[ShardingOption]) -> float:
        """Milliseconds, with the surcharge; the lower the better."""
        compute, prefetch = np.zeros(self._ranks), np.zeros(self._ranks)
        for option in plan:
            facts, ranks = facts_of(option), [shard.rank for shard in option.shards]
            waits = facts.perf[:, _PREFETCH]
            np.add.at(prefetch, ranks, waits[facts.which])
            np.add.at(compute, ranks, (facts.times - waits)[facts.which])
        if self._saved is not None:
            prefetch = np.maximum(prefetch - self._saved(plan), 0.0)
        work = compute + prefetch
        steps = np.maximum(compute, prefetch) if self._prefetches else work
        on_ssd = any(option.compute_kernel == TURBO_SSD for option in plan)
        return float(steps.max() + MEAN_SHARE * work.mean()) * (SSD_SURCHARGE if on_ssd else 1.0)


__all__ = [
    "MEAN_SHARE",
    "REMAP_COST",
    "SSD_BLOCK_BYTES",
    "SSD_SURCHARGE",
    "TurboSSDPerfConfig",
    "TurboSSDPerfEstimator",
    "TurboSSDPerfModel",
]
