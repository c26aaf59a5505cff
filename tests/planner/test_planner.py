"""Plans put on SSD what does not fit, fill fast memory to its limit and no further, and say why when nothing fits."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner.proposers import UniformProposer
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Storage
from torchrec.distributed.types import CacheParams, ShardingPlan

from tests.planner.models import GB, MB, Model, planner, printed_under_hash_seeds, sharders, topology
from tests.ranks import run_ranks
from torchrec_turbossd.errors import BudgetError, ConfigError
from torchrec_turbossd.planner import (
    TURBO_SSD,
    PlanRow,
    TurboCacheParams,
    TurboSSDPlanner,
    describe_plan,
    format_plan,
    slots_of,
    turbo_ssd_planner,
)
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve

# 10 GB and 10 MB of float32 rows.
BIG, SMALL = ("big", 20_000_000, 128), ("small", 20_000, 128)
DEVICES = pytest.mark.parametrize("device", ["cpu", "cuda"])


def rows_of(made: TurboSSDPlanner, model: nn.Module, table: str) -> list[PlanRow]:
    rows = describe_plan(made.plan(model, sharders()), model, sharders())
    return [row for row in rows if row.table == table]


def used(made: TurboSSDPlanner, ranks: int) -> list[Storage]:
    """What the planner says its plan takes on each rank."""
    total = [Storage(0, 0, 0) for _ in range(ranks)]
    for option in made._best_plan or []:
        for shard in option.shards:
            total[shard.rank] += shard.storage
    return total


@DEVICES
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_big_table_goes_to_ssd_and_the_small_one_stays(device: str, ranks: int) -> None:
    model = Model(BIG, SMALL, sequences=[("seq", 1000, 64)])
    made = planner(topology(device, ranks, fast=GB))
    plan = made.plan(model, sharders())
    tables = plan.plan["ebc"]
    assert tables["big"].compute_kernel == TURBO_SSD
    assert tables["small"].compute_kernel == plan.plan["ec"]["seq"].compute_kernel == "fused"
    shards = tables["big"].sharding_spec.shards
    slots = slots_of(tables["big"])
    assert slots is not None and len(slots) == len(shards) == len(tables["big"].ranks)
    # A slot has 538 bytes, on a GPU 531, and each row 4 in the map: nearly all of the memory is in use, and none beyond
    # it.
    slot = 531 if device == "cuda" else 538
    for storage in used(made, ranks):
        fast = storage.hbm if device == "cuda" else storage.ddr
        assert GB - 600 < fast <= GB or fast < 20 * MB
    by_hand = [slot * (count + 1) + 4 * shard.shard_sizes[0] for count, shard in zip(slots, shards, strict=True)]
    described = [row.fast_bytes for row in describe_plan(plan) if row.table == "big"]
    assert described == by_hand and max(by_hand) > 0.97 * GB


@DEVICES
def test_everything_stays_while_it_fits(device: str) -> None:
    made = planner(topology(device, fast=11 * GB))
    plan = made.plan(Model(BIG, SMALL), sharders())
    assert {s.compute_kernel for s in plan.plan["ebc"].values()} == {"fused"}


@DEVICES
def test_row_shards_share_evenly(device: str) -> None:
    constraints = {"big": ParameterConstraints(sharding_types=["row_wise"])}
    made = planner(topology(device, ranks=4, fast=GB), constraints=constraints)
    slots = slots_of(made.plan(Model(BIG), sharders()).plan["ebc"]["big"])
    assert slots is not None and len(slots) == 4 and len(set(slots)) == 1


def test_row_shards_take_what_their_ranks_have_left() -> None:
    where = topology("cpu", ranks=2)
    where.devices[1].storage.ddr = GB // 2
    constraints = {"big": ParameterConstraints(sharding_types=["row_wise"])}
    made = planner(where, constraints=constraints)
    slots = slots_of(made.plan(Model(BIG), sharders()).plan["ebc"]["big"])
    assert slots is not None and slots[0] - slots[1] == pytest.approx(GB / 2 / 538, rel=1e-3)
    assert used(made, 2)[1].ddr <= GB // 2


def test_a_rank_too_small_for_its_share_gets_none() -> None:
    where = topology("cpu", ranks=2)
    where.devices[1].storage.ddr = 30 * MB
    # Half of the slot map alone is 40 MB.
    made = planner(where, proposer=UniformProposer())
    (row,) = rows_of(made, Model(BIG), "big")
    assert (row.rank, row.sharding_type, row.tier) == (0, "table_wise", "SSD")


def test_the_least_asked_for_by_byte_leave_first() -> None:
    # The larger one would free more.
    constraints = {"hot": ParameterConstraints(pooling_factors=[20.0]), "cold": ParameterConstraints()}
    made = planner(topology("cpu", fast=500 * MB), constraints=constraints, proposer=UniformProposer())
    plan = made.plan(Model(("hot", 1_500_000, 64), ("cold", 1_000_000, 64)), sharders()).plan["ebc"]
    assert {name for name in plan if plan[name].compute_kernel == TURBO_SSD} == {"cold"}


def test_rows_on_several_ranks_do_not_make_a_table_less_asked_for() -> None:
    # Lookups of a sample count the same however a table is sharded.
    lookups = {"a_hot": 20.0, "b_warm": 10.0, "c_cold": 7.0}
    kinds = {"a_hot": "table_wise", "b_warm": "row_wise", "c_cold": "table_wise"}
    model = Model(("a_hot", 1_000_000, 64), ("b_warm", 1_000_000, 64), ("c_cold", 1_200_000, 64))
    constraints = {
        name: ParameterConstraints(pooling_factors=[count], sharding_types=[kinds[name]])
        for name, count in lookups.items()
    }
    made = planner(topology("cpu", 2, fast=410 * MB), constraints=constraints, proposer=UniformProposer())
    plan = made.plan(model, sharders()).plan["ebc"]
    assert {name for name in lookups if plan[name].compute_kernel == TURBO_SSD} == {"c_cold"}


def test_leftover_memory_follows_access_profiles() -> None:
    model = Model(("steep", 2_000_000, 64), ("flat", 2_000_000, 64))
    access = {"steep": AccessProfile.zipf(2_000_000, 1.6), "flat": AccessProfile.zipf(2_000_000, 0.8)}
    made = planner(topology("cpu", fast=300 * MB), access=access)
    plan = made.plan(model, sharders())
    rows = {row.table: row for row in describe_plan(plan)}
    assert (rows["flat"].slots or 0) > 5 * (rows["steep"].slots or 0) > 0
    for table, row in rows.items():
        assert row.hit_rate == pytest.approx(HitRateCurve(access[table]).hit_rate(row.slots or 0))


def test_predicted_times_follow_the_final_hit_rates() -> None:
    where = topology("cpu", fast=300 * MB)
    made = planner(where, batch_size=100)
    made.plan(Model(("t", 5_000_000, 64)), sharders())
    (option,) = made._best_plan or []
    misses = 100 * (1 - option.cache_params.hit_rates[0])
    assert option.shards[0].perf.prefetch_compute == pytest.approx(misses * 4096 / where.ssd_mem_bw)


def test_a_users_load_factor_is_kept_to_the_slot() -> None:
    cache = CacheParams(load_factor=0.001, prefetch_pipeline=True)
    constraints = {"big": ParameterConstraints(compute_kernels=[TURBO_SSD], cache_params=cache)}
    made = planner(topology("cuda", ranks=2, fast=GB), constraints=constraints)
    sharding = made.plan(Model(BIG, SMALL), sharders()).plan["ebc"]["big"]
    shards = [shard.shard_sizes[0] for shard in sharding.sharding_spec.shards]
    assert slots_of(sharding) == tuple(-(-rows // 1000) for rows in shards)
    params = sharding.cache_params
    assert isinstance(params, TurboCacheParams)
    assert params.fixed and params.load_factor == 0.001 and params.prefetch_pipeline


def test_a_sharders_load_factor_is_kept_too() -> None:
    made = planner(topology("cpu"))
    plan = made.plan(Model(BIG), sharders(cache_load_factor=0.01))
    assert slots_of(plan.plan["ebc"]["big"]) == (200_000,)


def test_a_small_table_goes_to_ssd_when_told() -> None:
    constraints = {"small": ParameterConstraints(compute_kernels=[TURBO_SSD], sharding_types=["row_wise"])}
    made = planner(topology("cpu", ranks=2), constraints=constraints)
    plan = made.plan(Model(SMALL), sharders())
    assert plan.plan["ebc"]["small"].compute_kernel == TURBO_SSD
    # There is room for a slot for every row.
    assert slots_of(plan.plan["ebc"]["small"]) == (10_000, 10_000)
    assert [row.hit_rate for row in describe_plan(plan)] == [1.0, 1.0]


def test_many_tables_are_planned_quickly_and_fit() -> None:
    model = Model(*((f"t{n}", 50_000 * (1 + n % 7), 64) for n in range(60)))
    made = planner(topology("cuda", ranks=2, fast=100 * MB))
    plan = made.plan(model, sharders())
    kernels = [sharding.compute_kernel for sharding in plan.plan["ebc"].values()]
    assert kernels.count(TURBO_SSD) > 0
    assert all(storage.hbm <= 100 * MB for storage in used(made, 2))
    # At most some of it is idle: some caches may be as large as their tables.
    assert sum(storage.hbm for storage in used(made, 2)) > 150 * MB


@DEVICES
def test_plans_pickle_and_describe_themselves(device: str) -> None:
    model = Model(BIG, SMALL)
    plan = planner(topology(device, ranks=2)).plan(model, sharders())
    twin: ShardingPlan = pickle.loads(pickle.dumps(plan))
    assert describe_plan(twin, model, sharders()) == describe_plan(plan, model, sharders())
    assert {t: s.cache_params for t, s in twin.plan["ebc"].items()} == {
        t: s.cache_params for t, s in plan.plan["ebc"].items()
    }
    rows = {row.table: row for row in describe_plan(plan, model, sharders())}
    big, small = rows["big"], rows["small"]
    assert (big.module, big.tier, big.cols) == ("ebc", "SSD", 128)
    assert big.ssd_bytes == (big.rows or 0) * 512 and 0.5 < (big.hit_rate or 0) < 1
    assert small.tier == ("HBM" if device == "cuda" else "DRAM")
    assert (small.slots, small.ssd_bytes, small.hit_rate) == (None, 0, 1.0)
    assert small.fast_bytes == (small.rows or 0) * 512
    # Without the model there is nobody to ask for the bytes of tables in memory.
    assert {row.table: row.fast_bytes for row in describe_plan(plan)} == {"big": big.fast_bytes, "small": None}


def test_a_plan_prints() -> None:
    model = Model(BIG, SMALL)
    text = format_plan(describe_plan(planner(topology("cpu")).plan(model, sharders()), model, sharders()))
    head, big, small = text.splitlines()
    assert head.split()[:4] == ["table", "rank", "tier", "sharding"]
    assert big.startswith("ebc.big") and "SSD" in big and "9.54 GiB" in big and "%" in big
    assert small.startswith("ebc.small") and "all" in small and "9.77 MiB" in small


def test_data_parallel_tables_are_described() -> None:
    class WithCopies(EmbeddingBagCollectionSharder):
        def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
            return ["dense"] if sharding_type == "data_parallel" else ["fused", TURBO_SSD]

    model = Model(SMALL)
    constraints = {"small": ParameterConstraints(sharding_types=["data_parallel"])}
    offered: list[Any] = [WithCopies()]
    plan = planner(topology("cpu", ranks=2), constraints=constraints).plan(model, offered)
    rows = describe_plan(plan, model, offered)
    assert [(row.rank, row.rows, row.fast_bytes, row.tier) for row in rows] == [
        (0, 20_000, 20_000 * 512, "DRAM"),
        (1, 20_000, 20_000 * 512, "DRAM"),
    ]
    assert [row.rows for row in describe_plan(plan)] == [None, None]


def test_no_table_is_copied_to_every_rank_unasked() -> None:
    model, where = Model(BIG, ("tiny", 5, 4), ("dense", 5, 4)), topology("cuda", ranks=8)
    kinds: dict[str, set[str]] = {}
    constraints = {
        "tiny": ParameterConstraints(sharding_types=["data_parallel", "table_wise"]),
        "dense": ParameterConstraints(compute_kernels=["dense"]),
    }
    for option in planner(where, constraints=constraints)._enumerator.enumerate(model, sharders()):
        kinds.setdefault(option.name, set()).add(option.sharding_type)
    assert "data_parallel" not in kinds["big"] and "data_parallel" in kinds["tiny"] & kinds["dense"]
    for option in planner(where)._enumerator.enumerate(model, sharders()):
        assert option.sharding_type != "data_parallel"


def test_copies_beside_tables_on_gpus_are_there_too() -> None:
    model = Model(BIG, SMALL)
    constraints = {"small": ParameterConstraints(sharding_types=["data_parallel"])}
    plan = planner(topology("cuda", ranks=2), constraints=constraints).plan(model, sharders())
    assert {row.table: row.tier for row in describe_plan(plan, model, sharders())} == {"big": "SSD", "small": "HBM"}


def test_options_are_listed_in_memory_first() -> None:
    found = planner(topology("cpu", ranks=2))._enumerator.enumerate(Model(BIG, SMALL), sharders())
    # Tables of one column shard, and all of table-row-wise on one host, would be these again.
    kinds = [
        ("fused", "table_wise"),
        ("fused", "row_wise"),
        (TURBO_SSD, "table_wise"),
        (TURBO_SSD, "row_wise"),
    ]
    assert [(option.compute_kernel, option.sharding_type) for option in found] == 2 * kinds


PROGRAM = """
import logging, sys
logging.disable(logging.WARNING)
from tests.planner.models import Model, planner, sharders, topology
from torchrec_turbossd.planner import describe_plan
model = Model(("a", 3_000_000, 64), ("b", 900_000, 64), ("c", 20_000, 64), ("d", 3_000_000, 64))
print(describe_plan(planner(topology("cuda", 2, 400_000_000)).plan(model, sharders())))
"""


@pytest.mark.slow
def test_every_run_makes_the_same_plan() -> None:
    printed = printed_under_hash_seeds(PROGRAM, "1", "2", "3")
    assert len(printed) == 1 and "SSD" in printed.pop()


def test_the_reservation_is_left_alone() -> None:
    made = turbo_ssd_planner(topology("cuda"), 512)
    made.plan(Model(BIG, SMALL), sharders())
    (storage,) = used(made, 1)
    # TorchRec's default keeps 15 % of HBM, and some for inputs.
    assert 0.83 * GB < storage.hbm < 0.85 * GB


def test_user_callbacks_and_proposers_come_after_ours() -> None:
    seen: list[int] = []

    def look(plan: list[ShardingOption]) -> list[ShardingOption]:
        seen.extend(option.cache_params.slots[0] for option in plan if option.compute_kernel == TURBO_SSD)
        return plan

    made = planner(topology("cpu"), callbacks=[look], proposer=UniformProposer(), debug=False)
    plan = made.plan(Model(BIG, SMALL), sharders())
    assert tuple(seen) == slots_of(plan.plan["ebc"]["big"]) and seen[0] > 100_000
    with pytest.raises(ConfigError, match="its own enumerator"):
        planner(topology("cpu"), enumerator=object())


def plan_together(rank: int, world: int, fast: int) -> tuple[list[PlanRow], str]:
    made = planner(topology("cpu", ranks=world, fast=fast))
    try:
        return describe_plan(made.collective_plan(Model(BIG, SMALL), sharders())), ""
    except BudgetError as error:
        return [], str(error)


@pytest.mark.slow
def test_ranks_agree_and_fail_together() -> None:
    first, second = run_ranks(2, plan_together, GB)
    assert first == second and first[0]
    first, second = run_ranks(2, plan_together, 10 * MB)
    assert first == second and "no plan fits" in first[1]


def test_planning_together_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        planner(topology("cpu")).collective_plan(Model(SMALL), sharders())
