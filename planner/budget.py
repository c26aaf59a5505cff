"""What fast memory a finished plan leaves over, given to the caches on each rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torchrec.distributed.planner.types import ShardingOption, Storage

from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.demand import Demand
from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams, fast_memory
from torchrec_turbossd.planner.space import forget_facts
from torchrec_turbossd.planner.ssd import SsdSpeed
from torchrec_turbossd.planner.storage import add_slots, set_slots
from torchrec_turbossd.sizing.budget import BudgetItem, split_budget
from torchrec_turbossd.sizing.memory import host_slot_bytes, slot_bytes
from torchrec_turbossd.tables import MAX_SLOTS

ShardKey = tuple[int, int]
"""(position of the option in the plan, position of the shard in the option)."""


def share_leftover(
    plan: list[ShardingOption],
    available: Mapping[int, Storage],
    compute_device: str,
    *,
    demand: Demand,
    access: Access,
    ssd: SsdSpeed,
) -> list[ShardingOption]:
    """Give every rank's unused fast memory to the shards on SSD there, where it saves the most time of the SSD.

    No shard loses a slot, shards whose size the user fixed gain none, and no rank exceeds what is available.

    Args:
        plan: chosen options with ranks; their storage and cache parameters are updated.
        available: memory of each rank that tables may take.
        compute_device: says which memory is fast.
        demand: lookups of a batch, which weigh a shard's misses together with the ms that one of them takes.
        access: hit-rate curves.
        ssd: of one rank; says the ms of a miss.
    """
    slots: dict[ShardKey, int] = {}
    wanted: dict[int, dict[ShardKey, BudgetItem]] = {rank: {} for rank in available}
    for number, option in enumerate(plan):
        for n, shard in enumerate(option.shards):
            if grows(option) and shard.size[0]:
                item = budget_item(option, n, compute_device, demand=demand, access=access, ssd=ssd)
                wanted[shard.rank][number, n] = item
    fast = _left(plan, available, fast_memory(compute_device))
    host, beside = _left(plan, available, "ddr"), host_slot_bytes(compute_device)
    for rank, items in wanted.items():
        budget = fast[rank]
        if beside and items:
            # Slots on a GPU take some of the host's memory too; where that is what runs out, the thinnest are counted.
            budget = min(budget, host[rank] // beside * min(item.bytes_per_slot for item in items.values()))
        floors = sum(item.bytes_for(item.floor_slots) for item in items.values())
        slots.update(split_budget(items, budget + floors))
    for number, option in enumerate(plan):
        if grows(option):
            grown = [slots.get((number, n), option.cache_params.slots[n]) for n in range(len(option.shards))]
            _resize(option, grown, compute_device, access)
    return plan


def _left(plan: list[ShardingOption], available: Mapping[int, Storage], memory: str) -> dict[int, int]:
    """Bytes of a kind of memory that a plan leaves on each rank."""
    left = {rank: getattr(storage, memory) for rank, storage in available.items()}
    for shard in (shard for option in plan for shard in option.shards):
        left[shard.rank] -= getattr(shard.storage, memory)
    return {rank: int(max(0, size)) for rank, size in left.items()}


def grows(option: ShardingOption) -> bool:
    """Whether an option's shards take more slots where memory is left: it is on SSD, and its size is not the user's."""
    params = option.cache_params
    return option.compute_kernel == TURBO_SSD and isinstance(params, TurboCacheParams) and not params.fixed


def budget_item(
    option: ShardingOption, number: int, compute_device: str, *, demand: Demand, access: Access, ssd: SsdSpeed
) -> BudgetItem:
    """What one shard of an option on SSD may have, from the slots that it has on; gains are ms of the SSD a batch."""
    shard, row_bytes = option.shards[number], option.cache_params.row_bytes[number]
    return BudgetItem(
        bytes_per_slot=slot_bytes(row_bytes, compute_device),
        curve=access.curve(option, shard),
        weight=demand.lookups(option, shard) * ssd.miss_ms(row_bytes),
        floor_slots=option.cache_params.slots[number],
        max_slots=min(int(shard.size[0]), MAX_SLOTS),
    )


def _resize(option: ShardingOption, slots: list[int], compute_device: str, access: Access) -> None:
    params = option.cache_params
    for shard, new, old, size in zip(option.shards, slots, params.slots, params.row_bytes, strict=True):
        extra = (new - old) * slot_bytes(size, compute_device)
        shard.storage = add_slots(shard.storage, compute_device, extra, slots=new - old)
    forget_facts(option)
    set_slots(option, slots, list(params.row_bytes), access, load_factor=None)
    for shard, new_rate, old_rate in zip(option.shards, option.cache_params.hit_rates, params.hit_rates, strict=True):
        if old_rate < 1:
            reads = shard.perf.prefetch_compute * (1 - new_rate) / (1 - old_rate)
            shard.perf = dataclasses.replace(shard.perf, prefetch_compute=reads)


__all__ = ["budget_item", "grows", "share_leftover"]
