"""Bytes, lookups, floors and times of shards on SSD, against the arithmetic by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.planner.types import ParameterConstraints, Perf, ShardingOption, Topology
from torchrec.distributed.types import CacheParams, KeyValueParams

from tests.planner.models import Model, planner, sharders, topology
from torchrec_turbossd.errors import ConfigError, UnsupportedError
from torchrec_turbossd.planner import TURBO_SSD, ProfileStatistics, SsdSpeed, slots_of
from torchrec_turbossd.planner.access import StatisticsCurve
from torchrec_turbossd.planner.demand import ROW_STATE, row_bytes
from torchrec_turbossd.planner.perf import MEAN_SHARE, REMAP_COST, SSD_SURCHARGE, TurboSSDPerfModel
from torchrec_turbossd.planner.proposer import distinct, taste
from torchrec_turbossd.planner.ssd import SSD_BLOCK_BYTES
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.sizing.memory import dram_row_bytes
from torchrec_turbossd.tbe.training import ROW_STATE as TRAINED_STATE

ROWS, DIM, BATCH = 1_000_000, 32, 100


def options(
    model: nn.Module, where: Topology, fused_params: dict[str, Any] | None = None, **kwargs: Any
) -> dict[tuple[str, str, str], ShardingOption]:
    """Every option of a model's tables, by (table, sharding type, kernel)."""
    made = planner(where, BATCH, **kwargs)
    found = made._enumerator.enumerate(model, sharders(**(fused_params or {})))
    return {(o.name, o.sharding_type, o.compute_kernel): o for o in found}


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        (EmbOptimType.EXACT_SGD, 0),
        (EmbOptimType.EXACT_ROWWISE_ADAGRAD, 4),
        (EmbOptimType.EXACT_ADAGRAD, 4 * DIM),
        (EmbOptimType.ADAM, 8 * DIM),
        (EmbOptimType.PARTIAL_ROWWISE_ADAM, 4 * DIM + 4),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bytes_of_slots_and_rows(device: str, optimizer: EmbOptimType, state: int) -> None:
    found = options(Model(("t", ROWS, DIM)), topology(device), {"optimizer": optimizer})
    ours, fused = found["t", "table_wise", TURBO_SSD], found["t", "table_wise", "fused"]
    size = 4 * DIM + state
    (storage,) = [shard.storage for shard in ours.shards]
    assert ours.cache_params.slots == (2 * BATCH,)
    assert ours.cache_params.row_bytes == (size,)
    assert storage.ssd == ROWS * size
    # Input and output are what TorchRec counts for a table in memory, beside its rows and their state.
    (held,) = [shard.storage for shard in fused.shards]
    io = (held.hbm if device == "cuda" else held.ddr) - ROWS * size
    of_slot, of_lookup = (19, 20) if device == "cuda" else (26, 28)
    fast = io + (2 * BATCH + 1) * (size + of_slot) + 4 * ROWS + 2 * BATCH * of_lookup
    # Beside it a bit a row, a batch of rows as it comes from the store, and what a GPU's rows pass through.
    host = ROWS // 8 + BATCH * size + (4096 * dram_row_bytes(size) if device == "cuda" else 0)
    assert (storage.hbm, storage.ddr) == ((fast, host) if device == "cuda" else (0, fast + host))
    assert 0 < io < fast


def test_the_optimizer_applied_to_a_table_wins() -> None:
    tensor = nn.Parameter(torch.empty(10, 8, dtype=torch.float16))
    assert row_bytes(tensor, 8, None) == 16
    assert row_bytes(tensor, 4, {"optimizer": EmbOptimType.ADAM}) == 8 + 32
    _apply_optimizer_in_backward(torch.optim.Adagrad, [tensor], {"lr": 0.1})
    assert row_bytes(tensor, 8, {"optimizer": EmbOptimType.ADAM}) == 16 + 32


def test_optimizers_agree_with_the_training_kernel() -> None:
    assert TRAINED_STATE
    for optimizer, state in TRAINED_STATE.items():
        assert ROW_STATE[optimizer] == state
    with pytest.raises(UnsupportedError, match="SHAMPOO"):
        row_bytes(torch.empty(1, 1), 1, {"optimizer": EmbOptimType.SHAMPOO})


def test_floors_follow_features_ranks_and_shards() -> None:
    model = Model(("t", ROWS, DIM), ("tiny", 50, DIM), features={"t": ["a", "b", "c"]})
    found = options(model, topology("cpu", ranks=4))
    # 3 features x 100 samples x 4 ranks x 2 batches in flight; a quarter of that and 25 % more by rows.
    assert found["t", "table_wise", TURBO_SSD].cache_params.slots == (2400,)
    assert found["t", "row_wise", TURBO_SSD].cache_params.slots == (750,) * 4
    # 50 rows in blocks of 13: the last shard has 11.
    assert found["tiny", "row_wise", TURBO_SSD].cache_params.slots == (13, 13, 13, 11)
    assert found["tiny", "table_wise", TURBO_SSD].cache_params.slots == (50,)


def test_floors_follow_constraints() -> None:
    constraints = {"t": ParameterConstraints(pooling_factors=[2.5, 10.0], batch_sizes=[100, 10], num_poolings=[1, 2])}
    model = Model(("t", ROWS, DIM), features={"t": ["a", "b"]})
    found = options(model, topology("cpu"), constraints=constraints, batches_in_flight=3)
    assert found["t", "table_wise", TURBO_SSD].cache_params.slots == ((250 + 200) * 3,)


def test_a_table_that_is_never_asked_has_a_slot() -> None:
    constraints = {"t": ParameterConstraints(pooling_factors=[0.0])}
    found = options(Model(("t", ROWS, DIM)), topology("cpu"), constraints=constraints)
    assert found["t", "table_wise", TURBO_SSD].cache_params.slots == (1,)


def test_shards_without_rows_take_nothing() -> None:
    found = options(Model(("t", 5, DIM)), topology("cpu", ranks=4))
    option = found["t", "row_wise", TURBO_SSD]
    assert [shard.size[0] for shard in option.shards] == [2, 2, 1, 0]
    assert option.cache_params.slots == (2, 2, 1, 0)
    assert option.shards[3].storage.ssd == 0


def test_key_value_sizes_are_not_counted_as_ours() -> None:
    given = ParameterConstraints(key_value_params=KeyValueParams(max_l1_cache_size=64, ssd_storage_directory="/x"))
    with_sizes = options(Model(("t", ROWS, DIM)), topology("cuda"), constraints={"t": given})
    without = options(Model(("t", ROWS, DIM)), topology("cuda"))
    key = ("t", "table_wise", TURBO_SSD)
    assert with_sizes[key].total_storage == without[key].total_storage
    assert with_sizes[key].key_value_params == given.key_value_params


def test_other_kernels_are_estimated_as_torchrec_does() -> None:
    from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

    where = topology("cuda", ranks=2)
    stock = EmbeddingEnumerator(topology=where, batch_size=BATCH)
    # Without our kernel, which TorchRec's own estimators refuse.
    constraints = {"t": ParameterConstraints(compute_kernels=["fused"])}
    stock._constraints = constraints
    expected = stock.enumerate(Model(("t", ROWS, DIM)), sharders())
    found = options(Model(("t", ROWS, DIM)), where)
    for option in distinct(sorted(expected, key=taste)):
        mine = found["t", option.sharding_type, "fused"]
        assert [(s.storage, s.perf) for s in mine.shards] == [(s.storage, s.perf) for s in option.shards]


def test_estimating_twice_changes_nothing() -> None:
    made = planner(topology("cpu"), BATCH)
    found = made._enumerator.enumerate(Model(("t", ROWS, DIM)), sharders())
    before = copy.deepcopy([(o.shards, o.cache_params, o.compute_kernel) for o in found])
    made._enumerator.populate_estimates(found)
    assert [(o.shards, o.cache_params, o.compute_kernel) for o in found] == before


def test_misses_cost_blocks_read_once() -> None:
    where = Topology(world_size=1, compute_device="cpu", ssd_mem_bw=1e6)
    profile = AccessProfile.zipf(ROWS, 1.2)
    found = options(Model(("t", ROWS, DIM)), where, access={"t": profile})
    ours, fused = (found["t", "table_wise", kernel].shards[0].perf for kernel in (TURBO_SSD, "fused"))
    rate = HitRateCurve(profile).hit_rate(2 * BATCH)
    assert found["t", "table_wise", TURBO_SSD].cache_params.hit_rates == (pytest.approx(rate),)
    assert ours.prefetch_compute == pytest.approx(BATCH * (1 - rate) * SSD_BLOCK_BYTES / 1e6)
    assert fused.prefetch_compute == 0
    assert fused.fwd_compute < ours.fwd_compute <= REMAP_COST * fused.fwd_compute


def test_wide_rows_cost_their_bytes() -> None:
    where = Topology(world_size=1, compute_device="cpu", ssd_mem_bw=1e6)
    found = options(Model(("t", ROWS, 2048)), where)
    option = found["t", "table_wise", TURBO_SSD]
    misses = BATCH * (1 - option.cache_params.hit_rates[0])
    assert option.shards[0].perf.prefetch_compute == pytest.approx(misses * 8192 / 1e6)


@pytest.mark.parametrize(
    ("ssd", "row_bytes", "ms"),
    [
        # A read costs its share of the reads a second, however few its bytes.
        (SsdSpeed(reads_per_s=1e5, bytes_per_s=1e9), 64, 0.01),
        (SsdSpeed(reads_per_s=1e5, bytes_per_s=1e9), 512, 0.01),
        # 64 KiB, and as many written.
        (SsdSpeed(reads_per_s=1e5, bytes_per_s=1e9), 65_536, 0.131072),
        (SsdSpeed(reads_per_s=1e5, bytes_per_s=1e9, writes_per_read=0.0), 65_536, 0.065536),
        # No fewer bytes than a block.
        (SsdSpeed(reads_per_s=1e9, bytes_per_s=1e9, writes_per_read=0.0), 64, 0.004096),
        (SsdSpeed(reads_per_s=1e9, bytes_per_s=1e9, writes_per_read=0.5), 64, 0.004128),
    ],
)
def test_a_miss_costs_a_read_or_its_bytes(ssd: SsdSpeed, row_bytes: int, ms: float) -> None:
    assert ssd.miss_ms(row_bytes) == pytest.approx(ms)


def test_a_topology_says_a_bandwidth_of_blocks() -> None:
    speed = SsdSpeed.of(Topology(world_size=1, compute_device="cpu", ssd_mem_bw=4096.0))
    # 4096 bytes a ms are a thousand blocks a second.
    assert speed == SsdSpeed(reads_per_s=1000, bytes_per_s=4_096_000, writes_per_read=0)
    assert [speed.miss_ms(size) for size in (1, 4096, 8192)] == pytest.approx([1, 1, 2])


@pytest.mark.parametrize("name", ["reads_per_s", "bytes_per_s", "writes_per_read"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_absurd_speeds(name: str, value: float) -> None:
    given = {"reads_per_s": 1.0, "bytes_per_s": 1.0, name: value}
    with pytest.raises(ConfigError, match=name):
        SsdSpeed(**given)
    if name != "writes_per_read":
        with pytest.raises(ConfigError, match="above 0, got 0"):
            SsdSpeed(**{**given, name: 0})


def test_the_ssd_given_wins_over_the_topology() -> None:
    ssd = SsdSpeed(reads_per_s=2e5, bytes_per_s=1e12)
    found = options(Model(("t", ROWS, DIM), ("wide", ROWS, 2048)), topology("cpu"), ssd=ssd)
    for table in ("t", "wide"):
        option = found[table, "table_wise", TURBO_SSD]
        misses = BATCH * (1 - option.cache_params.hit_rates[0])
        assert option.shards[0].perf.prefetch_compute == pytest.approx(misses * 1000 / 2e5)


def leftover_of_wide(ssd: SsdSpeed | None) -> float:
    """The share of the slots' bytes that a table with rows of 16 KiB gets beside one with rows of 128 bytes that is
    asked for as often."""
    model = Model(("narrow", ROWS, DIM), ("wide", ROWS, 4096))
    plan = planner(topology("cpu", fast=60 * 10**6), BATCH, ssd=ssd).plan(model, sharders())
    narrow, wide = (sum(slots_of(plan.plan["ebc"][name]) or ()) for name in ("narrow", "wide"))
    return wide * 16_384 / (wide * 16_384 + narrow * 128)


def test_leftover_memory_goes_where_a_miss_takes_longest() -> None:
    # By bytes, a wide row's miss costs four times a narrow one's; by reads, as much, which buys fewer bytes.
    by_bytes, by_reads = leftover_of_wide(None), leftover_of_wide(SsdSpeed(reads_per_s=1e5, bytes_per_s=1e12))
    assert by_reads < 0.9 * by_bytes


def rated(*shards: tuple[int, float, float], batches_in_flight: int) -> float:
    """The rating of a plan with a shard for each (rank, compute ms, prefetch ms), on two ranks."""
    found = options(Model(("t", ROWS, DIM)), topology("cpu", ranks=2))
    plan = [copy.deepcopy(found["t", "table_wise", TURBO_SSD]) for _ in shards]
    for option, (rank, compute, prefetch) in zip(plan, shards, strict=True):
        option.shards[0].rank = rank
        quarter = compute / 4
        option.shards[0].perf = Perf(quarter, quarter, quarter, quarter, prefetch_compute=prefetch)
    return TurboSSDPerfModel(topology("cpu", ranks=2), batches_in_flight=batches_in_flight).rate(plan)


def test_prefetched_misses_are_hidden_by_compute() -> None:
    plan = [(0, 3.0, 1.0), (0, 1.0, 4.0), (1, 4.5, 0.0)]
    # Rank 0 computes for 4 ms and reads for 5, rank 1 computes for 4.5.
    assert rated(*plan, batches_in_flight=2) == pytest.approx(SSD_SURCHARGE * (5 + MEAN_SHARE * 13.5 / 2))
    assert rated(*plan, batches_in_flight=3) == pytest.approx(SSD_SURCHARGE * (5 + MEAN_SHARE * 13.5 / 2))
    assert rated(*plan, batches_in_flight=1) == pytest.approx(SSD_SURCHARGE * (9 + MEAN_SHARE * 13.5 / 2))
    # What is hidden still counts a little.
    assert rated((0, 9.0, 1.0), batches_in_flight=2) < rated((0, 9.0, 2.0), batches_in_flight=2) < SSD_SURCHARGE * 9.2


@pytest.mark.parametrize(("batches", "step"), [(1, 7.0), (2, 4.0)])
def test_the_planner_tells_its_model_of_prefetch(batches: int, step: float) -> None:
    made = planner(topology("cpu"), BATCH, batches_in_flight=batches)
    option = made._enumerator.enumerate(Model(("t", ROWS, DIM)), sharders())[0]
    option.shards[0].rank, option.shards[0].perf = 0, Perf(1.0, 1.0, 1.0, 0.0, prefetch_compute=4.0)
    assert made._perf_model.rate([option]) == pytest.approx(step + MEAN_SHARE * 7.0)


def test_ranks_that_are_not_slowest_count_a_little() -> None:
    found = options(Model(("a", ROWS, DIM), ("b", ROWS // 2, DIM)), topology("cpu", ranks=2))
    slow, quick, slower = (
        found[key]
        for key in (("a", "table_wise", TURBO_SSD), ("b", "table_wise", "fused"), ("b", "table_wise", TURBO_SSD))
    )
    slow.shards[0].rank, quick.shards[0].rank, slower.shards[0].rank = 0, 1, 1
    model = TurboSSDPerfModel(topology("cpu", ranks=2))
    step = slow.shards[0].perf.prefetch_compute
    assert step < model.rate([slow, quick]) < model.rate([slow, slower]) < SSD_SURCHARGE * 1.03 * slow.total_perf


def test_statistics_and_profiles_are_one_thing() -> None:
    profile = AccessProfile.zipf(1000, 1.1)
    stats = ProfileStatistics(profile, lookups=300)
    curve = HitRateCurve(profile)
    assert stats.expected_lookups == profile.distinct(300) < 300
    assert stats.expected_miss_rate(0.0) == 1 and stats.expected_miss_rate(1.0) == 0
    assert stats.expected_miss_rate(0.1) == 1 - curve.hit_rate(100)
    assert 0 < stats.cacheability < ProfileStatistics(AccessProfile.zipf(1000, 0.2), 300).cacheability <= 0.51
    back = StatisticsCurve(stats, 1000)
    slots = torch.tensor([0.0, 10.0, 100.0, 1000.0]).numpy()
    assert back.hit_rate(slots) == pytest.approx(curve.hit_rate(slots))
    assert stats.stable_fingerprint() == ProfileStatistics(AccessProfile.zipf(1000, 1.1), 300).stable_fingerprint()
    assert stats.stable_fingerprint() != ProfileStatistics(profile, 301).stable_fingerprint()


def test_a_users_statistics_set_the_hit_rate() -> None:
    stats = ProfileStatistics(AccessProfile.zipf(ROWS, 2.0), lookups=BATCH)
    constraints = {"t": ParameterConstraints(cache_params=CacheParams(stats=stats))}
    access = {"t": AccessProfile.zipf(ROWS, 0.5)}
    found = options(Model(("t", ROWS, DIM)), topology("cpu"), constraints=constraints, access=access)
    params = found["t", "table_wise", TURBO_SSD].cache_params
    assert params.hit_rates == (pytest.approx(1 - stats.expected_miss_rate(200 / ROWS)),)
    assert params.stats is not None and not params.fixed


@pytest.mark.parametrize("pooling", [float("nan"), float("inf"), -1.0])
def test_absurd_pooling_factors(pooling: float) -> None:
    constraints = {"t": ParameterConstraints(pooling_factors=[pooling])}
    with pytest.raises(ConfigError, match="table 't': pooling factors"):
        options(Model(("t", ROWS, DIM)), topology("cpu"), constraints=constraints)


def test_absurd_widths_of_column_shards() -> None:
    with pytest.raises(ConfigError, match="table 't': min_partition must be a positive int, got -4"):
        options(Model(("t", ROWS, DIM)), topology("cpu"), constraints={"t": ParameterConstraints(min_partition=-4)})


def test_constraints_of_uneven_length() -> None:
    constraints = {"t": ParameterConstraints(pooling_factors=[1.0, 2.0], batch_sizes=[10])}
    with pytest.raises(ConfigError, match="one entry for each feature, got 2 pooling factors"):
        options(Model(("t", ROWS, DIM)), topology("cpu"), constraints=constraints)
