"""Rows of the DRAM tier behind the slots of each shard on a rank with a GPU: as plan, table or budget say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.types import ParameterSharding

from torchrec_turbossd.planner.access import StatisticsCurve
from torchrec_turbossd.planner.storage import l2_cache_bytes
from torchrec_turbossd.sizing import AccessProfile, BudgetItem, HitRateCurve, ShardCurve, TierCurve, split_budget
from torchrec_turbossd.sizing.curve import Curve
from torchrec_turbossd.sizing.memory import dram_row_bytes, dram_slots_in, least_dram_slots, most_dram_slots
from torchrec_turbossd.tables import TableShard

ShardPlace = tuple[str, int, int]
"""Table, first row and first column of a shard."""


@dataclass(frozen=True, kw_only=True)
class TierNeed:
    """A shard of this rank that may have rows in the DRAM tier.

    shard: what it is. slots: usable ones. features: that look it up. sharding: of its table. planned: rows in the tier
    that the plan says, None where it says nothing.
    """

    shard: TableShard
    slots: int
    features: int
    sharding: ParameterSharding
    planned: int | None

    @property
    def place(self) -> ShardPlace:
        return self.shard.table.name, self.shard.row_offset, self.shard.col_offset


def tier_rows(needs: Sequence[TierNeed], budget_bytes: int | None) -> dict[ShardPlace, int]:
    """Rows of each shard in the DRAM tier; 0 where it has none but those that rows pass through.

    The plan's count; else what the `l2_cache_size` of a table holds, the same share of all its shards here; else the
    budget, split for the most hits of what tables are taken to be asked for: their statistics, or the default profile,
    as often as they have features.

    Args:
        needs: all shards of a module on this rank.
        budget_bytes: for those of which neither plan nor table says anything; None: no memory.
    """
    found = {need.place: need.planned for need in needs if need.planned is not None}
    tables: dict[str, list[TierNeed]] = {}
    items: dict[ShardPlace, BudgetItem] = {}
    for need in needs:
        if need.place in found:
            continue
        if l2_cache_bytes(need.sharding.key_value_params) is not None:
            tables.setdefault(need.shard.table.name, []).append(need)
        else:
            found[need.place] = 0
            if budget_bytes and need.shard.rows:
                items[need.place] = _item(need)
    for local in tables.values():
        size = l2_cache_bytes(local[0].sharding.key_value_params) or 0
        rows = dram_slots_in(size, [(need.slots, need.shard.rows, need.shard.row_bytes) for need in local])
        found.update((need.place, count if size else 0) for need, count in zip(local, rows, strict=True))
    least = sum(item.bytes_for(item.floor_slots) for item in items.values())
    for place, count in split_budget(items, max(least, budget_bytes or 0)).items():
        if count > items[place].floor_slots or count == items[place].max_slots:
            found[place] = count
    return found


def _item(need: TierNeed) -> BudgetItem:
    shard = need.shard
    curve = ShardCurve(_curve(need), shard.table.rows / shard.rows)
    return BudgetItem(
        bytes_per_slot=dram_row_bytes(shard.row_bytes),
        curve=TierCurve(curve, need.slots),
        weight=float(need.features),
        floor_slots=least_dram_slots(shard.rows),
        max_slots=most_dram_slots(need.slots, shard.rows),
    )


def _curve(need: TierNeed) -> Curve:
    cache, rows = need.sharding.cache_params, need.shard.table.rows
    if cache is not None and cache.stats is not None:
        return StatisticsCurve(cache.stats, rows)
    return HitRateCurve(AccessProfile.zipf(rows))


__all__ = ["ShardPlace", "TierNeed", "tier_rows"]
