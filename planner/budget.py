"""What fast memory a finished plan leaves over, given to the caches on each rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torchrec.distributed.planner.types import Shard, ShardingOption, Storage

from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.demand import Demand
from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams, fast_memory
from torchrec_turbossd.planner.perf import miss_bytes
from torchrec_turbossd.planner.storage import add_slots, set_slots
from torchrec_turbossd.sizing.budget import BudgetItem, split_budget
from torchrec_turbossd.sizing.memory import slot_bytes
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
) -> list[ShardingOption]:
    """Give every rank's unused fast memory to the shards on SSD there, where it saves the most bytes read.

    No shard loses a slot, shards whose size the user fixed gain none, and no rank exceeds what is available.

    Args:
        plan: chosen options with ranks; their storage and cache parameters are updated.
        available: memory of each rank that tables may take.
        compute_device: says which memory is fast.
        demand: lookups, which weigh the misses, as do the bytes that each reads.
        access: hit-rate curves.
    """
    fast = fast_memory(compute_device)
    slots: dict[ShardKey, int] = {}
    for rank, storage in available.items():
        used = sum(getattr(s.storage, fast) for option in plan for s in option.shards if s.rank == rank)
        items = _items(plan, rank, demand, access)
        floors = sum(item.bytes_for(item.floor_slots) for item in items.values())
        slots.update(split_budget(items, int(max(0, getattr(storage, fast) - used)) + floors))
    for number, option in enumerate(plan):
        if _grows(option):
            grown = [slots.get((number, n), option.cache_params.slots[n]) for n in range(len(option.shards))]
            _resize(option, grown, compute_device, access)
    return plan


def _grows(option: ShardingOption) -> bool:
    params = option.cache_params
    return option.compute_kernel == TURBO_SSD and isinstance(params, TurboCacheParams) and not params.fixed


def _items(plan: list[ShardingOption], rank: int, demand: Demand, access: Access) -> dict[ShardKey, BudgetItem]:
    return {
        (number, n): _item(option, n, shard, demand, access)
        for number, option in enumerate(plan)
        if _grows(option)
        for n, shard in enumerate(option.shards)
        if shard.rank == rank and shard.size[0]
    }


def _item(option: ShardingOption, number: int, shard: Shard, demand: Demand, access: Access) -> BudgetItem:
    row_bytes = option.cache_params.row_bytes[number]
    return BudgetItem(
        bytes_per_slot=slot_bytes(row_bytes),
        curve=access.curve(option, shard),
        weight=demand.lookups(option, shard) * miss_bytes(row_bytes),
        floor_slots=option.cache_params.slots[number],
        max_slots=min(int(shard.size[0]), MAX_SLOTS),
    )


def _resize(option: ShardingOption, slots: list[int], compute_device: str, access: Access) -> None:
    params = option.cache_params
    for shard, new, old, size in zip(option.shards, slots, params.slots, params.row_bytes, strict=True):
        shard.storage = add_slots(shard.storage, compute_device, (new - old) * slot_bytes(size))
    set_slots(option, slots, list(params.row_bytes), access, load_factor=None)
    for shard, new_rate, old_rate in zip(option.shards, option.cache_params.hit_rates, params.hit_rates, strict=True):
        if old_rate < 1:
            reads = shard.perf.prefetch_compute * (1 - new_rate) / (1 - old_rate)
            shard.perf = dataclasses.replace(shard.perf, prefetch_compute=reads)


__all__ = ["share_leftover"]
