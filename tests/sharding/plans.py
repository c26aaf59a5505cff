"""Plans by hand: shards of every sharding type, on SSD or FUSED."""

from __future__ import annotations

from typing import Any

from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding

from torchrec_turbossd.planner.kernel import TURBO_SSD, TurboCacheParams

COLUMNS = 4
"""Width of a column shard."""

Cut = tuple[int, int, int, int, int]
"""(first row, first column, rows, columns, rank)."""


def cuts(sharding: str, rows: int, dim: int, world: int, local: int, rank: int) -> list[Cut]:
    """The shards of a table; `rank` is where a table-wise one goes, and `rank // local` the host of others."""
    first = rank // local * local
    if sharding == "table_wise":
        return [(0, 0, rows, dim, rank)]
    if sharding == "row_wise":
        return _by_rows(rows, 0, dim, list(range(world)))
    if sharding == "table_row_wise":
        return _by_rows(rows, 0, dim, list(range(first, first + local)))
    columns = list(range(0, dim, COLUMNS))
    if sharding == "column_wise":
        return [(0, column, rows, COLUMNS, n % world) for n, column in enumerate(columns)]
    if sharding == "table_column_wise":
        return [(0, column, rows, COLUMNS, first + n % local) for n, column in enumerate(columns)]
    if sharding == "grid_shard":
        hosts = [list(range(start, start + local)) for start in range(0, world, local)]
        wide = dim // len(hosts)
        return [cut for n, ranks in enumerate(hosts) for cut in _by_rows(rows, n * wide, wide, ranks)]
    raise ValueError(sharding)


def _by_rows(rows: int, column: int, cols: int, ranks: list[int]) -> list[Cut]:
    block = -(-rows // len(ranks))
    starts = [min(rows, n * block) for n in range(len(ranks))]
    return [(start, column, min(block, rows - start), cols, rank) for start, rank in zip(starts, ranks, strict=True)]


def parameter(sharding: str, shards: list[Cut], slots: int | None, device: str = "cpu") -> ParameterSharding:
    """A table's place in a plan: on SSD with so many slots a shard, or FUSED."""
    spec = EnumerableShardingSpec(
        [
            ShardMetadata(
                shard_offsets=[row, column],
                shard_sizes=[rows, cols],
                placement=f"rank:{rank}/{device}{f':{rank}' if device == 'cuda' else ''}",
            )
            for row, column, rows, cols, rank in shards
        ]
    )
    ranks = [rank for *_, rank in shards]
    made = ParameterSharding(
        sharding_type=sharding,
        compute_kernel="fused" if slots is None else TURBO_SSD,
        ranks=ranks,
        sharding_spec=spec,
    )
    if slots is not None:
        made.cache_params = TurboCacheParams(
            slots=tuple(max(1, min(slots, rows)) for _, _, rows, _, _ in shards),
            row_bytes=(0,) * len(shards),
            hit_rates=(0.0,) * len(shards),
        )
    return made


def plan_of(parameters: dict[str, ParameterSharding]) -> Any:
    """A module's plan."""
    return EmbeddingModuleShardingPlan(parameters)
