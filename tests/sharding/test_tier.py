"""Rows of the DRAM tier that a rank with a GPU gives its shards, and what is said where memory is short."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensorMetadata
from torchrec.distributed.embedding_types import (
    EmbeddingComputeKernel,
    GroupedEmbeddingConfig,
    ShardedEmbeddingTable,
)
from torchrec.distributed.types import CacheParams, KeyValueParams, ParameterSharding
from torchrec.modules.embedding_configs import DataType, PoolingType

from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.planner import TURBO_SSD, ProfileStatistics, TurboCacheParams
from torchrec_turbossd.sharding import TurboSSDEmbeddingBagCollectionSharder, get_turbo_ssd_sharders, kernel
from torchrec_turbossd.sharding.kernel import KernelNeeds, TurboSSDEmbeddingBag
from torchrec_turbossd.sharding.lookup import LookupContext
from torchrec_turbossd.sharding.rank_store import RankStores, StoreOptions
from torchrec_turbossd.sharding.tier import TierNeed, tier_rows
from torchrec_turbossd.sizing import AccessProfile, HitRateCurve
from torchrec_turbossd.sizing.memory import dram_row_bytes
from torchrec_turbossd.store import MemoryRowStore
from torchrec_turbossd.tables import TableShard, TableSpec

GIB = 1 << 30
ROWS, SIZE = 1_000_000, dram_row_bytes(256)


def need(name: str, planned: int | None = None, rows: int = ROWS, features: int = 1, **of_table: Any) -> TierNeed:
    """A whole table of 64 columns with a tenth of its rows in slots."""
    return TierNeed(
        shard=TableShard.whole(TableSpec(name=name, rows=rows, dim=64)),
        slots=rows // 10,
        features=features,
        sharding=ParameterSharding("table_wise", TURBO_SSD, **of_table),
        planned=planned,
    )


def rows_of(needs: list[TierNeed], budget: int | None = None) -> dict[str, int]:
    return {place[0]: count for place, count in tier_rows(needs, budget).items()}


def test_without_a_word_there_is_no_tier() -> None:
    none = KeyValueParams(l2_cache_size=0)
    assert rows_of([need("a"), need("b", key_value_params=none)]) == {"a": 0, "b": 0}
    assert rows_of([need("a")], 0) == {"a": 0}


def test_the_plan_comes_first_then_the_table_then_the_budget() -> None:
    given = KeyValueParams(l2_cache_size=1)
    needs = [
        need("planned", 7777, key_value_params=given),
        need("own", rows=10**7, key_value_params=given),
        need("rest"),
    ]
    found = rows_of(needs, 100 * 10**6)
    assert found == {"planned": 7777, "own": GIB // SIZE, "rest": 100 * 10**6 // SIZE}
    # No more than what has no slot.
    assert rows_of([need("own", key_value_params=given)]) == {"own": ROWS * 9 // 10}


def test_the_shards_of_a_table_share_what_it_is_given() -> None:
    table = TableSpec(name="t", rows=10**8, dim=64)
    shards = [TableShard(table=table, row_offset=0, rows=10**8, col_offset=at, cols=32) for at in (0, 32)]
    sharding = ParameterSharding("column_wise", TURBO_SSD, key_value_params=KeyValueParams(l2_cache_size=2))
    needs = [TierNeed(shard=s, slots=1000, features=1, sharding=sharding, planned=None) for s in shards]
    assert list(tier_rows(needs, None).values()) == [GIB // dram_row_bytes(128)] * 2


def test_a_budget_goes_where_it_hits_most() -> None:
    stats = [ProfileStatistics(AccessProfile.zipf(ROWS, alpha), 1000) for alpha in (0.6, 0.9)]
    needs = [
        need(name, features=features, cache_params=CacheParams(stats=each))
        for name, features, each in (("even", 2, stats[0]), ("skewed", 3, stats[1]))
    ]
    found = rows_of(needs, 900_000 * SIZE)
    assert sum(found.values()) == 900_000 and min(found.values()) > 10**5
    even, skewed = (HitRateCurve(AccessProfile.zipf(ROWS, alpha)) for alpha in (0.6, 0.9))

    def hits(moved: int) -> float:
        slots = ROWS // 10
        return 2 * even.hit_rate(slots + found["even"] + moved) + 3 * skewed.hit_rate(slots + found["skewed"] - moved)

    assert hits(0) > max(hits(moved) for moved in (-50_000, 50_000))


def test_a_budget_too_small_for_what_is_there_anyhow_gives_none() -> None:
    table = TableSpec(name="empty", rows=9, dim=64)
    empty = dataclasses.replace(
        need("b"), shard=TableShard(table=table, row_offset=9, rows=0, col_offset=0, cols=64), slots=1
    )
    assert rows_of([need("a"), need("b"), empty, need("tiny", rows=3000)], 1000) == {
        "a": 0,
        "b": 0,
        "empty": 0,
        # All of its rows pass through, and may as well stay.
        "tiny": 3000,
    }


def local_table(place: int, rows: int = 50_000) -> Any:
    """The shard at `place` of a table in two row shards."""
    shards = [ShardMetadata(shard_offsets=[row, 0], shard_sizes=[rows, 4], placement="cpu") for row in (0, rows)]
    table: Any = ShardedEmbeddingTable(
        name="t", num_embeddings=2 * rows, embedding_dim=4, local_rows=rows, local_cols=4, feature_names=["a", "b"]
    )
    table.local_metadata, table.global_metadata = shards[place], ShardedTensorMetadata(shards_metadata=shards)
    return table


@pytest.mark.parametrize(("place", "planned"), [(0, 5000), (1, 44_000)])
def test_each_shard_takes_its_own_rows_of_the_plan(place: int, planned: int) -> None:
    # Of the second, 6,000 rows have slots.
    params = TurboCacheParams(slots=(5000, 6000), dram_slots=(5000, 49_000))
    store: Any = None
    context = LookupContext(plan={"t": ParameterSharding("row_wise", TURBO_SSD, cache_params=params)}, store=store)
    table, spec = local_table(place), TableSpec(name="t", rows=100_000, dim=4)
    shard = TableShard(table=spec, row_offset=50_000 * place, rows=50_000, col_offset=0, cols=4)
    found = context.tier_need(table, shard)
    assert (found.planned, found.features, found.place) == (planned, 2, ("t", 50_000 * place, 0))
    context = LookupContext(plan=context.plan, store=store, tier=tier_rows([found], None))
    assert context.dram_slots(table) == planned and LookupContext(plan=context.plan, store=store).dram_slots(table) == 0


@pytest.mark.parametrize(("device", "cache"), [("cpu", 3 << 30), ("cuda", 64 << 20)])
def test_on_a_gpu_stores_cache_no_more_than_ever(device: str, cache: int, tmp_path: Path) -> None:
    shard = TableShard.whole(TableSpec(name="t", rows=5, dim=4))
    given = KeyValueParams(l2_cache_size=3)
    stores = RankStores(StoreOptions(ssd_directory=tmp_path), "ebc", (0, 0), [(shard, given)], device)
    (settings,) = stores._settings.values()
    assert settings.block_cache_bytes == cache
    stores.close()


class Fake(nn.Module):
    """In place of the TBE: keeps what it is given, or raises."""

    given: ClassVar[dict[str, Any]] = {}
    error: ClassVar[BaseException | None] = None

    def __init__(self, shards: Any, slots: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        Fake.given = kwargs
        if Fake.error is not None:
            raise Fake.error


def build(monkeypatch: pytest.MonkeyPatch, device: str, dram_slots: list[int]) -> TurboSSDEmbeddingBag:
    monkeypatch.setattr(kernel, "TurboSSDTableBatchedEmbeddingBags", Fake)
    monkeypatch.setattr(kernel, "TurboSSDFusedOptimizer", lambda *args: None)
    tables = [local_table(0), local_table(1, rows=100)]
    config = GroupedEmbeddingConfig(
        data_type=DataType.FP32,
        pooling=PoolingType.SUM,
        is_weighted=False,
        has_feature_processor=False,
        compute_kernel=EmbeddingComputeKernel.CUSTOMIZED_KERNEL,
        embedding_tables=tables,
    )
    needs = KernelNeeds(slots=[10, 10], dram_slots=dram_slots, store=MemoryRowStore({}), group=None)
    return TurboSSDEmbeddingBag(config, torch.device(device), None, needs)


def test_the_tier_reaches_the_tbe_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(monkeypatch, "cuda", [9000, 0])
    # A tier has the rows of each table that pass through.
    assert Fake.given["dram_slots"] == built.dram_slots == [9000, 100]
    build(monkeypatch, "cuda", [0, 0])
    assert Fake.given["dram_slots"] is None
    build(monkeypatch, "cpu", [0, 0])
    assert "dram_slots" not in Fake.given


SHORT = [
    (
        "cuda",
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        "CacheParams.load_factor",
    ),
    (
        "cuda",
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors"),
        r"DRAM tier.*l2_cache_size.*dram_budget_gb",
    ),
    ("cuda", MemoryError(), "MemoryError; lower KeyValueParams.l2_cache_size"),
    ("cpu", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "slots.*cache_load_factor"),
]


@pytest.mark.parametrize(("device", "error", "said"), SHORT)
def test_short_memory_names_what_to_change(
    device: str, error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "error", error)
    with pytest.raises(BudgetError, match=said) as caught:
        build(monkeypatch, device, [0, 0])
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)


def test_other_errors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "error", RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side"):
        build(monkeypatch, "cuda", [0, 0])


def test_sharders_carry_the_budget(tmp_path: Path) -> None:
    for sharder in get_turbo_ssd_sharders(tmp_path, dram_budget_gb=2.5)[:2]:
        ours: Any = sharder
        assert ours.dram_budget_gb == ours._turbo_options.dram_budget_gb == 2.5
    assert TurboSSDEmbeddingBagCollectionSharder(tmp_path).dram_budget_gb is None
