"""Every way to shard a table on SSD: its shards, their slots and bytes, and where they go, against the arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    KeyValueParams,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)

from tests.planner.models import GB, MB, Model, planner, sharders, topology
from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.planner import TURBO_SSD, PlanRow, describe_plan, format_plan, shard_fast_bytes, slots_of
from torchrec_turbossd.planner.perf import SSD_BLOCK_BYTES
from torchrec_turbossd.sizing import AccessProfile
from torchrec_turbossd.sizing.memory import lookup_bytes, shard_host_bytes

ROWS, DIM, COLS, BATCH = 1_000_001, 128, 32, 100
ADAGRAD = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
BAG_TYPES = ["table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard"]
HOSTS = [(1, 1), (2, 2), (4, 2)]
"""Ranks, and ranks of one host."""
CASES = pytest.mark.parametrize(
    ("module", "kind"),
    [*(("ebc", kind) for kind in BAG_TYPES), *(("ec", kind) for kind in BAG_TYPES[:3])],
)
WORLDS = pytest.mark.parametrize(("ranks", "local"), HOSTS)
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


def model_of(module: str, *tables: tuple[str, int, int]) -> Model:
    return Model(*tables) if module == "ebc" else Model(("tiny", 4, 4), sequences=tables)


def asked(kind: str | None, cols: int = COLS, **more: Any) -> ParameterConstraints:
    return ParameterConstraints(
        sharding_types=[kind] if kind else None, compute_kernels=[TURBO_SSD], min_partition=cols, **more
    )


def options(module: str, where: Topology, constraints: ParameterConstraints) -> dict[str, ShardingOption]:
    """Ways of table "t" by sharding type."""
    made = planner(where, BATCH, {"t": constraints})
    found = made._enumerator.enumerate(model_of(module, ("t", ROWS, DIM)), sharders(**ADAGRAD))
    return {o.sharding_type: o for o in found if o.name == "t"}


def row_parts(parts: int) -> list[int]:
    block = -(-ROWS // parts)
    return [min(block, ROWS - part * block) for part in range(parts)]


def expected_shards(kind: str, ranks: int, local: int) -> list[tuple[int, int]]:
    """(rows, columns) of each shard."""
    rows = {"row_wise": row_parts(ranks), "table_row_wise": row_parts(local), "grid_shard": row_parts(local)}
    cols = [COLS] * (DIM // COLS) if kind in ("column_wise", "table_column_wise", "grid_shard") else [DIM]
    return [(r, c) for c in cols for r in rows.get(kind, [ROWS])]


@DEVICES
@WORLDS
@CASES
def test_slots_and_bytes_of_every_shard(module: str, kind: str, ranks: int, local: int, device: str) -> None:
    where = topology(device, ranks, local=local)
    ours = options(module, where, asked(kind))[kind]
    alike = ParameterConstraints(sharding_types=[kind], compute_kernels=["fused"], min_partition=COLS)
    fused = options(module, where, alike)[kind]
    shards = expected_shards(kind, ranks, local)
    assert [tuple(shard.size) for shard in ours.shards] == shards
    ids = 2 * BATCH * ranks
    for shard, held, (rows, cols), slots, size in zip(
        ours.shards, fused.shards, shards, ours.cache_params.slots, ours.cache_params.row_bytes, strict=True
    ):
        # A column shard is asked for every id, a row shard for its share and a quarter more; each has its own state.
        share = rows / ROWS
        assert slots == -int(-ids * min(1.0, share * (1.25 if share < 1 else 1)) // 1)
        assert size == 4 * cols + 4
        assert shard.storage.ssd == rows * size
        # Input and output are what TorchRec counts for the same shard in memory.
        io = (held.storage.hbm if device == "cuda" else held.storage.ddr) - rows * size
        fast = io + shard_fast_bytes(slots, rows, size, device) + math.ceil(lookup_bytes(device) * ids * share)
        host = shard_host_bytes(rows, size, device) + math.ceil(slots / 2) * size
        assert (shard.storage.hbm, shard.storage.ddr) == ((fast, host) if device == "cuda" else (0, fast + host))
        assert io > 0


def placed(rows: list[PlanRow], local: int) -> list[set[int]]:
    """Hosts of each column range."""
    by_column: dict[int, set[int]] = {}
    for row in rows:
        by_column.setdefault(row.first_col, set()).add(row.rank // local)
    return list(by_column.values())


@DEVICES
@WORLDS
@CASES
def test_planned_shards_are_the_table_and_fill_fast_memory(
    module: str, kind: str, ranks: int, local: int, device: str
) -> None:
    fast = 40 * MB
    made = planner(topology(device, ranks, fast=fast, local=local), BATCH, {"t": asked(kind)})
    model = model_of(module, ("t", ROWS, DIM))
    plan = made.plan(model, sharders(**ADAGRAD))
    rows = [row for row in describe_plan(plan, model, sharders(**ADAGRAD)) if row.table == "t"]
    assert {(row.tier, row.sharding_type, row.compute_kernel) for row in rows} == {("SSD", kind, TURBO_SSD)}
    assert sum((row.rows or 0) * (row.cols or 0) for row in rows) == ROWS * DIM
    assert len({(row.first_row, row.first_col) for row in rows}) == len(rows)
    sharding = plan.plan[module]["t"]
    slots, sizes = slots_of(sharding) or (), sharding.cache_params.row_bytes
    shards = [(row.rank, row.fast_bytes) for row in rows]
    by_hand = [
        (rank, shard_fast_bytes(count, shard.shard_sizes[0], size, device))
        for rank, shard, count, size in zip(sharding.ranks, sharding.sharding_spec.shards, slots, sizes, strict=True)
    ]
    assert sorted(shards) == sorted(by_hand)
    (option,) = [o for o in made._best_plan or [] if o.name == "t"]
    for rank in {row.rank for row in rows}:
        kept = sum(size for owner, size in by_hand if owner == rank)
        said = [s.storage for s in option.shards if s.rank == rank]
        taken = sum(s.hbm if device == "cuda" else s.ddr for s in said)
        # The rest is input and output; what is left over is less than a slot of each shard.
        assert kept < taken <= fast
        full = all(row.slots == row.rows for row in rows if row.rank == rank)
        assert full or fast - taken < MB
    hosts = placed(rows, local)
    if kind in ("table_row_wise", "grid_shard"):
        assert all(len(each) == 1 for each in hosts)
    if kind == "table_column_wise":
        assert len(set.union(*hosts)) == 1


def test_grid_shards_spread_over_hosts() -> None:
    made = planner(topology("cuda", 4, fast=60 * MB, local=2), BATCH, {"t": asked("grid_shard", 64)})
    rows = describe_plan(made.plan(Model(("t", ROWS, DIM)), sharders()))
    assert [(row.rank, row.first_col) for row in rows] in (
        [(0, 0), (1, 0), (2, 64), (3, 64)],
        [(0, 64), (1, 64), (2, 0), (3, 0)],
    )


@CASES
def test_each_column_shard_reads_its_misses(module: str, kind: str) -> None:
    where = topology("cuda", 4, local=2, ssd_mem_bw=1e6)
    option = options(module, where, asked(kind))[kind]
    for shard, rate, (rows, _) in zip(
        option.shards, option.cache_params.hit_rates, expected_shards(kind, 4, 2), strict=True
    ):
        misses = BATCH * 4 * rows / ROWS * (1 - rate)
        assert shard.perf.prefetch_compute == pytest.approx(misses * SSD_BLOCK_BYTES / 1e6)


def test_columns_wider_than_a_block_share_its_reads() -> None:
    made = planner(topology("cpu", 2), BATCH, {"t": asked(None, 1024)})
    found = {o.sharding_type: o for o in made._enumerator.enumerate(Model(("t", ROWS, 2048)), sharders())}
    whole, parts = found["table_wise"].shards, found["column_wise"].shards
    assert len(parts) == 2
    assert sum(s.perf.prefetch_compute for s in parts) == pytest.approx(whole[0].perf.prefetch_compute)


@DEVICES
@pytest.mark.parametrize("module", ["ebc", "ec"])
def test_whole_rows_win_where_nothing_asks_for_column_shards(module: str, device: str) -> None:
    for ranks, local in HOSTS:
        made = planner(topology(device, ranks, fast=40 * MB, local=local), BATCH, {"t": asked(None)})
        # From DRAM, columns would cost no more than whole rows.
        rows = describe_plan(made.plan(model_of(module, ("t", ROWS, DIM)), sharders(dram_budget_gb=0)))
        kinds = {row.sharding_type for row in rows if row.table == "t"}
        assert kinds <= {"table_wise", "row_wise", "table_row_wise"}, kinds
        assert ranks > 1 or kinds == {"table_wise"}


def test_many_tables_on_ssd_keep_whole_rows() -> None:
    tables = [(f"t{n}", 200_000 + n, DIM) for n in range(12)]
    constraints = {name: asked(None) for name, _, _ in tables}
    for local in (4, 2):
        made = planner(topology("cuda", 4, fast=40 * MB, local=local), BATCH, constraints)
        rows = describe_plan(made.plan(Model(*tables), sharders()))
        assert {row.sharding_type for row in rows} <= {"table_wise", "row_wise", "table_row_wise"}


def test_column_shards_take_what_their_ranks_have_left() -> None:
    where = topology("cpu", ranks=2, fast=200 * MB)
    where.devices[1].storage.ddr = 60 * MB
    made = planner(where, BATCH, {"t": asked("column_wise", 64)})
    plan = made.plan(Model(("t", ROWS, DIM)), sharders())
    small, large = sorted(row.slots or 0 for row in describe_plan(plan))
    # A row of 64 columns and the bookkeeping of its slot.
    assert large - small == pytest.approx(140 * MB / (4 * 64 + 26), rel=1e-3)


def test_column_shards_of_one_rank_share_evenly() -> None:
    made = planner(topology("cuda", fast=60 * MB), BATCH, {"t": asked("column_wise")})
    slots = slots_of(made.plan(Model(("t", ROWS, DIM)), sharders()).plan["ebc"]["t"])
    assert slots is not None and len(slots) == 4
    assert max(slots) - min(slots) < 0.2 * max(slots)


def test_leftover_memory_follows_the_bytes_that_a_miss_reads() -> None:
    # A miss of the wide one reads twice as much, and its slot takes twice as much.
    model = Model(("wide", 50_000, 4096), ("narrow", 50_000, 2048))
    constraints = {name: asked("table_wise") for name in ("wide", "narrow")}
    plan = planner(topology("cpu", fast=200 * MB), BATCH, constraints).plan(model, sharders())
    slots = {row.table: row.slots or 0 for row in describe_plan(plan)}
    assert slots["wide"] == pytest.approx(slots["narrow"], rel=0.05)


@CASES
def test_a_load_factor_is_kept_by_every_shard(module: str, kind: str) -> None:
    constraints = asked(kind, cache_params=CacheParams(load_factor=0.01))
    made = planner(topology("cuda", 4, local=2), BATCH, {"t": constraints})
    sharding = made.plan(model_of(module, ("t", ROWS, DIM)), sharders()).plan[module]["t"]
    assert slots_of(sharding) == tuple(-(-shard.shard_sizes[0] // 100) for shard in sharding.sharding_spec.shards)


def test_profiles_are_of_the_whole_table_for_column_shards() -> None:
    access = {"t": AccessProfile.zipf(ROWS, 1.3)}
    rates = {}
    for kind in ("table_wise", "column_wise"):
        made = planner(topology("cpu"), BATCH, {"t": asked(kind)}, access=access)
        (option,) = made._enumerator.enumerate(Model(("t", ROWS, DIM)), sharders())
        rates[kind] = set(option.cache_params.hit_rates)
    assert rates["column_wise"] == rates["table_wise"]


def test_key_value_means_the_same_kernel() -> None:
    where, directory = topology("cuda", 2), KeyValueParams(ssd_storage_directory="/ssd/@local_rank")
    given = ParameterConstraints(
        sharding_types=["column_wise"], compute_kernels=["key_value"], min_partition=64, key_value_params=directory
    )
    sharding = planner(where, BATCH, {"t": given}).plan(Model(("t", 1000, DIM)), sharders()).plan["ebc"]["t"]
    assert (sharding.compute_kernel, sharding.sharding_type) == (TURBO_SSD, "column_wise")
    assert sharding.key_value_params == directory and len(sharding.sharding_spec.shards) == 2
    assert given.compute_kernels == ["key_value"]
    either = ParameterConstraints(compute_kernels=["fused", "key_value", TURBO_SSD])
    found = planner(where, BATCH, {"t": either})._enumerator.enumerate(Model(("t", 1000, 4)), sharders())
    assert [(o.compute_kernel, o.sharding_type) for o in found] == [
        *itertools.product(("fused", TURBO_SSD), ("table_wise", "row_wise"))
    ]


def test_sequences_leave_memory_too() -> None:
    model = Model(("small", 1000, 64), sequences=[("seq", 5_000_000, 64)])
    plan = planner(topology("cpu", 2, fast=300 * MB), BATCH).plan(model, sharders())
    assert plan.plan["ec"]["seq"].compute_kernel == TURBO_SSD
    assert plan.plan["ebc"]["small"].compute_kernel != TURBO_SSD


def test_sharders_that_put_nothing_on_ssd_are_named_by_their_tables() -> None:
    model = Model(("big", 20_000_000, 64), sequences=[("seq", 20_000_000, 64)])
    given: list[Any] = [sharders()[0], EmbeddingCollectionSharder()]
    constraints = {"big": ParameterConstraints(compute_kernels=["fused"])}
    with pytest.raises(BudgetError) as caught:
        planner(topology("cpu"), BATCH).plan(model, given)
    assert f"offer the '{TURBO_SSD}' kernel for 'seq': give the planner sharders of" in str(caught.value)
    assert "constraints of" not in str(caught.value)
    with pytest.raises(BudgetError) as caught:
        planner(topology("cpu"), BATCH, constraints).plan(model, given)
    assert f"allow '{TURBO_SSD}' in the constraints of 'big'; offer the '{TURBO_SSD}'" in str(caught.value)


def test_sharding_types_that_a_sharder_lacks_on_ssd() -> None:
    made = planner(topology("cpu", 2), BATCH, {"seq": asked("table_row_wise")})
    with pytest.raises(ConfigError, match=r"Sharder \(table_wise, row_wise, column_wise\)"):
        made.plan(Model(("t", 10, 4), sequences=[("seq", 1000, 64)]), sharders())


def test_column_shards_print_their_columns() -> None:
    made = planner(topology("cuda", 4, local=2, fast=40 * MB), BATCH, {"t": asked("grid_shard", 64)})
    lines = format_plan(describe_plan(made.plan(Model(("t", ROWS, DIM)), sharders()))).splitlines()
    assert len(lines) == 5
    assert [line.split("grid_shard")[1].split("  ")[1] for line in lines[1:]].count("500,001 x 64 (64 to 127)") == 1
    assert sum("500,000 x 64 (0 to 63)" in line for line in lines) == 1
    whole = planner(topology("cpu", fast=40 * MB), BATCH, {"t": asked("table_wise")})
    assert "1,000,001 x 128 " in format_plan(describe_plan(whole.plan(Model(("t", ROWS, DIM)), sharders())))


@pytest.mark.parametrize("kernel", ["key_value", TURBO_SSD])
def test_plans_without_sizes_say_no_more_than_they_know(kernel: str) -> None:
    metadata = ShardMetadata(shard_offsets=[0, 0], shard_sizes=[1000, 8], placement="rank:0/cpu")
    sharding = ParameterSharding(
        sharding_type="table_wise",
        compute_kernel=kernel,
        ranks=[0],
        sharding_spec=EnumerableShardingSpec([metadata]),
    )
    plan = ShardingPlan({"ebc": EmbeddingModuleShardingPlan({"t": sharding})})
    rows = describe_plan(plan, Model(("t", 1000, 8)), sharders())
    (row,) = rows
    assert (row.tier, row.slots, row.fast_bytes, row.ssd_bytes, row.hit_rate) == ("SSD", None, None, 0, None)
    assert format_plan(rows).splitlines()[1].split()[-4:] == ["-", "-", "-", "-"]


def test_small_plans_of_all_types_fit_a_gigabyte() -> None:
    tables = [(kind, 2_000_000, DIM) for kind in BAG_TYPES]
    constraints = {kind: asked(kind) for kind in BAG_TYPES}
    made = planner(topology("cuda", 4, fast=GB // 4, local=2), BATCH, constraints)
    model = Model(*tables, sequences=[(f"s_{kind}", 2_000_000, DIM) for kind in BAG_TYPES[:3]])
    rows = describe_plan(made.plan(model, sharders()), model, sharders())
    for rank in range(4):
        assert 0 < sum(row.fast_bytes or 0 for row in rows if row.rank == rank) <= GB // 4
    assert {row.table: row.sharding_type for row in rows if row.module == "ebc"} == {kind: kind for kind in BAG_TYPES}
