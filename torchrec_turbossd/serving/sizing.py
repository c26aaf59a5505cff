"""How many slots each table of a serving module gets, and on a GPU how many rows of DRAM behind them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import rounded_row_size_in_bytes

from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.serving.config import ServingConfig
from torchrec_turbossd.sizing import (
    SLOT_MAP_BYTES_PER_ROW,
    AccessProfile,
    BudgetItem,
    HitRateCurve,
    TierCurve,
    shard_fast_bytes,
    slot_bytes,
    split_budget,
)
from torchrec_turbossd.sizing.memory import (
    MOST_DRAM_ROWS,
    dram_row_bytes,
    least_dram_slots,
    most_dram_slots,
    most_slots,
)
from torchrec_turbossd.tables import TableSpec

LEAST_SLOTS = 1024
"""A table gets at least this many slots, or one for each of its rows, so that a small batch fits."""

GIB = 1 << 30
_JUMP = 1e-6
CUDA_ALIGNMENT, CPU_ALIGNMENT = 16, 1
"""FBGEMM pads rows to this many bytes on a CUDA device, and on a CPU machine."""
_DEVICES = {CUDA_ALIGNMENT: "cuda", CPU_ALIGNMENT: "cpu"}


def padded_row_bytes(dim: int, data_type: SparseType, alignment: int) -> int:
    """Bytes of one row in FBGEMM's inference layout, padded to `alignment`."""
    return int(rounded_row_size_in_bytes(dim, data_type, alignment))


def fast_bytes(tables: Sequence[TableSpec], slots: Sequence[int], alignment: int) -> int:
    """Bytes of fast memory: slots, the reserved one of each table, bookkeeping, and the slot map over all rows.

    Batches in flight come on top, and while a generation is exchanged the bookkeeping of the other one's slots.
    """
    return sum(
        shard_fast_bytes(count, t.rows, padded_row_bytes(t.dim, t.data_type, alignment), _DEVICES[alignment])
        for t, count in zip(tables, slots, strict=True)
    )


def slots_for_hit_rate(
    tables: Sequence[TableSpec], hit_rate: float, access: Mapping[str, AccessProfile] | None, alignment: int
) -> list[int]:
    """The least slots of each table that reach `hit_rate` per lookup, `LEAST_SLOTS` or more where it has the rows.

    Where the trace of a profile had so many first lookups of rows that nothing short of a slot for every row would
    reach it, the least that do as well as any others, with a warning.
    """
    wanted = [_slots_for(t, _curve(t, access), hit_rate) for t in tables]
    most = [most_slots(t.rows, _DEVICES[alignment]) for t in tables]
    return [min(max(count, LEAST_SLOTS), limit) for count, limit in zip(wanted, most, strict=True)]


def _slots_for(table: TableSpec, curve: HitRateCurve, hit_rate: float) -> int:
    most = curve.hit_rate(table.rows - 1)
    # A jump at the last slot: the curve of a trace.
    if not most + _JUMP < hit_rate < 1 or curve.hit_rate(table.rows) < most + _JUMP:
        return curve.slots_for(hit_rate)
    slots = curve.slots_for(max(0.0, most - _JUMP))
    warnings.warn(
        f"table {table.name!r}: {hit_rate:.1%} of lookups cannot be hit short of a slot for each of its {table.rows:,} "
        f"rows, because {1 - most:.1%} of those in its profile's trace asked for a row for the first time; it gets "
        f"{slots:,} slots, for {most:.1%}. Record a longer trace, or lower cache_hit_rate",
        RuntimeWarning,
        stacklevel=2,
    )
    return slots


def plan_slots(tables: Sequence[TableSpec], config: ServingConfig, device: torch.device) -> list[int]:
    """Slots of each table: those that reach the target hit rate, or the best split of a budget that is less.

    On a CPU machine `dram_budget_gb` comes on top, split for the most hits.

    Raises:
        BudgetError: `hbm_budget_gb` does not hold slot map, bookkeeping and `LEAST_SLOTS` of each table.
    """
    alignment = CUDA_ALIGNMENT if device.type == "cuda" else CPU_ALIGNMENT
    slots = slots_for_hit_rate(tables, config.cache_hit_rate, config.access, alignment)
    if config.hbm_budget_gb and fast_bytes(tables, slots, alignment) > int(config.hbm_budget_gb * GIB):
        least = [min(LEAST_SLOTS, t.rows) for t in tables]
        slots = _split(tables, config, alignment, (least, slots), int(config.hbm_budget_gb * GIB))
    if config.dram_budget_gb and device.type == "cpu":
        budget = fast_bytes(tables, slots, alignment) + int(config.dram_budget_gb * GIB)
        most = [most_slots(t.rows) for t in tables]
        slots = _split(tables, config, alignment, (slots, most), budget)
    return slots


def plan_dram_slots(tables: Sequence[TableSpec], slots: Sequence[int], config: ServingConfig) -> list[int] | None:
    """Rows of each table that the DRAM tier of a GPU holds besides `slots`; None for no more than it always does.

    `dram_budget_gb` is split for the most hits that slots and tier have together. From what is left tables get room for
    all of their rows, the smallest first: rows that have a place of their own come into slots without another's going
    there.

    Raises:
        BudgetError: `dram_budget_gb` does not hold the least rows of each table.
    """
    if not config.dram_budget_gb:
        return None
    items = {}
    for table, weight, count in zip(tables, _weights(tables, config), slots, strict=True):
        items[table.name] = BudgetItem(
            bytes_per_slot=dram_row_bytes(table.row_bytes),
            curve=TierCurve(_curve(table, config.access), count),
            weight=weight,
            floor_slots=least_dram_slots(table.rows),
            max_slots=most_dram_slots(count, table.rows),
        )
    budget, least = int(config.dram_budget_gb * GIB), sum(item.bytes_for(item.floor_slots) for item in items.values())
    if least > budget:
        raise BudgetError(
            f"dram_budget_gb={config.dram_budget_gb} are {budget:,} bytes; the {len(items)} tables take at least "
            f"{least:,} bytes of host memory; raise it to {least / GIB:.4f} or more, or pass 0 for just those"
        )
    split = split_budget(items, budget)
    left = budget - sum(items[name].bytes_for(count) for name, count in split.items())
    missing = [table for table, count in zip(tables, slots, strict=True) if count < table.rows <= MOST_DRAM_ROWS]
    for table in sorted(missing, key=lambda each: each.rows * each.row_bytes):
        item, count = items[table.name], split[table.name]
        more = item.bytes_for(table.rows) - item.bytes_for(count)
        if item.max_slots <= count and more <= left:
            split[table.name], left = table.rows, left - more
    return [split[t.name] for t in tables]


def _split(
    tables: Sequence[TableSpec],
    config: ServingConfig,
    alignment: int,
    limits: tuple[Sequence[int], Sequence[int]],
    budget: int,
) -> list[int]:
    """The best split of a budget in bytes, with at least and at most so many slots of each table."""
    items = {}
    for table, weight, least, most in zip(tables, _weights(tables, config), *limits, strict=True):
        per_slot = slot_bytes(padded_row_bytes(table.dim, table.data_type, alignment), _DEVICES[alignment])
        items[table.name] = BudgetItem(
            bytes_per_slot=per_slot,
            curve=_curve(table, config.access),
            weight=weight,
            floor_slots=least,
            max_slots=most,
            fixed_bytes=per_slot + SLOT_MAP_BYTES_PER_ROW * table.rows,
        )
    split = split_budget(items, budget)
    return [split[t.name] for t in tables]


def _weights(tables: Sequence[TableSpec], config: ServingConfig) -> list[float]:
    """Tables count by the lookups that their profiles were made from, where all of them say how many those were; else
    alike."""
    profiles = [(config.access or {}).get(table.name) for table in tables]
    lookups = [profile.lookups if profile else 0 for profile in profiles]
    return [float(count) for count in lookups] if all(lookups) else [1.0] * len(tables)


def _curve(table: TableSpec, access: Mapping[str, AccessProfile] | None) -> HitRateCurve:
    profile = (access or {}).get(table.name)
    return HitRateCurve(profile or AccessProfile.zipf(table.rows))


__all__ = [
    "CPU_ALIGNMENT",
    "CUDA_ALIGNMENT",
    "GIB",
    "LEAST_SLOTS",
    "fast_bytes",
    "padded_row_bytes",
    "plan_dram_slots",
    "plan_slots",
    "slots_for_hit_rate",
]
