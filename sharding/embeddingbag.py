"""`EmbeddingBagCollection` with tables on SSD: the sharded module, and the sharder that makes it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.comm import get_local_rank
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_turbossd.cache import DEFAULT_POLICY
from torchrec_turbossd.errors import ClosedError, ConfigError, UnknownTableError, UnsupportedError
from torchrec_turbossd.metrics import TableReads
from torchrec_turbossd.planner.kernel import TURBO_SSD
from torchrec_turbossd.sharding.kernel import (
    KernelOptions,
    TurboSSDEmbeddingBag,
    group_optimizer,
    placeholder,
    table_shard,
    table_spec,
)
from torchrec_turbossd.sharding.local_tables import LocalTable, local_tables
from torchrec_turbossd.sharding.lookup import LookupContext, TurboSSDPooledLookup, is_ours
from torchrec_turbossd.sharding.rank_store import RankStores, StoreOptions
from torchrec_turbossd.sharding.state import consume_weights, load_weight, sharded_weight
from torchrec_turbossd.sharding.updates import RowUpdate, apply, route
from torchrec_turbossd.tables import TableSpec
from torchrec_turbossd.tbe.training_options import row_state

SHARDING_TYPES = (ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value)
"""How SSD-backed tables can be sharded."""

# MEAN pooling is a SUM in a row shard, divided after the shards are added up; the stock lookup is told by this.
_ROW_SHARDED = {ShardingType.ROW_WISE.value: ShardingType.ROW_WISE}


@dataclass(frozen=True, kw_only=True)
class TurboSSDOptions:
    """What a sharder passes to the modules it makes."""

    store: StoreOptions = field(default_factory=StoreOptions)
    kernel: KernelOptions = field(default_factory=KernelOptions)
    load_factor: float = 0.2


class TurboSSDShardedEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """A sharded `EmbeddingBagCollection` whose plan may place tables on SSD.

    Made by `TurboSSDEmbeddingBagCollectionSharder`. Beyond TorchRec's module it has `streaming_update`, `flush`,
    `read_stats` and `close`.
    """

    def __init__(self, options: TurboSSDOptions, module: EmbeddingBagCollection, **stock: Any) -> None:
        plan: Mapping[str, ParameterSharding] = stock["table_name_to_parameter_sharding"]
        # Set first: the stock constructor builds lookups and state.
        self._options = options
        self._stores: RankStores | None = None
        self._ours = [c.name for c in module.embedding_bag_configs() if plan[c.name].compute_kernel == TURBO_SSD]
        _refuse(module, plan, self._ours, stock["env"])
        self._specs: dict[str, TableSpec] = {}
        try:
            super().__init__(module=module, **stock)
            self._load_initial(module)
        except BaseException:
            if self._stores is not None:
                self._stores.close()
            raise

    def _create_lookups(self) -> None:
        shards = []
        rank = self._env.rank
        for sharding in self._embedding_shardings:
            for group in getattr(sharding, "_grouped_embedding_configs_per_rank", [[]] * (rank + 1))[rank]:
                if not is_ours(group):
                    continue
                row_state(group_optimizer(group))
                for table in group.embedding_tables:
                    key_value = self.module_sharding_plan[table.name].key_value_params
                    own = key_value.ssd_storage_directory if key_value is not None else None
                    shard = table_shard(table, group_optimizer(group), self._options.kernel.seed)
                    shards.append((shard, own))
        ranks = (rank, get_local_rank(self._env.world_size))
        self._stores = RankStores(self._options.store, self._module_fqn or "", ranks, shards)
        context = LookupContext(
            plan=self.module_sharding_plan,
            store=self._stores.store,
            load_factor=self._options.load_factor,
            kernel=self._options.kernel,
        )
        for sharding_type, sharding in zip(self._sharding_types, self._embedding_shardings, strict=True):
            self._lookups.append(self._lookup(sharding_type, sharding, context))

    def _lookup(self, sharding_type: str, sharding: Any, context: LookupContext) -> nn.Module:
        infos = self.sharding_type_to_sharding_infos[sharding_type]
        if not any(info.embedding_config.name in self._ours for info in infos):
            stock: nn.Module = sharding.create_lookup()
            return stock
        return TurboSSDPooledLookup(
            context,
            grouped_configs=sharding._grouped_embedding_configs_per_rank[sharding._rank],
            device=sharding._device,
            pg=sharding._pg,
            sharding_type=_ROW_SHARDED.get(sharding_type),
            env=sharding._env,
        )

    def _initialize_torch_state(self, *args: Any, **kwargs: Any) -> None:
        super()._initialize_torch_state(*args, **kwargs)
        for name in self._ours:
            # Ranks without a shard of the table.
            if not hasattr(self.embedding_bags[name], "weight"):
                self.embedding_bags[name].register_parameter("weight", placeholder())
        if not (args[0] if args else kwargs.get("skip_registering", False)):
            self._register_state_dict_hook(_add_weights)
            self._register_load_state_dict_pre_hook(_take_weights, with_module=True)

    def reset_parameters(self) -> None:
        """Initialise stock tables; rows of SSD-backed ones start from their rule."""
        every = self._embedding_bag_configs  # type: ignore[has-type]
        try:
            self._embedding_bag_configs = [c for c in every if c.name not in self._ours]
            super().reset_parameters()
        finally:
            self._embedding_bag_configs = every

    def _load_initial(self, module: EmbeddingBagCollection) -> None:
        """Rows of a module that already has weights go to the store."""
        for name in self._ours:
            weight = module.embedding_bags[name].weight
            if weight.device.type != "meta":
                load_weight(name, weight.detach(), self._on_ssd())

    def _kernels(self) -> Iterable[TurboSSDEmbeddingBag]:
        for lookup in self._lookups:
            for kernel in getattr(lookup, "_emb_modules", []):
                if isinstance(kernel, TurboSSDEmbeddingBag):
                    yield kernel

    def _local(self, names: Iterable[str] | None = None) -> list[LocalTable]:
        """This rank's shards, of all tables or of those named."""
        wanted = list(self._table_names if names is None else names)
        return local_tables(self._lookups, self._options.kernel.seed, wanted)

    def _on_ssd(self) -> list[LocalTable]:
        return self._local(self._ours)

    def streaming_update(
        self,
        indices: Tensor,
        weights: Tensor,
        table: str,
        *,
        optimizer_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Overwrite rows of a table, wherever its shards are. Collective: every rank calls it, between steps.

        Args:
            indices: [N] int32 or int64 global row ids of this rank's part, which may be empty. Of duplicates the
                last wins; among ranks, the highest.
            weights: [N, dim] floating.
            table: the table's name, of any kernel but data-parallel.
            optimizer_state: by name ("momentum1"), [N] for a row-wise state or [N, dim]; kept when not given.

        Raises:
            UnknownTableError: no such table here. InputError, RowIndexError: rows of this or another rank that cannot
                be applied; then no rank has changed anything.
        """
        self._check_open()
        if table not in self.module_sharding_plan:
            raise UnknownTableError(f"no table {table!r}; the tables are {', '.join(map(repr, self._table_names))}")
        sharding = self.module_sharding_plan[table]
        if sharding.sharding_spec is None:
            raise UnsupportedError(f"table {table!r} is data-parallel; update its parameter instead")
        local: list[LocalTable] = []
        update = RowUpdate(table=self._spec(table), ids=indices, weights=weights, state=dict(optimizer_state or {}))
        shards = sharding.sharding_spec.shards
        parts: list[tuple[Tensor, Tensor]] | None = None
        refused: Exception | None = None
        try:
            local = self._local([table])
            for target in local:
                # Which ids come from other ranks is not known yet, so any batch outside the slots is in the way.
                target.check_idle()
            parts = update.parts(shards)
        except Exception as error:
            refused = error
        widths = [sum(1 if s.per_row else m.shard_sizes[1] for s in update.table.state) for m in shards]
        device = self._device or torch.device("cpu")
        try:
            routed = route(parts, bool(update.state), widths, shards, self._env.process_group, device)
        except Exception as error:
            raise (refused or error) from None
        for place, (ids, values, with_state) in routed.items():
            target = next(t for t in local if list(t.metadata.shard_offsets) == list(shards[place].shard_offsets))
            apply(target, ids, values, with_state)

    def _spec(self, table: str) -> TableSpec:
        """A table's description, also on ranks without a shard of it."""
        if table not in self._specs:
            infos = [i for group in self.sharding_type_to_sharding_infos.values() for i in group]
            info = next(i for i in infos if i.embedding_config.name == table)
            self._specs[table] = _spec_of(info, self._options.kernel.seed)
        return self._specs[table]

    def flush(self) -> None:
        """Write rows that training changed to SSD; durable when it returns."""
        self._check_open()
        for kernel in self._kernels():
            kernel.flush()

    def forget(self) -> None:
        """Bring every SSD-backed row back to its rule, and its optimizer state to zero.

        Raises `CacheFullError` when a batch is in flight.
        """
        self._check_open()
        for kernel in self._kernels():
            kernel.emb_module.forget()
        if self._stores is not None:
            self._stores.clear()

    def read_stats(self) -> dict[str, TableReads]:
        """Reads, hits and misses of this rank's shards since the start, by SSD-backed table."""
        return {
            name: reads for kernel in self._kernels() for name, reads in kernel.emb_module.rows.counters.read().items()
        }

    @property
    def slots(self) -> dict[str, int]:
        """Usable slots of this rank's shards, by SSD-backed table."""
        return {
            shard.table.name: count
            for kernel in self._kernels()
            for shard, count in zip(kernel.emb_module.shards, kernel.emb_module.rows.cache.slots, strict=True)
        }

    @property
    def fast_bytes(self) -> int:
        """Bytes of fast memory that this rank's SSD-backed shards take: slots, slot maps and bookkeeping."""
        return sum(kernel.emb_module.rows.nbytes for kernel in self._kernels())

    def close(self) -> None:
        """Release the row stores. What was not saved is lost; further calls raise `ClosedError`."""
        for kernel in self._kernels():
            kernel.emb_module.close()
        if self._stores is not None:
            self._stores.close()
        self._stores = None

    def _check_open(self) -> None:
        if self._stores is None:
            raise ClosedError("this sharded module is closed; shard the model again")

    def update_shards(self, *args: Any, **kwargs: Any) -> None:
        """Refused: SSD-backed tables do not move between ranks in place."""
        raise UnsupportedError("resharding in place is not supported with tables on SSD; save, then shard anew")


def _add_weights(module: Any, destination: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    local = module._on_ssd()
    for name in module._ours:
        destination[f"{prefix}embedding_bags.{name}.weight"] = sharded_weight(
            module._spec(name), module.module_sharding_plan[name], local, module._env.process_group
        )


def _take_weights(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    consume_weights(state_dict, f"{prefix}embedding_bags.", module._ours, module._on_ssd())


def _spec_of(info: Any, seed: int) -> TableSpec:
    return table_spec(info.embedding_config, (info.fused_params or {}).get("optimizer"), seed)


def _refuse(
    module: EmbeddingBagCollection, plan: Mapping[str, ParameterSharding], ours: list[str], env: ShardingEnv
) -> None:
    """Raise for what would be silently wrong."""
    if ours and type(env).__name__ != "ShardingEnv":
        raise UnsupportedError(f"{type(env).__name__} is not supported with tables on SSD; use a plain ShardingEnv")
    if ours and getattr(env, "output_dtensor", False):
        raise UnsupportedError("DTensor state is not supported with tables on SSD; leave output_dtensor off")
    for config in module.embedding_bag_configs():
        if config.name not in ours:
            continue
        if plan[config.name].sharding_type not in SHARDING_TYPES:
            raise UnsupportedError(
                f"table {config.name!r}: sharding type {plan[config.name].sharding_type} is not supported on SSD; use "
                f"{' or '.join(SHARDING_TYPES)}"
            )
        if getattr(config, "use_virtual_table", False):
            raise UnsupportedError(f"table {config.name!r}: virtual tables are not supported on SSD")
        own_init = config.init_fn is not None and not _is_default_init(config)
        if own_init and module.embedding_bags[config.name].weight.device.type == "meta":
            raise UnsupportedError(
                f"table {config.name!r}: init_fn is not supported on SSD; set weight_init_min and weight_init_max, or "
                "build the module off the meta device, whose weights are then loaded"
            )


def _is_default_init(config: Any) -> bool:
    init_fn, bounds = config.init_fn, {"a": config.get_weight_init_min(), "b": config.get_weight_init_max()}
    uniform = isinstance(init_fn, functools.partial) and init_fn.func is torch.nn.init.uniform_
    return uniform and init_fn.keywords == bounds


class TurboSSDEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards `EmbeddingBagCollection`s, tables on SSD among them.

    Args:
        ssd_directory: base directory of the live rows, on a local SSD. Each rank and module takes a sub-directory of
            its own, which is emptied when it is opened: what is to be kept is saved as a snapshot. A table's
            `KeyValueParams.ssd_storage_directory` comes before it; `@local_rank` in either becomes the local rank.
        fused_params: as for TorchRec's sharder; `optimizer` is EXACT_SGD (also when none is given),
            EXACT_ROWWISE_ADAGRAD or EXACT_ADAGRAD for tables on SSD.
        load_factor: share of a shard's rows that get slots when the plan says nothing.
        seed: of rows never written. policy: an eviction policy by name. read_threads: for each store.
    """

    def __init__(
        self,
        ssd_directory: str | os.PathLike[str] | None = None,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: Any = None,
        *,
        load_factor: float = 0.2,
        seed: int = 0,
        policy: str = DEFAULT_POLICY,
        read_threads: int = 2,
    ) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry)
        if not 0.0 < load_factor <= 1.0:
            raise ConfigError(f"load_factor must be in (0, 1], got {load_factor}")
        self._turbo_options = TurboSSDOptions(
            store=StoreOptions(ssd_directory=ssd_directory, read_threads=read_threads),
            kernel=KernelOptions(seed=seed, policy=policy),
            load_factor=load_factor,
        )

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> TurboSSDShardedEmbeddingBagCollection:
        """Shard one module on this rank; the interface of TorchRec's sharders."""
        return TurboSSDShardedEmbeddingBagCollection(
            self._turbo_options,
            module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )

    @property
    def sharded_module_type(self) -> type[TurboSSDShardedEmbeddingBagCollection]:
        return TurboSSDShardedEmbeddingBagCollection

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Table-wise and row-wise, on SSD or not, and what TorchRec offers on this device."""
        stock = super().sharding_types(compute_device_type)
        return list(dict.fromkeys([*SHARDING_TYPES, *stock]))

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """TorchRec's resident kernels, and ours for the sharding types that it supports."""
        stock: list[str] = super().compute_kernels(sharding_type, compute_device_type)
        # UVM kernels would park tables in host memory before the planner ever tried SSD.
        resident = [kernel for kernel in stock if "uvm" not in kernel and not kernel.startswith("key_value")]
        return [*resident, TURBO_SSD] if sharding_type in SHARDING_TYPES else resident


__all__ = [
    "SHARDING_TYPES",
    "TurboSSDEmbeddingBagCollectionSharder",
    "TurboSSDOptions",
    "TurboSSDShardedEmbeddingBagCollection",
]
