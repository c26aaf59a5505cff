"""What the arithmetic of memory says of the host and of a device, against the arrays that a cache really holds."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from torchrec_turbossd.cache import POLICIES, SlotCache, dram_tier, entries
from torchrec_turbossd.cache.device_cache import DeviceCache
from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.serving import TurboSSDInferenceModule
from torchrec_turbossd.sizing.memory import (
    BYTES_PER_SLOT,
    DEVICE_BYTES_PER_SLOT,
    LEAST_DRAM_ROWS,
    LOOKUP_BYTES,
    MOST_DRAM_ROWS,
    PENDING_BYTES,
    dram_row_bytes,
    dram_slots_in,
    least_dram_slots,
    lookup_bytes,
    most_dram_slots,
    most_slots,
    shard_fast_bytes,
    shard_host_bytes,
    slot_bytes,
    store_bytes,
)
from torchrec_turbossd.store import LayeredRowStore, MemoryRowStore, RocksOptions
from torchrec_turbossd.tables import StateSpec, TableShard, TableSpec
from torchrec_turbossd.tbe.cached_rows import CachedRows
from torchrec_turbossd.tbe.layout import Batch, Run
from torchrec_turbossd.tbe.slot_memory import SlotMemory

MIB, GIB = 1 << 20, 1 << 30


def held(thing: Any, found: dict[int, tuple[str, int]]) -> dict[int, tuple[str, int]]:
    """Memory of every large tensor and array that an object of this package holds: (where, bytes) by address."""
    parts = vars(thing).values() if hasattr(thing, "__dict__") else thing
    for part in parts:
        if isinstance(part, torch.Tensor):
            found[part.data_ptr()] = part.device.type, part.nbytes
        elif isinstance(part, np.ndarray):
            found.setdefault(part.ctypes.data, ("host", part.nbytes))
        elif isinstance(part, list | tuple) or type(part).__module__.startswith("torchrec_turbossd.cache"):
            held(part, found)
    return found


def test_bookkeeping_of_a_cpu_is_what_is_counted() -> None:
    rows, slots = 9_000, 2_000
    cache = SlotCache([rows], [slots])
    memory = [size for _, size in held(cache, {}).values() if size > 64]
    assert sum(memory) == cache.nbytes == shard_fast_bytes(slots, rows, 0)


@pytest.mark.parametrize(("rows", "slots"), [(9_000, 2_000), (100, 100), (100_000, 50_001)])
def test_bookkeeping_of_a_gpu_is_what_is_counted(rows: int, slots: int) -> None:
    parts = [[torch.zeros(slots + 1, 68, dtype=torch.uint8)]]
    least = least_dram_slots(rows)
    cache = DeviceCache([rows], [slots], parts, row_bytes=[68], dram_slots=None, feature_table=[0])
    # Beside that some words for a table.
    assert 0 <= cache.nbytes - shard_fast_bytes(slots, rows, 0, "cuda") < 32
    assert cache.tier.nbytes == shard_host_bytes(rows, 68, "cuda") - -(-rows // 8) == least * dram_row_bytes(68)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0.0, 5e6 / GIB])
def test_a_gpu_holds_what_is_counted(budget: float, tmp_path: Path) -> None:
    # A row of 68 bytes is one of 80 in a slot, and with its header in the DRAM tier.
    specs = [("a", 100_000, 64, SparseType.INT8), ("b", 1_000, 64, SparseType.INT8)]
    options: dict[str, Any] = {"cache_hit_rate": 0.5, "device": "cuda", "dram_budget_gb": budget}
    with TurboSSDInferenceModule.from_embedding_specs(specs, tmp_path, **options) as module:
        shards = [(module.slots[name], rows) for name, rows, *_ in specs]
        planned = sum(shard_fast_bytes(slots, rows, 80, "cuda") for slots, rows in shards)
        assert module.tbe.rows.nbytes == pytest.approx(planned, abs=64)
        behind = sum(module.dram_slots.values()) * dram_row_bytes(68)
        assert budget * GIB - 80 < behind <= budget * GIB


def test_what_is_where_by_hand() -> None:
    assert (BYTES_PER_SLOT, DEVICE_BYTES_PER_SLOT) == (26, 19)
    assert (slot_bytes(100, "cuda"), slot_bytes(100), slot_bytes(100, "cpu")) == (119, 126, 126)
    assert (lookup_bytes("cuda"), lookup_bytes(), lookup_bytes("cpu")) == (20, 28, 28)
    assert shard_fast_bytes(10, 1000, 100, "cuda") == 11 * 119 + 4000
    assert shard_host_bytes(1001, 100) == 126
    # The least rows are there anyhow: 4096 of each table, or all.
    assert shard_host_bytes(1001, 100, "cuda") == shard_host_bytes(1001, 100, "cuda", 900) == 126 + 1001 * 112
    assert shard_host_bytes(80_000, 8, "cuda", 7) == 10_000 + 4096 * 16
    assert shard_host_bytes(80_000, 9, "cuda", 5000) == 10_000 + 5000 * 32
    assert shard_host_bytes(0, 8, "cuda") == shard_fast_bytes(0, 0, 8, "cuda") == 0


@pytest.mark.parametrize("wrong", [(5, 8, "cuda", 6), (5, 8, "cuda", -1), (-5, 8), (5, 8, "cpu", 1), (5, 8, "mtia", 1)])
def test_absurd_tiers(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(BudgetError):
        shard_host_bytes(*wrong)


@pytest.mark.parametrize("row_bytes", range(1, 40))
def test_rows_of_the_tier_are_as_wide_as_it_makes_them(row_bytes: int) -> None:
    assert dram_row_bytes(row_bytes) == dram_tier.dram_row_bytes(row_bytes)
    assert dram_row_bytes(row_bytes) % 16 == 0 and 8 <= dram_row_bytes(row_bytes) - row_bytes < 24


def test_limits_are_those_of_the_tier() -> None:
    assert (LEAST_DRAM_ROWS, MOST_DRAM_ROWS) == (dram_tier.LEAST_DRAM_ROWS, entries.DIRTY_IN_DRAM - 1)
    assert [most_slots(10**9, device) for device in ("cpu", "cuda")] == [10**9, entries.DIRTY_IN_DRAM - 1]
    assert most_slots(10**10) == 2**31 - 2 and most_slots(10, "cuda") == 10
    assert [most_dram_slots(*each) for each in ((0, 10**9), (7000, 10_000), (0, 9000), (90, 100), (100, 100))] == [
        MOST_DRAM_ROWS,
        4096,
        9000,
        100,
        100,
    ]


def test_a_budget_of_a_table_is_shared_by_its_shards() -> None:
    # Halves of a row in 48 and 16 bytes, headers included: 50,000 whole rows are in both.
    assert dram_slots_in(50_000 * 64, [(1000, 101_000, 40), (1000, 101_000, 8)]) == [50_000, 50_000]
    assert dram_slots_in(10**9, [(1000, 101_000, 40), (1000, 5000, 8)]) == [100_000, 4096]
    # As many of all rows without a slot, wherever they are; the least in any case.
    assert dram_slots_in(48 * 10_000, [(0, 60_000, 40), (0, 20_000, 40), (0, 0, 40)]) == [7500, 4096, 0]


def test_policies_that_keep_all_on_the_device_take_no_more_in_all() -> None:
    assert max(policy.bytes_per_slot for policy in POLICIES.values()) == BYTES_PER_SLOT - 13


def test_a_store_takes_what_its_settings_allow() -> None:
    options = RocksOptions()
    rest = 64 * MIB + PENDING_BYTES
    assert store_bytes(1, 1000, options) == 256 * MIB + rest + 3000
    assert store_bytes(2, 0, options) == store_bytes(500, 0, options) == 512 * MIB + rest
    assert store_bytes(1, 0, RocksOptions(write_buffer_bytes=MIB, block_cache_bytes=0), 7) == 4 * MIB + 7


def test_rows_on_their_way_are_counted_as_stores_bound_them() -> None:
    from torchrec_turbossd.sharding import rank_store

    assert rank_store._MOST_PENDING_BYTES == PENDING_BYTES
    assert inspect.signature(LayeredRowStore).parameters["max_pending_bytes"].default == PENDING_BYTES


class NoMemory(SlotMemory):
    def parts(self, table: int) -> list[torch.Tensor]:
        return []

    def read(self, table: int, slots: torch.Tensor) -> torch.Tensor:
        return torch.zeros(slots.numel(), 36, dtype=torch.uint8)

    def write(self, table: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        pass


def test_a_lookup_in_flight_takes_what_is_counted() -> None:
    spec = TableSpec(name="t", rows=1000, dim=8, state=(StateSpec(name="momentum1", per_row=True),))
    shard = TableShard.whole(spec)
    rows = CachedRows([shard], [500], [0], NoMemory(), MemoryRowStore({shard.key: 36}))
    count = 300
    batch = Batch(positions=torch.arange(count), runs=[Run(0, 0, count)])
    arrival = rows.choose(batch)
    rows.bring(arrival)
    fetched = rows.settle(arrival, pin=True)
    assert fetched.hold is not None
    tensors = (batch.positions, arrival.found, fetched.slots, fetched.hold)
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    assert sum(tensor.nbytes for tensor in tensors) == count * LOOKUP_BYTES
