"""What the arithmetic of memory says of the host and of a device, against the arrays that a cache really holds."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from torchrec_turbossd.cache import POLICIES, SlotCache
from torchrec_turbossd.errors import BudgetError
from torchrec_turbossd.sizing.memory import (
    BYTES_PER_SLOT,
    DEVICE_BYTES_PER_SLOT,
    HOST_BYTES_PER_SLOT,
    LOOKUP_BYTES,
    PENDING_BYTES,
    host_slot_bytes,
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

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
MIB = 1 << 20


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


@DEVICES
def test_bookkeeping_is_where_it_is_counted(device: str) -> None:
    rows, slots = 9_000, 2_000
    cache = SlotCache([rows], [slots], device=torch.device(device))
    memory = [(where, size) for where, size in held(cache, {}).values() if size > 64]
    on_device = sum(size for where, size in memory if where == device)
    assert on_device == shard_fast_bytes(slots, rows, 0, "cuda")
    # The rest is numpy's, on any device.
    bits = -(-rows // 8)
    assert sum(size for where, size in memory if where == "host") == shard_host_bytes(slots, rows, "cuda") - bits
    assert sum(size for _, size in memory) == shard_fast_bytes(slots, rows, 0)
    assert cache.nbytes == shard_fast_bytes(slots, rows, 0, device)


def test_what_is_on_the_host_by_hand() -> None:
    assert (DEVICE_BYTES_PER_SLOT, HOST_BYTES_PER_SLOT, BYTES_PER_SLOT) == (14, 12, 26)
    assert (slot_bytes(100, "cuda"), host_slot_bytes("cuda")) == (114, 12)
    assert (slot_bytes(100), slot_bytes(100, "cpu"), host_slot_bytes("cpu")) == (126, 126, 0)
    assert shard_fast_bytes(10, 1000, 100, "cuda") == 11 * 114 + 4000
    assert shard_host_bytes(10, 1001, "cuda") == 11 * 12 + 126
    assert shard_host_bytes(10, 1001) == 126
    assert shard_host_bytes(0, 0, "cuda") == shard_fast_bytes(0, 0, 8, "cuda") == 0
    with pytest.raises(BudgetError):
        shard_host_bytes(6, 5)


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
    def read(self, table: int, slots: torch.Tensor) -> torch.Tensor:
        return torch.zeros(slots.numel(), 36, dtype=torch.uint8)

    def write(self, table: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        pass


def test_a_lookup_in_flight_takes_what_is_counted() -> None:
    spec = TableSpec(name="t", rows=1000, dim=8, state=(StateSpec(name="momentum1", per_row=True),))
    shard = TableShard.whole(spec)
    rows = CachedRows([shard], [500], [0], NoMemory(), MemoryRowStore({shard.key: 36}), device=torch.device("cpu"))
    count = 300
    batch = Batch(positions=torch.arange(count), runs=[Run(0, 0, count)])
    arrival = rows.choose(batch)
    rows.bring(arrival)
    fetched = rows.settle(arrival, pin=True)
    assert fetched.at is not None
    tensors = (batch.positions, arrival.found, fetched.slots, fetched.at)
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    assert sum(tensor.nbytes for tensor in tensors) == count * LOOKUP_BYTES
