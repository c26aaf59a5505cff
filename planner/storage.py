"""What a shard on SSD takes: slots and slot map in fast memory, every row on SSD, and batches in flight beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
from torchrec_turbossd.sizing.memory import LOOKUP_BYTES, host_slot_bytes, shard_fast_bytes, shard_host_bytes
from torchrec_turbossd.store.rocks_options import RocksOptions
from torchrec_turbossd.tables import MAX_SLOTS


class TurboSSDStorageEstimator(ShardEstimator):
    """TorchRec's storage estimates; for tables on SSD, its input and output, and ours for the rest.

    A table on SSD gets the slots of its `load_factor` where the user set one, else the least that its batches need;
    they are left in `option.cache_params` as `TurboCacheParams`. Of each shard these count:

    - in fast memory, slots, slot map and bookkeeping (`shard_fast_bytes`), `LOOKUP_BYTES` for each lookup of the
      batches in flight, and TorchRec's input and output;
    - in host memory, which is the same on a CPU machine, what `shard_host_bytes` says, and the rows of one batch as
      they arrive from the store, as if none of its ids had been in a slot;
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
            slots = [min(math.ceil(factor * shard.size[0]), MAX_SLOTS) for shard in option.shards]
        sizes = [row_bytes(option.tensor, shard.size[1], fused_params) for shard in option.shards]
        for shard, count, size, floor in zip(option.shards, slots, sizes, floors, strict=True):
            rows, batches = shard.size[0], self._demand.batches_in_flight
            lookups = self._demand.lookups(option, shard) * batches
            fast = shard_fast_bytes(count, rows, size, self._device) + math.ceil(LOOKUP_BYTES * lookups)
            host = shard_host_bytes(count, rows, self._device) + -(-floor // batches) * size
            taken = _add(_add(shard.storage, self._fast, fast), "ddr", host)
            shard.storage = dataclasses.replace(taken, ssd=rows * size)
        set_slots(option, slots, sizes, self._access, load_factor=factor)


def _fused_params(option: ShardingOption, sharders: Mapping[str, Any]) -> Mapping[str, Any]:
    return getattr(sharders.get(option.module_type_key), "fused_params", None) or {}


def set_slots(
    option: ShardingOption, slots: list[int], sizes: list[int], access: Access, *, load_factor: float | None
) -> None:
    """Write slots, row bytes and predicted hit rates of an option's shards into its cache parameters.

    A `load_factor` marks them as fixed by the user.
    """
    rates = [access.hit_rate(option, shard, count) for shard, count in zip(option.shards, slots, strict=True)]
    given = option.cache_params
    stock = {f.name: getattr(given, f.name) for f in dataclasses.fields(CacheParams)} if given is not None else {}
    stock["load_factor"] = load_factor
    option.cache_params = TurboCacheParams(
        **stock,
        slots=tuple(slots),
        row_bytes=tuple(sizes),
        hit_rates=tuple(rates),
        fixed=load_factor is not None,
    )


def store_options(options: RocksOptions, given: KeyValueParams | None) -> RocksOptions:
    """The settings of a store with what one of its tables asks for: of each the largest counts."""
    if given is None:
        return options
    return dataclasses.replace(
        options,
        block_cache_bytes=max(options.block_cache_bytes, (given.l2_cache_size or 0) << 30),
        write_buffer_bytes=max(options.write_buffer_bytes, given.ssd_rocksdb_write_buffer_size or 0),
    )


def add_slots(storage: Storage, compute_device: str, extra_bytes: int, slots: int = 0) -> Storage:
    """`storage` with `extra_bytes` more of fast memory, and what `slots` more slots take of the host's beside it."""
    grown = _add(storage, fast_memory(compute_device), extra_bytes)
    return _add(grown, "ddr", slots * host_slot_bytes(compute_device))


def _add(storage: Storage, memory: str, extra_bytes: int) -> Storage:
    return dataclasses.replace(storage, **{memory: getattr(storage, memory) + extra_bytes})


def _load_factor(option: ShardingOption, fused_params: Mapping[str, Any]) -> float | None:
    """The user's, of the table, else of its sharder."""
    factor = option.cache_params.load_factor if option.cache_params is not None else None
    return check_load_factor(option.name, factor if factor is not None else fused_params.get("cache_load_factor"))


__all__ = ["TurboSSDStorageEstimator", "add_slots", "set_slots", "store_options"]
