"""A plan as rows to print: which shard is where, in what tier, with how many slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingPlan, ShardingType, ShardMetadata

from torchrec_turbossd.planner.demand import row_bytes
from torchrec_turbossd.planner.kernel import KEY_VALUE, TURBO_SSD, TurboCacheParams, slots_of
from torchrec_turbossd.planner.shortfall import human
from torchrec_turbossd.planner.stores import StoreTally
from torchrec_turbossd.sizing.memory import has_dram_tier, shard_fast_bytes, shard_host_bytes


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One shard of a table.

    Attributes:
        module: path of its module in the model.
        table: its table.
        rank: the rank that holds it.
        tier: where its rows are: "SSD" (with slots in fast memory), "HBM" or "DRAM".
        sharding_type, compute_kernel: TorchRec's names.
        rows, cols: of the shard; None for a data-parallel table of a model that is not at hand.
        first_row, first_col: where in the table it begins.
        whole_rows: whether it has all columns of the table.
        slots: its rows of fast memory; None where all rows are in memory.
        fast_bytes: fast memory it takes, batches left out; None where the model is not at hand.
        ssd_bytes: SSD it takes when every row has been written.
        hit_rate: predicted share of lookups, repeated ones included, whose row is in fast memory.
        host_bytes: host memory it takes beside its fast memory, batches and the row store left out.
        dram_slots: its rows of the DRAM tier of a GPU, besides those in slots; None where there is no such tier, or
            the plan does not say.
        dram_hit_rate: predicted share of lookups whose row is there; None likewise.
    """

    module: str
    table: str
    rank: int
    tier: str
    sharding_type: str
    compute_kernel: str
    rows: int | None
    cols: int | None
    first_row: int
    first_col: int
    whole_rows: bool
    slots: int | None
    fast_bytes: int | None
    ssd_bytes: int
    hit_rate: float | None
    host_bytes: int = 0
    dram_slots: int | None = None
    dram_hit_rate: float | None = None


def describe_plan(
    plan: ShardingPlan, model: nn.Module | None = None, sharders: Sequence[ModuleSharder[nn.Module]] = ()
) -> list[PlanRow]:
    """The shards of a plan by module, table and rank.

    Tables on SSD describe themselves; the bytes of tables that are all in memory need the model that was planned and
    the sharders it was planned with.
    """
    rows: list[PlanRow] = []
    for path, module_plan in plan.plan.items():
        tensors = _tensors(model, path, sharders)
        for table, sharding in module_plan.items():
            tensor, fused_params = tensors.get(table, (None, None))
            rows += _rows(path, table, sharding, tensor, fused_params)
    if _on_gpus(plan):
        # Copies have no placement of their own in a plan.
        copied = ShardingType.DATA_PARALLEL.value
        rows = [dataclasses.replace(row, tier="HBM") if row.sharding_type == copied else row for row in rows]
    return sorted(rows, key=lambda row: (row.module, row.table, row.rank, row.first_col, row.first_row))


def _on_gpus(plan: ShardingPlan) -> bool:
    shardings = [sharding for module_plan in plan.plan.values() for sharding in module_plan.values()]
    return any(place.device == "cuda" for sharding in shardings for place in _places(sharding, None))


def format_plan(rows: Iterable[PlanRow]) -> str:
    """The rows as a text table; a column shard's columns are followed by those of the table that they are."""
    every = list(rows)
    tier = any(row.dram_slots is not None for row in every)
    lines = [[name for name, _ in _columns(tier)], *([cell(row) for _, cell in _columns(tier)] for row in every)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _columns(tier: bool) -> list[tuple[str, Callable[[PlanRow], str]]]:
    """Heads and cells; the DRAM tier has columns where there is one."""
    columns: list[tuple[str, Callable[[PlanRow], str]]] = [
        ("table", lambda row: f"{row.module}.{row.table}" if row.module else row.table),
        ("rank", lambda row: str(row.rank)),
        ("tier", lambda row: row.tier),
        ("sharding", lambda row: row.sharding_type),
        ("rows x cols", _extent),
        ("slots", lambda row: _count(row.slots, "-" if row.tier == "SSD" else "all")),
        ("fast memory", lambda row: "-" if row.fast_bytes is None else human(row.fast_bytes)),
        ("host memory", lambda row: human(row.host_bytes) if row.host_bytes else "-"),
        ("SSD", lambda row: human(row.ssd_bytes) if row.ssd_bytes else "-"),
        ("hit rate", lambda row: _percent(row.hit_rate)),
    ]
    if tier:
        columns.insert(6, ("rows in DRAM", lambda row: _count(row.dram_slots or None, "-")))
        columns.append(("from DRAM", lambda row: _percent(row.dram_hit_rate)))
    return columns


def _count(count: int | None, none: str) -> str:
    return none if count is None else f"{count:,}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _extent(row: PlanRow) -> str:
    if row.rows is None or row.cols is None:
        return "-"
    extent = f"{row.rows:,} x {row.cols}"
    return extent if row.whole_rows else f"{extent} ({row.first_col} to {row.first_col + row.cols - 1})"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a shard is, and what of the table it is: (rows, columns)."""

    rank: int
    device: str
    first: tuple[int, int]
    size: tuple[int, int] | None


def _rows(
    path: str, table: str, sharding: ParameterSharding, tensor: Tensor | None, fused_params: Mapping[str, Any] | None
) -> Iterator[PlanRow]:
    on_ssd = sharding.compute_kernel in (TURBO_SSD, KEY_VALUE)
    places = list(_places(sharding, tensor))
    for number, place in enumerate(places):
        cache = _cache(sharding, number, place) if on_ssd else _Cache(hit_rate=1.0)
        fast = cache.fast_bytes
        if not on_ssd and tensor is not None and place.size is not None:
            fast = place.size[0] * row_bytes(tensor, place.size[1], fused_params)
        yield PlanRow(
            module=path,
            table=table,
            rank=place.rank,
            tier="SSD" if on_ssd else ("HBM" if place.device == "cuda" else "DRAM"),
            sharding_type=sharding.sharding_type,
            compute_kernel=sharding.compute_kernel,
            rows=place.size[0] if place.size else None,
            cols=place.size[1] if place.size else None,
            first_row=place.first[0],
            first_col=place.first[1],
            whole_rows=len({other.first[1] for other in places}) == 1,
            slots=cache.slots,
            fast_bytes=fast,
            ssd_bytes=cache.ssd_bytes,
            hit_rate=cache.hit_rate,
            host_bytes=cache.host_bytes,
            dram_slots=cache.dram_slots,
            dram_hit_rate=cache.dram_hit_rate,
        )


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """What a shard on SSD takes, as far as the plan says."""

    slots: int | None = None
    fast_bytes: int | None = None
    host_bytes: int = 0
    ssd_bytes: int = 0
    hit_rate: float | None = None
    dram_slots: int | None = None
    dram_hit_rate: float | None = None


def _cache(sharding: ParameterSharding, number: int, place: _Place) -> _Cache:
    slots, params = slots_of(sharding), sharding.cache_params
    if slots is None or not isinstance(params, TurboCacheParams) or place.size is None:
        return _Cache()
    tier = params.dram_slots[number] if params.dram_slots else None
    said = _Cache(
        slots=slots[number],
        hit_rate=params.hit_rates[number] if params.hit_rates else None,
        dram_slots=tier,
        dram_hit_rate=params.dram_hit_rates[number] if params.dram_hit_rates else None,
    )
    if not params.row_bytes:
        return said
    rows, size, device = place.size[0], params.row_bytes[number], place.device or "cpu"
    return dataclasses.replace(
        said,
        fast_bytes=shard_fast_bytes(slots[number], rows, size, device),
        host_bytes=shard_host_bytes(rows, size, device, (tier or 0) if has_dram_tier(device) else 0),
        ssd_bytes=rows * size,
    )


def planned_store_bytes(plan: ShardingPlan) -> dict[int, int]:
    """The most host memory that the row stores of a plan take on each rank that has some, by rank.

    It comes on top of the plan's `Storage`, in which it has no part: a store is its rank's, whatever tables are there.
    Each module has one for each SSD directory that its tables name; memory settings of `KeyValueParams` count.
    """
    tables = [
        (path, sharding, list(_places(sharding, None)))
        for path, module_plan in plan.plan.items()
        for sharding in module_plan.values()
        if sharding.compute_kernel in (TURBO_SSD, KEY_VALUE)
    ]
    tally = StoreTally(sorted({place.rank for _, _, places in tables for place in places}))
    for path, sharding, places in tables:
        shards = [(place.rank, place.size[0] if place.size is not None else 0) for place in places]
        tally.add(path, sharding.key_value_params, places[0].device if places else "cpu", shards)
    return tally.bytes()


def _places(sharding: ParameterSharding, tensor: Tensor | None) -> Iterator[_Place]:
    ranks = sharding.ranks or []
    if sharding.sharding_spec is None:
        shape = (int(tensor.shape[0]), int(tensor.shape[1])) if tensor is not None else None
        yield from (_Place(rank=rank, device="", first=(0, 0), size=shape) for rank in ranks)
        return
    shards: list[ShardMetadata] = sharding.sharding_spec.shards
    for rank, shard in zip(ranks, shards, strict=True):
        placement = shard.placement
        yield _Place(
            rank=rank,
            device=placement.device().type if placement is not None else "",
            first=(int(shard.shard_offsets[0]), int(shard.shard_offsets[1])),
            size=(int(shard.shard_sizes[0]), int(shard.shard_sizes[1])),
        )


def _tensors(
    model: nn.Module | None, path: str, sharders: Sequence[ModuleSharder[nn.Module]]
) -> dict[str, tuple[Tensor, Mapping[str, Any] | None]]:
    """Parameters of the module at `path` by table, with their sharder's options."""
    if model is None:
        return {}
    module = model.get_submodule(path)
    for sharder in sharders:
        if sharder_name(sharder.module_type) == sharder_name(type(module)):
            found = sharder.shardable_parameters(module)
            return {table: (tensor, getattr(sharder, "fused_params", None)) for table, tensor in found.items()}
    return {}


__all__ = ["PlanRow", "describe_plan", "format_plan", "planned_store_bytes"]
