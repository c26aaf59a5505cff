"""A TorchRec planner that puts on SSD what does not fit, and sizes every cache."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.planners import EmbeddingShardingPlanner
from torchrec.distributed.planner.proposers import GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Storage,
    StorageReservation,
    Topology,
)
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.budget import Terms, share_leftover
from torchrec_turbossd.planner.demand import Demand, check_constraints
from torchrec_turbossd.planner.greedy import ThinGreedyProposer
from torchrec_turbossd.planner.kernel import KEY_VALUE, TURBO_SSD, fast_memory, offered_on_ssd
from torchrec_turbossd.planner.outlook import Outlook
from torchrec_turbossd.planner.partitioner import UniformFirstPartitioner
from torchrec_turbossd.planner.perf import TurboSSDPerfEstimator, TurboSSDPerfModel
from torchrec_turbossd.planner.proposer import OffloadProposer, distinct, taste
from torchrec_turbossd.planner.shortfall import explain_shortfall
from torchrec_turbossd.planner.space import PlannedOption, estimate_by_size
from torchrec_turbossd.planner.ssd import MissPrice, SsdSpeed
from torchrec_turbossd.planner.storage import TurboSSDStorageEstimator
from torchrec_turbossd.sizing.memory import has_dram_tier
from torchrec_turbossd.sizing.profile import AccessProfile

_NO_ROOM = (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS, PlannerErrorType.PARTITION)
Callback = Callable[[list[ShardingOption]], list[ShardingOption]]


def turbo_ssd_planner(
    topology: Topology,
    batch_size: int,
    constraints: dict[str, ParameterConstraints] | None = None,
    *,
    access: Mapping[str, AccessProfile] | None = None,
    batches_in_flight: int = 2,
    storage_reservation: StorageReservation | None = None,
    ssd: SsdSpeed | None = None,
    **kwargs: Any,
) -> TurboSSDPlanner:
    """An `EmbeddingShardingPlanner` that keeps tables in fast memory (HBM; DRAM on a CPU topology) while they fit,
    moves the ones least asked for by byte to SSD, and shares what memory is left among their caches, on a GPU DRAM too.

    Sharders must offer the `TURBO_SSD` kernel. A table's own `ParameterConstraints` are honoured: `compute_kernels`
    (where TorchRec's own name for tables on SSD, "key_value", means `TURBO_SSD`), `sharding_types` and
    `min_partition`, `cache_params.load_factor` (the share of its rows that get slots, then neither more nor less),
    `cache_params.stats` (its hit rates, instead of a profile), `key_value_params.l2_cache_size` (on a GPU the GB of its
    DRAM tier on a rank, then neither more nor less).

    Without `sharding_types`, tables on SSD are planned in every way that their sharder offers but GRID_SHARD, which
    TorchRec keeps for tables that ask for it. Column shards each read their part of a row from SSD, so that they cost
    more reads than whole rows, and are chosen where that is the quickest plan that fits nevertheless. No table is
    copied to every rank (DATA_PARALLEL) unless it asks: copies are trained by the dense optimizer, not the fused one.

    Args:
        topology: capacities of each rank; `ssd_cap` are bytes of a rank's disk, 2 TiB unless given.
        batch_size: of one rank.
        constraints: by table name, as TorchRec's.
        access: how often rows are asked for, by table name; default: Zipf with exponent `DEFAULT_ZIPF_ALPHA`.
        batches_in_flight: batches whose rows must be in slots at once: 2 when the next one is prefetched, else 1.
        storage_reservation: memory for other things than tables; default: TorchRec's.
        ssd: speed of a rank's SSD, as `Machine.ssd` has it; default: what `topology.ssd_mem_bw` says.
        kwargs: for `EmbeddingShardingPlanner`. A `proposer` comes after ours, instead of TorchRec's default ones;
            `callbacks` come after the caches are sized.

    Raises:
        BudgetError: a capacity that is negative or 0; from `plan`: nothing fits. ConfigError: other faults.
    """
    for what, value in (("batch_size", batch_size), ("batches_in_flight", batches_in_flight)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{what} must be a positive int, got {value!r}")
    if "enumerator" in kwargs:
        raise ConfigError("the planner brings its own enumerator, whose estimators know tables on SSD; pass none")
    if ssd is not None and not isinstance(ssd, SsdSpeed):
        raise ConfigError(f"ssd must be an SsdSpeed, as `Machine.ssd` is one, got {type(ssd).__name__}")
    _check_topology(topology)
    check_constraints(constraints or {})
    given = {table: _on_turbo_ssd(one) for table, one in (constraints or {}).items()}
    demand = Demand(world_size=topology.world_size, batches_in_flight=batches_in_flight, constraints=given)
    return TurboSSDPlanner(
        topology,
        batch_size,
        given,
        demand=demand,
        access=Access(access),
        ssd=ssd or SsdSpeed.of(topology),
        storage_reservation=storage_reservation,
        **kwargs,
    )


class TurboSSDPlanner(EmbeddingShardingPlanner):
    """What `turbo_ssd_planner` returns; make it with that."""

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        *,
        demand: Demand,
        access: Access,
        ssd: SsdSpeed,
        **kwargs: Any,
    ) -> None:
        self._demand, self._access = demand, access
        self._terms = Terms(
            compute_device=topology.compute_device, demand=demand, access=access, price=MissPrice.of(topology, ssd)
        )
        self._outlook = Outlook(self._terms)
        proposers = kwargs.pop("proposer", None) or [
            GridSearchProposer(),
            ThinGreedyProposer(self._free),
            ThinGreedyProposer(self._free, use_depth=False),
            UniformProposer(),
        ]
        callbacks: list[Callback] = [self._share_leftover, *(kwargs.pop("callbacks", None) or [])]
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=_Enumerator(
                topology=topology,
                batch_size=batch_size,
                constraints=constraints,
                estimator=[
                    TurboSSDStorageEstimator(topology, constraints, demand=demand, access=access),
                    TurboSSDPerfEstimator(topology, constraints, demand=demand, ssd=ssd),
                ],
            ),
            constraints=constraints,
            proposer=[
                OffloadProposer(topology.compute_device, demand.table_lookups, self._free),
                *(proposers if isinstance(proposers, list) else [proposers]),
            ],
            performance_model=kwargs.pop("performance_model", None)
            or TurboSSDPerfModel(topology, batches_in_flight=demand.batches_in_flight, saved=self._saved),
            partitioner=kwargs.pop("partitioner", None) or UniformFirstPartitioner(),
            callbacks=callbacks,
            **kwargs,
        )

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """A plan for `module`, on this rank alone.

        Raises:
            BudgetError: nothing fits; says what is short, by how much, and what would do.
            ConfigError: constraints that leave a table no option, or a profile of another number of rows.
            UnknownTableError: a profile of a table that the model lacks.
        """
        self._terms = dataclasses.replace(self._terms, dram_budget=_dram_budget(sharders))
        self._outlook = Outlook(self._terms)
        try:
            plan = super().plan(module, sharders)
        except PlannerError as error:
            if error.error_type not in _NO_ROOM:
                raise
            raise BudgetError(self._explain(error)) from error
        names = {option.name for option in self._enumerator.last_stored_search_space or []}
        self._access.check_names(names)
        unknown = sorted(set(self._demand.constraints) - names)
        if unknown:
            # TorchRec takes them in silence, so that one set of constraints may serve several models.
            warnings.warn(f"constraints name no table of this model: {', '.join(map(repr, unknown))}", stacklevel=2)
        return plan

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Plan on rank 0 and broadcast; where that fails, every rank raises, and none is left waiting."""
        group = pg if pg is not None else dist.group.WORLD
        if group is None:
            raise ConfigError("collective_plan needs a process group: call init_process_group() first, or use plan()")
        outcome = invoke_on_rank_and_broadcast_result(
            group, 0, self._outcome, module, sharders or get_default_sharders()
        )
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _outcome(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan | Exception:
        try:
            return self.plan(module, sharders)
        except Exception as error:
            return error

    def _share_leftover(self, plan: list[ShardingOption]) -> list[ShardingOption]:
        for shard in (shard for option in plan for shard in option.shards):
            # Estimates are shared until here; whoever comes now may change those of one shard.
            shard.storage, shard.perf = dataclasses.replace(shard.storage), dataclasses.replace(shard.perf)
        return share_leftover(plan, self._available(), self._terms)

    def _saved(self, plan: list[ShardingOption]) -> npt.NDArray[np.float64]:
        return self._outlook.saved(plan, self._available())

    def _available(self) -> dict[int, Storage]:
        topology = self._storage_reservation.last_reserved_topology or self._topology
        return {device.rank: device.storage for device in topology.devices}

    def _free(self) -> list[Storage]:
        return list(self._available().values())

    def _explain(self, error: PlannerError) -> str:
        options = self._enumerator.last_stored_search_space
        if not options:
            return f"no memory is left for tables once the storage reservation is made: {error}"
        device = self._topology.compute_device
        sharders = self._enumerator.sharder_map
        unable = {key for key, sharder in sharders.items() if not offered_on_ssd(sharder, device)}
        return explain_shortfall(options, self._free(), device, unable)


class _Enumerator(EmbeddingEnumerator):
    """TorchRec's, in the same order in every run (some of its versions go through sets of strings), and without options
    that are another one by a different name. Where there are thousands of shards it is quick nevertheless."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        try:
            options = super().enumerate(module, sharders)
        except RuntimeError as error:
            if "No available sharding type" not in str(error):
                raise
            raise ConfigError(f"{str(error).rstrip('. ')}. {_offers(sharders, self._compute_device)}") from error
        names = dict.fromkeys(option.fqn for option in options)
        wanted = [option for option in options if self._is_wanted(option)]
        others = {option.fqn for option in wanted}
        options = [*wanted, *(option for option in options if option.fqn not in others)]
        order = {name: n for n, name in enumerate(names)}
        kept = distinct(sorted(options, key=lambda o: (order[o.fqn], *taste(o))))
        return [PlannedOption.of(option) for option in kept]

    def _is_wanted(self, option: ShardingOption) -> bool:
        """Copies on every rank are trained by another optimizer than all other tables, so nobody gets them unasked."""
        if option.sharding_type != ShardingType.DATA_PARALLEL.value:
            return True
        given = (self._constraints or {}).get(option.name)
        return given is not None and option.sharding_type in (given.sharding_types or ())

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        """Set storage and perf of every shard."""
        estimate_by_size(sharding_options, super().populate_estimates)


def _offers(sharders: list[ModuleSharder[nn.Module]], compute_device: str) -> str:
    offered = {type(sharder).__name__: offered_on_ssd(sharder, compute_device) for sharder in sharders}
    given = [f"{name} ({', '.join(kinds)})" for name, kinds in offered.items() if kinds]
    return (
        f"Tables on SSD (TURBO_SSD, to TorchRec {TURBO_SSD!r}) need a sharder of torchrec_turbossd.sharding and one of "
        f"its sharding types; those given offer {', '.join(given) or 'none'}"
    )


def _dram_budget(sharders: Iterable[ModuleSharder[nn.Module]]) -> int | None:
    """Bytes of a rank for the DRAM tier, as the sharders of a model say."""
    every = [getattr(sharder, "dram_budget_gb", None) for sharder in sharders]
    said = {float(budget) for budget in every if budget is not None}
    if len(said) > 1:
        raise ConfigError(
            f"the sharders' dram_budget_gb is a rank's, for all of its tables, but they differ: {sorted(said)}; give "
            "all the same"
        )
    return int(said.pop() * 2**30) if said else None


def _on_turbo_ssd(constraints: ParameterConstraints) -> ParameterConstraints:
    """Constraints with our kernel where they say KEY_VALUE."""
    names = [TURBO_SSD if name == KEY_VALUE else name for name in constraints.compute_kernels or []]
    return dataclasses.replace(constraints, compute_kernels=list(dict.fromkeys(names)) or None)


def _check_topology(topology: Topology) -> None:
    fast = fast_memory(topology.compute_device)
    for device in topology.devices:
        for kind in ("hbm", "ddr", "ssd"):
            size = getattr(device.storage, kind)
            if not math.isfinite(size) or size < 0:
                raise BudgetError(f"rank {device.rank}: {kind}_cap must be finite and not negative, got {size}")
        if getattr(device.storage, fast) == 0:
            raise BudgetError(
                f"rank {device.rank}: {fast}_cap is 0 on a {topology.compute_device!r} topology; tables on SSD need "
                "slots there too"
            )
    for name in ("ssd_mem_bw", *(["hbm_to_ddr_mem_bw"] if has_dram_tier(topology.compute_device) else [])):
        if not getattr(topology, name) > 0:
            raise ConfigError(f"{name} must be above 0 bytes a ms, got {getattr(topology, name)}")


__all__ = ["TurboSSDPlanner", "turbo_ssd_planner"]
