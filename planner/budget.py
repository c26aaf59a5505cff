"""What memory a finished plan leaves over, given to the caches on each rank: HBM first, then DRAM behind it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torchrec.distributed.planner.types import ShardingOption, Storage

from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.demand import Demand
from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams, fast_memory
from torchrec_turbossd.planner.space import forget_facts
from torchrec_turbossd.planner.ssd import MissPrice
from torchrec_turbossd.planner.storage import add_bytes, l2_cache_bytes, set_slots
from torchrec_turbossd.planner.stores import bytes_of_stores
from torchrec_turbossd.sizing.budget import BudgetItem, split_budget
from torchrec_turbossd.sizing.curve import Curve, TierCurve
from torchrec_turbossd.sizing.memory import (
    dram_row_bytes,
    dram_slots_in,
    has_dram_tier,
    least_dram_slots,
    most_dram_slots,
    most_slots,
    slot_bytes,
)
from torchrec_turbossd.sizing.profile import Floats

DRAM_SHARE = 0.75
"""How much of a rank's DRAM the tier takes of what tables and row stores leave, where the user names no budget: what it
takes is never swapped out, and a rank has more to do with DRAM than tables know of."""

ShardKey = tuple[int, int]
"""(position of the option in the plan, position of the shard in the option)."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What caches are sized by.

    Attributes:
        compute_device: says which memory is fast, and whether there is a DRAM tier.
        demand: lookups of a batch, which weigh a shard's misses together with the ms that one of them takes.
        access: hit-rate curves.
        price: of a miss, in ms.
        dram_budget: bytes of each rank for the DRAM tier of tables without an `l2_cache_size`, if there are as many;
            None: `DRAM_SHARE` of what tables and row stores leave.
    """

    compute_device: str
    demand: Demand
    access: Access
    price: MissPrice
    dram_budget: int | None = None

    @property
    def tier(self) -> bool:
        """Whether there is a DRAM tier."""
        return has_dram_tier(self.compute_device)


class _Either:
    """The curve of slots with a tier of a fixed size behind them: a lookup that the tier answers is worth `share` of
    one that a slot does, less than 1."""

    def __init__(self, whole: Curve, rows: int, tier: int, share: float) -> None:
        self._whole, self._rows, self._tier, self._share = whole, rows, tier, share

    def hit_rate(self, slots: Floats, /) -> Floats:
        # All rows but one: a curve that jumps with the last row does so in slots alone.
        both = np.maximum(slots, np.minimum(slots + self._tier, self._rows - 1))
        return (1 - self._share) * self._whole.hit_rate(slots) + self._share * self._whole.hit_rate(both)


def share_leftover(plan: list[ShardingOption], available: Mapping[int, Storage], terms: Terms) -> list[ShardingOption]:
    """Give every rank's unused fast memory to the shards on SSD there, where it saves the most time of misses, then on
    a GPU its unused DRAM to the tier behind them.

    No shard loses a slot, shards whose size the user fixed gain none, and no rank exceeds what is available.

    Args:
        plan: chosen options with ranks; their storage and cache parameters are updated.
        available: memory of each rank that tables may take.
        terms: what caches are sized by.
    """
    room = _room_for_tier(plan, available, terms) if terms.tier else {}
    held = _plenty(plan, room, terms)
    wanted: dict[int, dict[ShardKey, BudgetItem]] = {rank: {} for rank in available}
    for key, option, rank in _shards(plan):
        if grows(option):
            wanted[rank][key] = budget_item(option, key[1], terms, plenty=rank in held)
    slots: dict[ShardKey, int] = {}
    for rank, left in _left(plan, available, fast_memory(terms.compute_device)).items():
        floors = sum(item.bytes_for(item.floor_slots) for item in wanted[rank].values())
        slots.update(split_budget(wanted[rank], left + floors))
    tier = _share_dram(plan, slots, room, terms) if terms.tier else {}
    for number, option in enumerate(plan):
        if _on_ssd(option):
            places = [(number, n) for n in range(len(option.shards))]
            before = option.cache_params
            grown = [slots.get(key, before.slots[key[1]]) for key in places]
            behind = [tier.get(key, before.dram_slots[key[1]]) for key in places] if terms.tier else []
            _resize(option, grown, behind, terms)
    return plan


def _shards(plan: list[ShardingOption]) -> Iterator[tuple[ShardKey, ShardingOption, int]]:
    """Shards on SSD that have rows: where in the plan, of which option, on which rank."""
    for number, option in enumerate(plan):
        if _on_ssd(option):
            for n, shard in enumerate(option.shards):
                if shard.size[0]:
                    yield (number, n), option, shard.rank


def _left(plan: list[ShardingOption], available: Mapping[int, Storage], memory: str) -> dict[int, int]:
    """Bytes of a kind of memory that a plan leaves on each rank."""
    left = {rank: getattr(storage, memory) for rank, storage in available.items()}
    for shard in (shard for option in plan for shard in option.shards):
        left[shard.rank] -= getattr(shard.storage, memory)
    return {rank: int(max(0, size)) for rank, size in left.items()}


def _on_ssd(option: ShardingOption) -> bool:
    return option.compute_kernel == TURBO_SSD and isinstance(option.cache_params, TurboCacheParams)


def grows(option: ShardingOption) -> bool:
    """Whether an option's shards take more slots where memory is left: it is on SSD, and its size is not the user's."""
    return _on_ssd(option) and not option.cache_params.fixed


def tier_grows(option: ShardingOption, terms: Terms) -> bool:
    """Whether an option's shards take rows of the DRAM tier where memory is left."""
    if not terms.tier or terms.dram_budget == 0:
        return False
    return _on_ssd(option) and l2_cache_bytes(option.key_value_params) is None


def budget_item(option: ShardingOption, number: int, terms: Terms, *, plenty: bool = False) -> BudgetItem:
    """What one shard of an option on SSD may have, from the slots that it has on; gains are ms of misses a batch.

    Args:
        plenty: the DRAM tier will hold every row without a slot, so that a slot saves no more than the way from there.
    """
    shard, row_bytes = option.shards[number], option.cache_params.row_bytes[number]
    curve, rows = terms.access.curve(option, shard), int(shard.size[0])
    ms, spared = terms.price.ssd_ms(row_bytes), terms.price.saved_ms(row_bytes)
    tier = option.cache_params.dram_slots[number] if terms.tier else 0
    if plenty and tier_grows(option, terms):
        ms -= spared
    elif tier:
        curve = _Either(curve, rows, tier, spared / ms)
    return BudgetItem(
        bytes_per_slot=slot_bytes(row_bytes, terms.compute_device),
        curve=curve,
        weight=terms.demand.lookups(option, shard) * ms,
        floor_slots=option.cache_params.slots[number],
        max_slots=most_slots(rows, terms.compute_device),
    )


def tier_item(option: ShardingOption, number: int, terms: Terms, slots: int) -> BudgetItem:
    """What one shard of an option on SSD may have of the DRAM tier behind `slots`; gains are ms of misses a batch."""
    shard, row_bytes = option.shards[number], option.cache_params.row_bytes[number]
    rows = int(shard.size[0])
    return BudgetItem(
        bytes_per_slot=dram_row_bytes(row_bytes),
        curve=TierCurve(terms.access.curve(option, shard), slots),
        weight=terms.demand.lookups(option, shard) * terms.price.saved_ms(row_bytes),
        floor_slots=least_dram_slots(rows),
        max_slots=most_dram_slots(slots, rows),
    )


def dram_for_tier(free: int, least: int, terms: Terms) -> int:
    """Bytes of a rank for the DRAM tier of the shards that grow there, `least` included.

    Args:
        free: that tables and row stores leave.
        least: that these shards have already.
    """
    if terms.dram_budget is None:
        return least + math.floor(DRAM_SHARE * max(0, free))
    return least + min(max(0, free), max(0, terms.dram_budget - least))


def _room_for_tier(plan: list[ShardingOption], available: Mapping[int, Storage], terms: Terms) -> dict[int, int]:
    stores = bytes_of_stores(plan, available, terms.compute_device)
    least = dict.fromkeys(available, 0)
    for (_, n), option, rank in _shards(plan):
        if tier_grows(option, terms):
            size = dram_row_bytes(option.cache_params.row_bytes[n])
            least[rank] += least_dram_slots(int(option.shards[n].size[0])) * size
    left = _left(plan, available, "ddr")
    return {rank: dram_for_tier(left[rank] - stores.get(rank, 0), least[rank], terms) for rank in available}


def _plenty(plan: list[ShardingOption], room: Mapping[int, int], terms: Terms) -> set[int]:
    """The ranks whose DRAM tier has room for every row without a slot of the shards that grow there."""
    need = dict.fromkeys(room, 0)
    for (_, n), option, rank in _shards(plan):
        if tier_grows(option, terms):
            params = option.cache_params
            most = most_dram_slots(params.slots[n], int(option.shards[n].size[0]))
            need[rank] += most * dram_row_bytes(params.row_bytes[n])
    return {rank for rank, size in need.items() if size <= room[rank]}


def _share_dram(
    plan: list[ShardingOption], slots: Mapping[ShardKey, int], room: Mapping[int, int], terms: Terms
) -> dict[ShardKey, int]:
    """Rows of the DRAM tier of each shard."""
    wanted: dict[int, dict[ShardKey, BudgetItem]] = {rank: {} for rank in room}
    tier: dict[ShardKey, int] = {}
    given: dict[tuple[int, int], list[ShardKey]] = {}
    for key, option, rank in _shards(plan):
        if tier_grows(option, terms):
            wanted[rank][key] = tier_item(option, key[1], terms, slots.get(key, option.cache_params.slots[key[1]]))
        else:
            given.setdefault((key[0], rank), []).append(key)
    for rank, items in wanted.items():
        for key, count in split_budget(items, room[rank]).items():
            item = items[key]
            # The least rows only pass through, unless they are all that have no slot.
            tier[key] = count if count > item.floor_slots or count == item.max_slots else 0
    for (number, _), keys in given.items():
        option = plan[number]
        size = l2_cache_bytes(option.key_value_params)
        if size:
            params = option.cache_params
            shards = [
                (slots.get(key, params.slots[key[1]]), int(option.shards[key[1]].size[0]), params.row_bytes[key[1]])
                for key in keys
            ]
            tier.update(zip(keys, dram_slots_in(size, shards), strict=True))
    return tier


def _resize(option: ShardingOption, slots: list[int], tier: list[int], terms: Terms) -> None:
    before = option.cache_params
    factor = before.load_factor if before.fixed else None
    forget_facts(option)
    set_slots(option, slots, list(before.row_bytes), terms.access, load_factor=factor, dram_slots=tier)
    for n, shard in enumerate(option.shards):
        fast = (slots[n] - before.slots[n]) * slot_bytes(before.row_bytes[n], terms.compute_device)
        host = _tier_bytes(option.cache_params, n, shard.size[0]) - _tier_bytes(before, n, shard.size[0])
        shard.storage = add_bytes(shard.storage, terms.compute_device, fast, host)
        saved = _miss_ms(option, n, before, terms) - _miss_ms(option, n, option.cache_params, terms)
        wait = max(0.0, shard.perf.prefetch_compute - saved)
        shard.perf = dataclasses.replace(shard.perf, prefetch_compute=wait)


def _tier_bytes(params: TurboCacheParams, number: int, rows: int) -> int:
    if not params.dram_slots:
        return 0
    return max(params.dram_slots[number], least_dram_slots(rows)) * dram_row_bytes(params.row_bytes[number])


def _miss_ms(option: ShardingOption, number: int, params: TurboCacheParams, terms: Terms) -> float:
    lookups = terms.demand.lookups(option, option.shards[number])
    dram = params.dram_hit_rates[number] if params.dram_hit_rates else 0.0
    return terms.price.ms(lookups, params.row_bytes[number], params.hit_rates[number], dram)


__all__ = ["DRAM_SHARE", "Terms", "budget_item", "dram_for_tier", "grows", "share_leftover", "tier_grows", "tier_item"]
