"""Why no plan fits: which memory is short, by how much, and what would do."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torchrec.distributed.planner.types import ShardingOption, Storage

from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams, fast_memory

_NAMED = 5


def explain_shortfall(
    options: Sequence[ShardingOption], ranks: Sequence[Storage], compute_device: str, unable: Collection[str]
) -> str:
    """A sentence for each thing that stands in the way of a plan, then what to change.

    Args:
        options: every way to hold every table.
        ranks: memory that tables may take on each rank.
        compute_device: says which memory is fast.
        unable: types of modules, as `ShardingOption.module_type_key` has them, whose sharders put nothing on SSD.
    """
    fast = fast_memory(compute_device)
    name, room = "HBM" if fast == "hbm" else "DRAM", [int(getattr(rank, fast)) for rank in ranks]
    smallest = _smallest(options, fast)
    held = _brought_back(smallest, options, fast, sum(room))
    tight = _short_in_total(name, smallest, room, fast)
    full = _short_in_total("SSD", held, [int(rank.ssd) for rank in ranks], "ssd")
    # On a GPU, the least rows of the DRAM tier, and what the user gave it.
    beside = _short_in_total("DRAM", smallest, [int(rank.ddr) for rank in ranks], "ddr") if fast == "hbm" else []
    if not tight and not full and not beside:
        tight = _short_on_a_rank(name, options, room, fast)
    lines = [*tight, *beside, *full]
    short = f"{fast}_cap=..., ddr_cap=..." if tight and beside else ("ddr_cap=..." if beside else f"{fast}_cap=...")
    advice = [f"raise Topology({short}) or add ranks", *_advice(options, held, ranks, unable)]
    if tight:
        advice += _smaller_caches(held)
    if beside:
        advice += _smaller_tiers(held)
    return f"no plan fits. {' '.join(lines)} What would do: {'; '.join(advice)}."


def human(size: float) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} bytes"


def _smallest(options: Sequence[ShardingOption], fast: str) -> list[ShardingOption]:
    """Of each table, the option that takes the least fast memory."""
    best: dict[str, ShardingOption] = {}
    for option in options:
        known = best.get(option.fqn)
        if known is None or getattr(option.total_storage, fast) < getattr(known.total_storage, fast):
            best[option.fqn] = option
    return list(best.values())


def _brought_back(
    smallest: Sequence[ShardingOption], options: Sequence[ShardingOption], fast: str, room: int
) -> list[ShardingOption]:
    """The same tables with those that cost least to keep in fast memory kept there while there is room, so that no
    more SSD is asked for than needed."""
    held = {option.fqn: option for option in smallest}
    resident = _smallest([option for option in options if option.compute_kernel != TURBO_SSD], fast)
    left = room - sum(getattr(option.total_storage, fast) for option in smallest)
    price = {o.fqn: getattr(o.total_storage, fast) - getattr(held[o.fqn].total_storage, fast) for o in resident}
    for option in sorted(resident, key=lambda o: (price[o.fqn], o.fqn)):
        if price[option.fqn] <= left:
            held[option.fqn] = option
            left -= price[option.fqn]
    return list(held.values())


def _short_in_total(memory: str, smallest: Sequence[ShardingOption], ranks: Sequence[int], kind: str) -> list[str]:
    need, have = sum(getattr(option.total_storage, kind) for option in smallest), sum(ranks)
    if need <= have:
        return []
    takers = [option for option in smallest if getattr(option.total_storage, kind)]
    order = sorted(takers, key=lambda option: (-getattr(option.total_storage, kind), option.fqn))
    named = ", ".join(_needs(option, kind) for option in order[:_NAMED])
    rest = f" and {len(order) - _NAMED} more tables" if len(order) > _NAMED else ""
    return [
        f"{memory}: the tables take at least {human(need)}, {_count(ranks)} {human(have)} free for them: "
        f"{human(need - have)} short. They are {named}{rest}."
    ]


def _count(ranks: Sequence[int]) -> str:
    return "the one rank has" if len(ranks) == 1 else f"the {len(ranks)} ranks have"


def _needs(option: ShardingOption, kind: str) -> str:
    said = f"{option.name!r} {human(getattr(option.total_storage, kind))}"
    params = option.cache_params
    if kind == "ssd" or option.compute_kernel != TURBO_SSD or not isinstance(params, TurboCacheParams):
        return said
    if kind == "ddr" and option.total_storage.hbm > 0:
        tier = sum(_tier(option))
        return f"{said} ({tier:,} rows of the DRAM tier)" if tier else said
    return f"{said} ({sum(params.slots):,} slots and slot map)"


def _short_on_a_rank(memory: str, options: Sequence[ShardingOption], ranks: Sequence[int], fast: str) -> list[str]:
    """The tables fit in the sum of all ranks, so that it must be one shard, or their placement."""
    thinnest: dict[str, int] = {}
    for option in options:
        widest = max(int(getattr(shard.storage, fast)) for shard in option.shards)
        thinnest[option.name] = min(widest, thinnest.get(option.name, widest))
    lines = [
        f"{memory}: a shard of {table!r} takes at least {human(size)}, the roomiest rank has {human(max(ranks))}: "
        f"{human(size - max(ranks))} short."
        for table, size in sorted(thinnest.items())
        if size > max(ranks)
    ]
    return lines or [f"{memory}: the tables fit in the sum of {len(ranks)} ranks, but not rank by rank."]


def _advice(
    options: Sequence[ShardingOption], held: Sequence[ShardingOption], ranks: Sequence[Storage], unable: Collection[str]
) -> list[str]:
    ours = {option.fqn for option in options if option.compute_kernel == TURBO_SSD}
    kept = [option for option in held if option.fqn not in ours]
    barred = sorted({option.name for option in kept if option.module_type_key not in unable})
    others = sorted({option.name for option in kept if option.module_type_key in unable})
    advice = []
    if barred:
        advice.append(f"allow {TURBO_SSD!r} in the constraints of {', '.join(map(repr, barred[:_NAMED]))}")
    if others:
        advice.append(
            f"offer the {TURBO_SSD!r} kernel for {', '.join(map(repr, others[:_NAMED]))}: give the planner sharders of "
            "torchrec_turbossd.sharding"
        )
    on_ssd = sum(option.total_storage.ssd for option in held)
    if on_ssd > sum(rank.ssd for rank in ranks):
        advice.append(f"raise Topology(ssd_cap=...) to {human(on_ssd / len(ranks))} a rank or more")
    return advice


def _smaller_caches(held: Sequence[ShardingOption]) -> list[str]:
    ours = [option for option in held if option.compute_kernel == TURBO_SSD]
    fixed = sorted(option.name for option in ours if option.cache_params.fixed)
    advice = [f"lower the load_factor of {', '.join(map(repr, fixed[:_NAMED]))}"] if fixed else []
    if len(fixed) < len(ours):
        advice.append("lower batch_size, pooling_factors or batches_in_flight, which set the least slots of a table")
    return advice


def _smaller_tiers(held: Sequence[ShardingOption]) -> list[str]:
    given = sorted(option.name for option in held if option.compute_kernel == TURBO_SSD and any(_tier(option)))
    return [f"lower the l2_cache_size of {', '.join(map(repr, given[:_NAMED]))}"] if given else []


def _tier(option: ShardingOption) -> tuple[int, ...]:
    """Rows of the DRAM tier, which has some before a plan is chosen only where the user said so."""
    params = option.cache_params
    return params.dram_slots if isinstance(params, TurboCacheParams) else ()


__all__ = ["explain_shortfall", "human"]
