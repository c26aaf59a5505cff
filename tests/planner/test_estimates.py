"""Bytes, lookups, floors and times of shards on SSD, against the arithmetic by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Topology
from torchrec.distributed.types import CacheParams, KeyValueParams

from tests.planner.models import Model, planner, sharders, topology
from torchrec_turbossd.errors import ConfigError, UnsupportedError
from torchrec_turbossd.planner import TURBO_SSD, ProfileStatistics, shard_fast_bytes
from torchrec_turbossd.planner.access import StatisticsCurve
from torchrec_turbossd.planner.demand import ROW_STATE, row_bytes
from torchrec_turbossd.planner.perf import REMAP_COST, SSD_BLOCK_BYTES, TurboSSDPerfModel
from torchrec_turbossd.planner.proposer import distinct, taste
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
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
    fast, other = (storage.hbm, storage.ddr) if device == "cuda" else (storage.ddr, storage.hbm)
    assert ours.cache_params.slots == (2 * BATCH,)
    assert ours.cache_params.row_bytes == (size,)
    assert storage.ssd == ROWS * size and other == 0
    # Input and output are what TorchRec counts for a table in memory, beside its rows and their state.
    (held,) = [shard.storage for shard in fused.shards]
    io = (held.hbm if device == "cuda" else held.ddr) - ROWS * size
    assert fast == io + shard_fast_bytes(2 * BATCH, ROWS, size)
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


def test_ranks_that_are_not_slowest_count_a_little() -> None:
    found = options(Model(("a", ROWS, DIM), ("b", ROWS // 2, DIM)), topology("cpu", ranks=2))
    slow, quick, slower = (
        found[key]
        for key in (("a", "table_wise", TURBO_SSD), ("b", "table_wise", "fused"), ("b", "table_wise", TURBO_SSD))
    )
    slow.shards[0].rank, quick.shards[0].rank, slower.shards[0].rank = 0, 1, 1
    model = TurboSSDPerfModel(topology("cpu", ranks=2))
    assert slow.total_perf < model.rate([slow, quick]) < model.rate([slow, slower]) < 1.03 * slow.total_perf


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
