"""What is predicted of a finished plan, shard by shard, added up by table and by rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import ShardingOption, Topology
from torchrec.distributed.types import ShardingPlan

from torchrec_turbossd.cli.model import Config
from torchrec_turbossd.cli.profiles import source_of
from torchrec_turbossd.cli.quantities import human_size
from torchrec_turbossd.cli.report import (
    MachineReport,
    Milliseconds,
    OneMoreGib,
    PlanReport,
    RankReport,
    ShardReport,
    TableReport,
)
from torchrec_turbossd.cli.spec import PlanSpec, TableEntry
from torchrec_turbossd.planner import TURBO_SSD, PlanRow, describe_plan
from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.budget import Terms, budget_item
from torchrec_turbossd.planner.demand import Demand, row_bytes
from torchrec_turbossd.planner.kernel import KEY_VALUE, fast_memory
from torchrec_turbossd.planner.report import planned_store_bytes
from torchrec_turbossd.planner.ssd import MissPrice, SsdSpeed
from torchrec_turbossd.sizing import BudgetItem, split_budget
from torchrec_turbossd.sizing.memory import most_slots

_MIB, _GIB = 2**20, 2**30
_ON_SSD = {TURBO_SSD, KEY_VALUE}


@dataclass(frozen=True, kw_only=True)
class Made:
    """A plan and what it was made with.

    Attributes:
        plan, options: the plan as TorchRec has it, and as the planner left it, with expected times.
        model, sharders: what was planned.
        topology, ssd: what it was planned for.
        notes: how that was measured.
        free: the topology without what is kept back.
        demand, access: lookups and hit-rate curves.
    """

    plan: ShardingPlan
    options: Sequence[ShardingOption]
    model: nn.Module
    sharders: Sequence[Any]
    topology: Topology
    ssd: SsdSpeed
    notes: Sequence[str]
    free: Topology
    demand: Demand
    access: Access

    @property
    def fast(self) -> str:
        """Which field of TorchRec's `Storage` has the slots."""
        return fast_memory(self.topology.compute_device)

    @property
    def terms(self) -> Terms:
        """What the caches were sized by."""
        return Terms(
            compute_device=self.topology.compute_device,
            demand=self.demand,
            access=self.access,
            price=MissPrice.of(self.topology, self.ssd),
        )

    @property
    def memory(self) -> str:
        """The same, as people call it."""
        return "HBM" if self.fast == "hbm" else "DRAM"


def describe(
    spec: PlanSpec, made: Made, configs: Mapping[str, Config], entries: Mapping[str, TableEntry]
) -> PlanReport:
    """Everything that is predicted of a plan."""
    by_place = {_place(row): row for row in describe_plan(made.plan, made.model, made.sharders)}
    tables = [_table(made, option, by_place, configs, entries.get(option.name)) for option in made.options]
    ranks = _ranks(made, tables)
    slowest = max(ranks, key=lambda rank: rank.step_ms)
    on_ssd = [table for table in tables if table.tier == "SSD"]
    return PlanReport(
        machine=_machine(made, spec),
        optimizer=str(spec.optimizer.value),
        batch_size=spec.batch_size or 0,
        batches_in_flight=spec.batches_in_flight,
        lookups=sum(table.lookups for table in tables),
        hit_rate=_mean_rate((table.hit_rate, table.lookups) for table in tables),
        hit_rate_on_ssd=_mean_rate((table.hit_rate, table.lookups) for table in on_ssd) if on_ssd else None,
        dram_hit_rate_on_ssd=_mean_rate((table.dram_hit_rate, table.lookups) for table in on_ssd) if on_ssd else None,
        step_ms=slowest.step_ms,
        slowest_rank=slowest.rank,
        ranks=ranks,
        tables=tables,
        one_more_gib=_one_more_gib(made, tables),
        warnings=_warnings(ranks, made.memory),
    )


def _place(row: PlanRow) -> tuple[str, str, int, int, int]:
    return row.module, row.table, row.rank, row.first_row, row.first_col


def _table(
    made: Made,
    option: ShardingOption,
    by_place: Mapping[tuple[str, str, int, int, int], PlanRow],
    configs: Mapping[str, Config],
    entry: TableEntry | None,
) -> TableReport:
    path = option.module[0]
    rows = [by_place[path, option.name, s.rank, int(s.offset[0]), int(s.offset[1])] for s in option.shards]
    shards = [_shard(made, option, number, row) for number, row in enumerate(rows)]
    height, width = (int(size) for size in option.tensor.shape)
    memory = height * row_bytes(option.tensor, width, _fused_params(made, option))
    # Replicas share the lookups of a table; shards of some columns all answer every one.
    lookups = made.demand.table_lookups(option)
    slots = [shard.slots for shard in shards if shard.slots is not None]
    kernels = entry.limits.compute_kernels if entry is not None else None
    return TableReport(
        name=option.name,
        module=path,
        rows=height,
        dim=width,
        data_type=_data_type(option),
        kind="bag" if option.is_pooled else "sequence",
        features=list(configs[option.name].feature_names) if option.name in configs else [],
        access=source_of(entry.access if entry is not None else None),
        # A replica has no place in the plan: it is where the ranks compute.
        tier=rows[0].tier if rows[0].tier == "SSD" else made.memory,
        forced=bool(kernels) and ({*(kernels or ())} <= _ON_SSD or not _ON_SSD & {*(kernels or ())}),
        sharding_type=option.sharding_type,
        compute_kernel=option.compute_kernel,
        ranks=sorted({shard.rank for shard in shards}),
        slots=sum(slots) if slots else None,
        slot_share=sum(slots) / max(1, sum(shard.rows for shard in shards)) if slots else 1.0,
        hit_rate=_mean_rate((shard.hit_rate, shard.lookups) for shard in shards),
        dram_slots=sum(shard.dram_slots for shard in shards),
        dram_hit_rate=_mean_rate(((shard.dram_hit_rate, shard.lookups) for shard in shards), none=0.0),
        lookups=lookups,
        memory_bytes=memory,
        lookups_per_mib=lookups * _MIB / memory,
        fast_bytes=sum(shard.fast_bytes for shard in shards),
        dram_bytes=sum(shard.dram_bytes for shard in shards),
        ssd_bytes=sum(shard.ssd_bytes for shard in shards),
        io_bytes=sum(shard.io_bytes for shard in shards),
        ms=max(_by_rank(shards).values(), key=lambda ms: ms.total),
        shards=shards,
    )


def _shard(made: Made, option: ShardingOption, number: int, row: PlanRow) -> ShardReport:
    shard = option.shards[number]
    replicas = len(option.shards) if option.sharding_type == "data_parallel" else 1
    in_fast = row.fast_bytes or 0
    return ShardReport(
        rank=row.rank,
        first_row=row.first_row,
        first_col=row.first_col,
        rows=int(shard.size[0]),
        cols=int(shard.size[1]),
        row_bytes=row_bytes(option.tensor, int(shard.size[1]), _fused_params(made, option)),
        slots=row.slots,
        hit_rate=1.0 if row.hit_rate is None else row.hit_rate,
        dram_slots=row.dram_slots or 0,
        dram_hit_rate=row.dram_hit_rate or 0.0,
        lookups=made.demand.lookups(option, shard) / replicas,
        fast_bytes=in_fast,
        dram_bytes=int(shard.storage.ddr) if made.fast == "hbm" else 0,
        ssd_bytes=row.ssd_bytes,
        io_bytes=max(0, int(getattr(shard.storage, made.fast)) - in_fast),
        ms=Milliseconds(
            compute=shard.perf.fwd_compute + shard.perf.bwd_compute,
            communication=shard.perf.fwd_comms + shard.perf.bwd_comms,
            ssd=shard.perf.prefetch_compute,
            total=shard.perf.total,
        ),
    )


def _by_rank(shards: Iterable[ShardReport]) -> dict[int, Milliseconds]:
    times: dict[int, Milliseconds] = {}
    for shard in shards:
        times[shard.rank] = times.get(shard.rank, Milliseconds()) + shard.ms
    return times


def _ranks(made: Made, tables: Sequence[TableReport]) -> list[RankReport]:
    held: dict[int, list[ShardReport]] = {device.rank: [] for device in made.topology.devices}
    names: dict[int, set[tuple[str, str]]] = {rank: set() for rank in held}
    for table in tables:
        for shard in table.shards:
            held[shard.rank].append(shard)
            names[shard.rank].add((table.module, table.name))
    free = {device.rank: device.storage for device in made.free.devices}
    stores = planned_store_bytes(made.plan)
    ranks = []
    for device in made.topology.devices:
        shards, whole = held[device.rank], int(getattr(device.storage, made.fast))
        available = int(getattr(free[device.rank], made.fast))
        used = sum(shard.fast_bytes + shard.io_bytes for shard in shards)
        ms = _by_rank(shards).get(device.rank, Milliseconds())
        beside = sum(shard.dram_bytes for shard in shards)
        in_dram = beside if made.fast == "hbm" else used
        # Nothing is short where there is no store.
        short = stores[device.rank] - int(device.storage.ddr) + in_dram if device.rank in stores else 0
        ranks.append(
            RankReport(
                rank=device.rank,
                fast_capacity_bytes=whole,
                fast_reserved_bytes=whole - available,
                fast_used_bytes=used,
                fast_free_bytes=available - used,
                dram_capacity_bytes=int(device.storage.ddr) if made.fast == "hbm" else 0,
                dram_used_bytes=beside,
                store_bytes=stores.get(device.rank, 0),
                dram_short_bytes=max(0, short),
                ssd_capacity_bytes=int(device.storage.ssd),
                ssd_used_bytes=sum(shard.ssd_bytes for shard in shards),
                tables=len(names[device.rank]),
                lookups=sum(shard.lookups for shard in shards),
                hit_rate=_mean_rate((shard.hit_rate, shard.lookups) for shard in shards),
                ms=ms,
                step_ms=max(ms.total - ms.ssd, ms.ssd) if made.demand.batches_in_flight > 1 else ms.total,
            )
        )
    return ranks


def _warnings(ranks: Sequence[RankReport], memory: str) -> list[str]:
    short = [rank for rank in ranks if rank.dram_short_bytes]
    if not short:
        return []
    worst = max(short, key=lambda rank: rank.dram_short_bytes)
    said = (
        f"DRAM is short by {human_size(worst.dram_short_bytes)} on rank {worst.rank}"
        f"{f' and less on {len(short) - 1:,} more' if len(short) > 1 else ''}: row stores take up to "
        f"{human_size(worst.store_bytes)} of a rank's, and the plan leaves less. Give a rank more DRAM, or keep more "
        "tables in memory"
    )
    # On a CPU, caches and stores share one memory.
    percent = math.ceil(100 * max(rank.store_bytes / rank.fast_capacity_bytes for rank in short)) + 1
    if memory == "DRAM" and percent < 100:
        said += f", or keep more of it back from the caches: reserve: {percent}"
    return [f"{said}."]


def _one_more_gib(made: Made, tables: Sequence[TableReport]) -> OneMoreGib | None:
    """Each rank shares one more GiB among its caches as the planner shares what is left over."""
    items: dict[int, dict[tuple[int, int], BudgetItem]] = {}
    for number, (option, table) in enumerate(zip(made.options, tables, strict=True)):
        if table.tier != "SSD" or option.cache_params.fixed:
            continue
        for n, shard in enumerate(table.shards):
            if shard.slots is not None and shard.slots < most_slots(shard.rows, made.topology.compute_device):
                items.setdefault(shard.rank, {})[number, n] = budget_item(option, n, made.terms)
    if not items:
        return None
    slots: dict[tuple[int, int], int] = {}
    for wanted in items.values():
        slots.update(split_budget(wanted, _GIB + sum(item.bytes_for(item.floor_slots) for item in wanted.values())))
    hits, ssd = 0.0, {device.rank: 0.0 for device in made.topology.devices}
    for number, (option, table) in enumerate(zip(made.options, tables, strict=True)):
        then = [_with_slots(made, option, n, s, slots.get((number, n))) for n, s in enumerate(table.shards)]
        hits += table.lookups * _mean_rate(
            (rate, shard.lookups) for (rate, _), shard in zip(then, table.shards, strict=True)
        )
        for (_, ms), shard in zip(then, table.shards, strict=True):
            ssd[shard.rank] += ms
    now = [sum(s.ms.ssd for table in tables for s in table.shards if s.rank == rank) for rank in ssd]
    lookups = sum(table.lookups for table in tables)
    return OneMoreGib(hit_rate=hits / lookups if lookups else 1.0, ssd_ms=max(ssd.values()), ssd_ms_now=max(now))


def _with_slots(
    made: Made, option: ShardingOption, number: int, shard: ShardReport, slots: int | None
) -> tuple[float, float]:
    """Hit rate of a shard and ms of its misses with other slots, and the DRAM tier as it is."""
    if slots is None:
        return shard.hit_rate, shard.ms.ssd
    place = option.shards[number]
    rate = made.access.hit_rate(option, place, slots)
    both = made.access.hit_rate(option, place, slots + shard.dram_slots)
    return rate, made.terms.price.ms(shard.lookups, shard.row_bytes, rate, both - rate)


def _machine(made: Made, spec: PlanSpec) -> MachineReport:
    topology, storage = made.topology, made.topology.devices[0].storage
    return MachineReport(
        device=topology.compute_device,
        ranks=topology.world_size,
        ranks_per_host=topology.local_world_size,
        fast_memory=made.memory,
        reserve=spec.reserve,
        hbm_bytes=int(storage.hbm),
        dram_bytes=int(storage.ddr),
        ssd_bytes=int(storage.ssd),
        hbm_bandwidth=topology.hbm_mem_bw * 1000,
        dram_bandwidth=topology.ddr_mem_bw * 1000,
        host_to_device_bandwidth=topology.hbm_to_ddr_mem_bw * 1000,
        intra_host_bandwidth=topology.intra_host_bw * 1000,
        inter_host_bandwidth=topology.inter_host_bw * 1000,
        ssd_reads_per_second=made.ssd.reads_per_s,
        ssd_bandwidth=made.ssd.bytes_per_s,
        ssd_writes_per_read=made.ssd.writes_per_read,
        notes=list(made.notes),
    )


def _fused_params(made: Made, option: ShardingOption) -> Mapping[str, Any] | None:
    for sharder in made.sharders:
        if isinstance(option.module[1], sharder.module_type):
            params: Mapping[str, Any] | None = getattr(sharder, "fused_params", None)
            return params
    return None


def _data_type(option: ShardingOption) -> str:
    name = str(option.tensor.dtype).removeprefix("torch.")
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(name, name)


def _mean_rate(weighed: Iterable[tuple[float, float]], none: float = 1.0) -> float:
    """Rates weighed by lookups; `none` where there are no lookups."""
    pairs = list(weighed)
    lookups = sum(weight for _, weight in pairs)
    return sum(rate * weight for rate, weight in pairs) / lookups if lookups else none


__all__ = ["Made", "describe"]
