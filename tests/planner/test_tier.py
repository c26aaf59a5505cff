"""The DRAM tier of a GPU in plans: what it takes, what it answers, and how what is left over of DRAM becomes one."""

from __future__ import annotations

from typing import Any

import pytest
from torchrec.distributed.planner.types import ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams, KeyValueParams, ShardingPlan

from tests.planner.models import GB, MB, Model, planner, sharders, topology
from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.planner import PlanRow, SsdSpeed, TurboSSDPlanner, describe_plan, format_plan
from torchrec_turbossd.planner.budget import DRAM_SHARE
from torchrec_turbossd.planner.kernel import dram_slots_of
from torchrec_turbossd.planner.report import planned_store_bytes
from torchrec_turbossd.planner.stores import bytes_of_stores
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.sizing.memory import dram_row_bytes, store_bytes
from torchrec_turbossd.store import RocksOptions

ROWS, DIM, BATCH = 4_000_000, 64, 100
GIB = 1 << 30
SSD = SsdSpeed(reads_per_s=1e5, bytes_per_s=1e12, writes_per_read=0)


def asked(kind: str = "table_wise", l2: int | None = None, factor: float | None = None) -> ParameterConstraints:
    """On SSD, with `l2_cache_size` and `load_factor` where they are given."""
    return ParameterConstraints(
        sharding_types=[kind],
        compute_kernels=["key_value"],
        min_partition=DIM // 2 if "column" in kind else None,
        key_value_params=None if l2 is None else KeyValueParams(l2_cache_size=l2),
        cache_params=None if factor is None else CacheParams(load_factor=factor),
    )


def gpus(dram: int, ranks: int = 1, fast: int = 50 * MB) -> Topology:
    where = topology("cuda", ranks, fast=fast, hbm_to_ddr_mem_bw=1e6)
    for device in where.devices:
        device.storage.ddr = dram
    return where


def plan_of(where: Topology, *tables: str, budget: float | None = None, **kwargs: Any) -> tuple[TurboSSDPlanner, Any]:
    """A plan of tables of 64 columns."""
    kwargs = {"constraints": {name: asked() for name in tables}, "ssd": SSD, **kwargs}
    made = planner(where, BATCH, **kwargs)
    return made, made.plan(Model(*((name, ROWS, DIM) for name in tables)), sharders(dram_budget_gb=budget))


def rows_of(plan: ShardingPlan) -> dict[str, PlanRow]:
    return {row.table: row for row in describe_plan(plan)}


def in_dram(plan: ShardingPlan) -> dict[str, int]:
    """Bytes of each table's tier."""
    return {table: (row.dram_slots or 0) * dram_row_bytes(4 * DIM) for table, row in rows_of(plan).items()}


def ddr(made: TurboSSDPlanner, rank: int = 0) -> int:
    return sum(shard.storage.ddr for o in made._best_plan or [] for shard in o.shards if shard.rank == rank)


def test_misses_cost_the_link_or_the_ssd() -> None:
    profile = AccessProfile.zipf(ROWS, 0.9)
    made, plan = plan_of(gpus(2 * GB), "t", access={"t": profile})
    row, curve = rows_of(plan)["t"], HitRateCurve(profile)
    slots, behind = row.slots or 0, row.dram_slots or 0
    assert slots > 10**5 and 2 * 10**6 < behind < ROWS - slots
    in_slots, in_both = curve.hit_rate(slots), curve.hit_rate(slots + behind)
    assert (row.hit_rate, row.dram_hit_rate) == (pytest.approx(in_slots), pytest.approx(in_both - in_slots))
    (option,) = made._best_plan or []
    # 256 bytes at 1 MB a ms, both ways at once; 10 us a read.
    ms = BATCH * ((in_both - in_slots) * 256 / 1e6 + (1 - in_both) * 0.01)
    assert option.shards[0].perf.prefetch_compute == pytest.approx(ms)


def test_what_is_left_of_dram_is_shared_and_counted() -> None:
    dram = 2 * GB
    made, plan = plan_of(gpus(dram), "a", "b")
    stores = planned_store_bytes(plan)[0]
    assert stores == store_bytes(2, 2 * ROWS, RocksOptions()) > GB // 2
    # Bits of rows and arriving rows are there anyhow, and the least rows.
    beside = 2 * (ROWS // 8 + BATCH * 256)
    least = 2 * 4096 * dram_row_bytes(256)
    tier = sum(in_dram(plan).values())
    assert tier == pytest.approx(least + DRAM_SHARE * (dram - stores - beside - least), abs=600)
    assert ddr(made) == beside + tier == sum(row.host_bytes for row in rows_of(plan).values()) + 2 * BATCH * 256


def test_a_rank_without_room_has_no_tier() -> None:
    for dram in (4 * MB, 400 * MB):
        made, plan = plan_of(gpus(dram), "a")
        row = rows_of(plan)["a"]
        assert (row.dram_slots, row.dram_hit_rate) == (0, 0.0) and ddr(made) < 4 * MB
        assert "rows in DRAM" in format_plan([row])


@pytest.mark.parametrize("budget", [0.0, 0.0001, 0.2])
def test_a_budget_is_the_most(budget: float) -> None:
    _, plan = plan_of(gpus(4 * GB), "a", "b", budget=budget)
    tier = sum(in_dram(plan).values())
    assert tier == (pytest.approx(budget * GIB, abs=600) if budget > 0.1 else 0)
    # There is no more than there is.
    made, plan = plan_of(gpus(3 * GB // 2), "a", "b", budget=50.0)
    assert sum(in_dram(plan).values()) > GB // 2
    assert ddr(made) + planned_store_bytes(plan)[0] == pytest.approx(3 * GB // 2, abs=600)


def test_no_row_without_a_slot_is_left_out_where_dram_is_plenty() -> None:
    _, plan = plan_of(gpus(20 * GB, ranks=2), "a", "b")
    for row in describe_plan(plan):
        assert (row.slots or 0) + (row.dram_slots or 0) == row.rows and (row.hit_rate or 0) < 1
        assert (row.hit_rate or 0) + (row.dram_hit_rate or 0) == pytest.approx(1)


def test_the_tier_goes_where_it_saves_most() -> None:
    access = {"even": AccessProfile.zipf(ROWS, 0.5), "skewed": AccessProfile.zipf(ROWS, 0.9)}
    _, plan = plan_of(gpus(4 * GB), "even", "skewed", budget=0.5, access=access)
    rows, curves = rows_of(plan), {name: HitRateCurve(profile) for name, profile in access.items()}

    def hits(moved: int) -> float:
        totals = {name: (row.slots or 0) + (row.dram_slots or 0) for name, row in rows.items()}
        return curves["even"].hit_rate(totals["even"] + moved) + curves["skewed"].hit_rate(totals["skewed"] - moved)

    assert all((row.dram_slots or 0) > 100_000 for row in rows.values())
    assert hits(0) >= max(hits(moved) for moved in (-50_000, -5_000, 5_000, 50_000)) - 1e-6


def test_slots_are_worth_the_link_where_dram_holds_the_rest() -> None:
    # By reads of the SSD a narrow row is worth as much as one 16 times as wide; by bytes on the link, a 16th.
    shares = []
    for budget in (0.0, None):
        made = planner(gpus(40 * GB, fast=300 * MB), BATCH, {"n": asked(), "w": asked()}, ssd=SSD)
        plan = made.plan(Model(("n", ROWS, 16), ("w", ROWS, 256)), sharders(dram_budget_gb=budget))
        rows = rows_of(plan)
        shares.append((rows["w"].slots or 0) / (rows["n"].slots or 1))
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("l2", [0, 1])
def test_a_tables_own_size_is_kept(l2: int) -> None:
    where = gpus(8 * GB)
    made, plan = plan_of(where, "a", "b", constraints={"a": asked(l2=l2), "b": asked()})
    rows = rows_of(plan)
    assert rows["a"].dram_slots == (min(GIB // dram_row_bytes(256), ROWS - (rows["a"].slots or 0)) if l2 else 0)
    assert (rows["b"].slots or 0) + (rows["b"].dram_slots or 0) == ROWS
    assert ddr(made) <= 8 * GB - planned_store_bytes(plan)[0]
    # It counts before a plan is chosen.
    tight = GIB - 10 * MB if l2 else 10 * MB
    with_own = {"a": asked(l2=l2)}
    if l2:
        with pytest.raises(BudgetError, match=r"DRAM.*ddr_cap=.*lower the l2_cache_size of 'a'"):
            plan_of(gpus(tight), "a", constraints=with_own)
    else:
        assert plan_of(gpus(tight), "a", constraints=with_own)


def test_slots_go_where_no_tier_answers() -> None:
    _, plan = plan_of(gpus(8 * GB, fast=200 * MB), "a", "b", constraints={"a": asked(l2=1), "b": asked(l2=0)})
    rows = rows_of(plan)
    # Both are asked for alike, but a miss of `a` comes from DRAM.
    assert (rows["a"].hit_rate or 0) + (rows["a"].dram_hit_rate or 0) > 0.99
    assert (rows["b"].slots or 0) > 10 * (rows["a"].slots or 0)


def test_a_tables_own_size_comes_beside_the_budget() -> None:
    _, plan = plan_of(gpus(8 * GB), "a", "b", budget=0.25, constraints={"a": asked(l2=1), "b": asked()})
    tier = in_dram(plan)
    assert tier["a"] == pytest.approx(GIB, rel=0.01) and tier["b"] == pytest.approx(GIB / 4, rel=0.01)


def test_shards_of_a_table_on_one_rank_share_its_size() -> None:
    made, plan = plan_of(gpus(8 * GB), "t", constraints={"t": asked("column_wise", l2=1)})
    counts = dram_slots_of(plan.plan["ebc"]["t"])
    assert counts is not None and counts[0] == pytest.approx(counts[1], rel=0.01)
    assert sum(counts) * dram_row_bytes(128) == pytest.approx(GIB, rel=0.001)
    # What was counted as if each were alone is given back.
    assert ddr(made) == pytest.approx(GIB, rel=0.01)
    made, plan = plan_of(gpus(8 * GB, ranks=2), "t", constraints={"t": asked("column_wise", l2=1)})
    for count in dram_slots_of(plan.plan["ebc"]["t"]) or ():
        assert count == min(GIB // dram_row_bytes(128), ROWS - max(row.slots or 0 for row in describe_plan(plan)))


def test_slots_that_the_user_fixed_have_a_tier() -> None:
    _, plan = plan_of(gpus(2 * GB), "t", constraints={"t": asked(factor=0.01)})
    row = rows_of(plan)["t"]
    assert row.slots == ROWS // 100 and (row.dram_slots or 0) > 2 * 10**6
    assert plan.plan["ebc"]["t"].cache_params.fixed and plan.plan["ebc"]["t"].cache_params.load_factor == 0.01


def test_a_cpu_has_no_tier() -> None:
    where = topology("cpu", fast=4 * GB)
    made = planner(where, BATCH, {"t": asked(l2=1, factor=0.01)})
    plan = made.plan(Model(("t", ROWS, DIM)), sharders(dram_budget_gb=1.0))
    (row,) = describe_plan(plan)
    assert (row.dram_slots, row.dram_hit_rate) == (None, None) and "DRAM " not in format_plan([row])
    assert dram_slots_of(plan.plan["ebc"]["t"]) is None
    # There it is the block cache of the store.
    assert planned_store_bytes(plan)[0] == store_bytes(1, ROWS, RocksOptions(block_cache_bytes=GIB))
    _, plan = plan_of(gpus(4 * GB), "t", constraints={"t": asked(l2=1)})
    assert planned_store_bytes(plan)[0] == store_bytes(1, ROWS, RocksOptions())


def test_stores_are_counted_alike_before_and_after() -> None:
    where = gpus(8 * GB, ranks=4)
    own = ParameterConstraints(
        compute_kernels=["key_value"],
        key_value_params=KeyValueParams(ssd_storage_directory="/x", ssd_rocksdb_write_buffer_size=1 << 20),
    )
    given = {"a": asked("row_wise"), "b": asked(), "c": own, "seq": asked("row_wise")}
    made = planner(where, BATCH, given)
    model = Model(("a", ROWS, DIM), ("b", 500_000, DIM), ("c", 500_000, DIM), sequences=[("seq", 9_001, 64)])
    plan = made.plan(model, sharders())
    by_rank = planned_store_bytes(plan)
    assert by_rank == bytes_of_stores(made._best_plan or [], range(4), "cuda") and len(by_rank) == 4
    # Two modules, and a store of its own for another directory.
    assert sorted(by_rank.values())[0] < sorted(by_rank.values())[-1]


def test_sharders_must_agree_on_a_ranks_budget() -> None:
    one, other = sharders(dram_budget_gb=1.0)[0], sharders(dram_budget_gb=2.0)[1]
    with pytest.raises(ConfigError, match=r"dram_budget_gb is a rank's.*\[1.0, 2.0\]"):
        planner(gpus(GB), BATCH).plan(Model(("t", ROWS, DIM)), [one, other])
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BudgetError, match="dram_budget_gb must be finite"):
            sharders(dram_budget_gb=wrong)


def test_a_link_without_speed_is_refused() -> None:
    with pytest.raises(ConfigError, match="hbm_to_ddr_mem_bw must be above 0"):
        planner(topology("cuda", hbm_to_ddr_mem_bw=0.0))
    planner(topology("cpu", hbm_to_ddr_mem_bw=0.0))
