"""What a shard on SSD takes: slots and slot map in fast memory, every row on SSD, and batches in flight beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)
from torchrec.distributed.types import CacheParams, KeyValueParams

from torchrec_turbossd.planner.access import Access
from torchrec_turbossd.planner.demand import ROW_STATE, Demand, check_load_factor, row_bytes
from torchrec_turbossd.planner.kernel import KEY_VALUE, TURBO_SSD, TurboCacheParams, fast_memory
from torchrec_turbossd.sizing.memory import (
    dram_slots_in,
    has_dram_tier,
    lookup_bytes,
    most_slots,
    shard_fast_bytes,
    shard_host_bytes,
)
from torchrec_turbossd.store.rocks_options import RocksOptions


class TurboSSDStorageEstimator(ShardEstimator):
    """TorchRec's storage estimates; for tables on SSD, its input and output, and ours for the rest.

    A table on SSD gets the slots of its `load_factor` where the user set one, else the least that its batches need;
    they are left in `option.cache_params` as `TurboCacheParams`. Of each shard these count:

    - in fast memory, slots, slot map and bookkeeping (`shard_fast_bytes`), `lookup_bytes` for each lookup of the
      batches in flight, and TorchRec's input and output;
    - in host memory, which is the same on a CPU machine, what `shard_host_bytes` says, and the rows of one batch as
      they arrive from the store, as if none of its ids had been in a slot; on a GPU the table's DRAM tier is among
      it, of its `KeyValueParams.l2_cache_size`, as if the shard were the table's only one on its rank;
    - on SSD, every row.

    Not counted, because they are a rank's and not a shard's: the row store itself (`store_bytes`), and two more copies
    of the arriving rows of one table at a time, in fast memory. A batch that does not fit in the slots has copies of
    its rows in fast memory until its backward has ended.

    Args:
        topology: says which memory is fast.
        constraints: the user's.
        demand: lookups and floors.
        access: hit-rate curves.
    """

    def __init__(
        self,
        topology: Topology,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        *,
        demand: Demand,
        access: Access,
    ) -> None:
        self._device, self._fast = topology.compute_device, fast_memory(topology.compute_device)
        self._demand, self._access = demand, access
        given = dict(constraints or {})
        self._stock = EmbeddingStorageEstimator(topology=topology, constraints=given)
        # The sizes of a key-value table's own cache would be counted as if ours had it too; versions differ in whether
        # they read them from the constraints or from the option.
        bare = {
            name: dataclasses.replace(one, key_value_params=None, use_virtual_table=False)
            for name, one in given.items()
        }
        self._io = EmbeddingStorageEstimator(topology=topology, constraints=bare)

    def estimate(self, sharding_options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """Set `shard.storage` of every option. TorchRec's versions differ in what else they pass: sharders or a
        summary of them, by module type; only their `fused_params` are read."""
        ours = [option for option in sharding_options if option.compute_kernel == TURBO_SSD]
        others = [option for option in sharding_options if option.compute_kernel != TURBO_SSD]
        sharders: Mapping[str, Any] = (*args, *kwargs.values(), {})[0] or {}
        if others:
            self._stock.estimate(others, *args, **kwargs)
            for option in others:
                self._add_state(option, _fused_params(option, sharders))
        if not ours:
            return
        self._estimate_io(ours, *args, **kwargs)
        for option in ours:
            self._place(option, _fused_params(option, sharders))

    def _add_state(self, option: ShardingOption, fused_params: Mapping[str, Any]) -> None:
        """Count the optimizer state of a resident table, which TorchRec's formula does only where the optimizer was
        applied to the parameter, not where the sharder's `fused_params` name it."""
        resident = option.compute_kernel == EmbeddingComputeKernel.FUSED.value
        if not resident or hasattr(option.tensor, "_optimizer_classes"):
            return
        state = ROW_STATE.get(fused_params.get("optimizer", EmbOptimType.EXACT_SGD), ())
        for shard in option.shards:
            rows, cols = shard.size
            extra = rows * sum(spec.row_bytes(cols) for spec in state)
            if shard.storage is not None:
                shard.storage = _add(shard.storage, self._fast, extra)

    def _estimate_io(self, options: list[ShardingOption], *args: Any, **kwargs: Any) -> None:
        """TorchRec's formula for a key-value table without a cache of its own leaves input and output alone."""
        kept = [(option.cache_params, option.key_value_params) for option in options]
        for option in options:
            option.compute_kernel = KEY_VALUE
            option.cache_params = option.key_value_params = None
        try:
            self._io.estimate(options, *args, **kwargs)
        finally:
            for option, (cache, key_value) in zip(options, kept, strict=True):
                option.compute_kernel, option.cache_params, option.key_value_params = TURBO_SSD, cache, key_value

    def _place(self, option: ShardingOption, fused_params: Mapping[str, Any]) -> None:
        factor = _load_factor(option, fused_params)
        floors = [self._demand.floor(option, shard) if shard.size[0] else 0 for shard in option.shards]
        slots = floors
        if factor is not None:
            slots = [most_slots(math.ceil(factor * shard.size[0]), self._device) for shard in option.shards]
        sizes = [row_bytes(option.tensor, shard.size[1], fused_params) for shard in option.shards]
        tier = self._tier(option, slots, sizes)
        every = zip(option.shards, slots, sizes, floors, tier or [0] * len(slots), strict=True)
        for shard, count, size, floor, behind in every:
            rows, batches = shard.size[0], self._demand.batches_in_flight
            lookups = self._demand.lookups(option, shard) * batches
            in_flight = math.ceil(lookup_bytes(self._device) * lookups)
            fast = shard_fast_bytes(count, rows, size, self._device) + in_flight
            host = shard_host_bytes(rows, size, self._device, behind) + -(-floor // batches) * size
            taken = _add(_add(shard.storage, self._fast, fast), "ddr", host)
            shard.storage = dataclasses.replace(taken, ssd=rows * size)
        set_slots(option, slots, sizes, self._access, load_factor=factor, dram_slots=tier)

    def _tier(self, option: ShardingOption, slots: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Rows of each shard in the DRAM tier that the user gave its table; none where there is no such tier."""
        if not has_dram_tier(self._device):
            return []
        size = l2_cache_bytes(option.key_value_params)
        if not size:
            return [0] * len(slots)
        every = zip(slots, (int(shard.size[0]) for shard in option.shards), sizes, strict=True)
        return [dram_slots_in(size, [shard])[0] for shard in every]


def _fused_params(option: ShardingOption, sharders: Mapping[str, Any]) -> Mapping[str, Any]:
    return getattr(sharders.get(option.module_type_key), "fused_params", None) or {}


def set_slots(
    option: ShardingOption,
    slots: list[int],
    sizes: list[int],
    access: Access,
    *,
    load_factor: float | None,
    dram_slots: list[int],
) -> None:
    """Write slots, row bytes, rows in the DRAM tier and predicted hit rates of an option's shards into its cache
    parameters.

    A `load_factor` marks the slots as fixed by the user; `dram_slots` is empty where there is no such tier.
    """
    rates = [access.hit_rate(option, shard, count) for shard, count in zip(option.shards, slots, strict=True)]
    behind = [
        max(0.0, access.hit_rate(option, shard, count + more) - rate) if more else 0.0
        for shard, count, rate, more in zip(option.shards, slots, rates, dram_slots, strict=False)
    ]
    given = option.cache_params
    stock = {f.name: getattr(given, f.name) for f in dataclasses.fields(CacheParams)} if given is not None else {}
    stock["load_factor"] = load_factor
    option.cache_params = TurboCacheParams(
        **stock,
        slots=tuple(slots),
        row_bytes=tuple(sizes),
        hit_rates=tuple(rates),
        fixed=load_factor is not None,
        dram_slots=tuple(dram_slots),
        dram_hit_rates=tuple(behind),
    )


def l2_cache_bytes(given: KeyValueParams | None) -> int | None:
    """Bytes of host memory on each rank that the user gave a table, for its DRAM tier on a GPU or its store's block
    cache on a CPU machine; None where he did not say."""
    if given is None or given.l2_cache_size is None:
        return None
    return int(given.l2_cache_size) << 30


def store_options(options: RocksOptions, given: KeyValueParams | None, compute_device: str = "cpu") -> RocksOptions:
    """The settings of a store with what one of its tables asks for: of each the largest counts."""
    if given is None:
        return options
    cache = 0 if has_dram_tier(compute_device) else l2_cache_bytes(given) or 0
    return dataclasses.replace(
        options,
        block_cache_bytes=max(options.block_cache_bytes, cache),
        write_buffer_bytes=max(options.write_buffer_bytes, given.ssd_rocksdb_write_buffer_size or 0),
    )


def add_bytes(storage: Storage, compute_device: str, fast: int, host: int) -> Storage:
    """`storage` with so many bytes more of fast memory, and of the host's beside it."""
    return _add(_add(storage, fast_memory(compute_device), fast), "ddr", host)


def _add(storage: Storage, memory: str, extra_bytes: int) -> Storage:
    return dataclasses.replace(storage, **{memory: getattr(storage, memory) + extra_bytes})


def _load_factor(option: ShardingOption, fused_params: Mapping[str, Any]) -> float | None:
    """The user's, of the table, else of its sharder."""
    factor = option.cache_params.load_factor if option.cache_params is not None else None
    return check_load_factor(option.name, factor if factor is not None else fused_params.get("cache_load_factor"))


__all__ = ["TurboSSDStorageEstimator", "add_bytes", "l2_cache_bytes", "set_slots", "store_options"]
