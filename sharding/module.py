"""A sharded module whose plan may place tables on SSD: what bags and sequences share."""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.comm import get_local_rank
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.types import ParameterSharding

from torchrec_turbossd.errors import ClosedError, UnknownTableError, UnsupportedError
from torchrec_turbossd.metrics import TableReads
from torchrec_turbossd.planner.kernel import TURBO_SSD
from torchrec_turbossd.sharding.collective import everywhere
from torchrec_turbossd.sharding.kernel import (
    KernelOptions,
    TurboSSDKernel,
    group_optimizer,
    placeholder,
    table_shard,
    table_spec,
)
from torchrec_turbossd.sharding.local_tables import LocalTable, local_tables
from torchrec_turbossd.sharding.lookup import LookupContext, is_ours
from torchrec_turbossd.sharding.rank_store import RankStores, StoreOptions
from torchrec_turbossd.sharding.refusals import check_module
from torchrec_turbossd.sharding.state import consume_weights, load_weight, sharded_weight
from torchrec_turbossd.sharding.tier import tier_rows
from torchrec_turbossd.sharding.updates import RowUpdate, apply, route
from torchrec_turbossd.sizing import RECORDED_EVENTS, AccessSample
from torchrec_turbossd.sizing.memory import has_dram_tier
from torchrec_turbossd.tables import TableShard, TableSpec
from torchrec_turbossd.tbe.recording import of_whole_tables
from torchrec_turbossd.tbe.training_options import row_state


@dataclass(frozen=True, kw_only=True)
class TurboSSDOptions:
    """What a sharder passes to the modules it makes."""

    store: StoreOptions = field(default_factory=StoreOptions)
    kernel: KernelOptions = field(default_factory=KernelOptions)
    load_factor: float = 0.2
    dram_budget_gb: float | None = None


class TurboSSDShardedModule(nn.Module):
    """A sharded `EmbeddingBagCollection` or `EmbeddingCollection` with tables on SSD.

    Beyond TorchRec's module it has `streaming_update`, `flush`, `read_stats`, `record_access`, `access_samples`,
    `slots`, `dram_slots` and `close`.
    """

    _TABLES: str
    """Name of the `ModuleDict` that holds the tables."""

    _SHARDING_TYPES: tuple[str, ...]
    """How SSD-backed tables of such a module can be sharded."""

    _env: Any
    _device: torch.device | None
    _lookups: list[nn.Module]
    _sharding_types: list[str]
    _table_names: list[str]
    module_sharding_plan: Any

    def _prepare(self, options: TurboSSDOptions, module: nn.Module, configs: list[Any], stock: dict[str, Any]) -> None:
        """Comes before the stock constructor, which builds lookups and state."""
        plan: Mapping[str, ParameterSharding] = stock["table_name_to_parameter_sharding"]
        self._options = options
        self._stores: RankStores | None = None
        self._specs: dict[str, TableSpec] = {}
        self._ours = [c.name for c in configs if plan[c.name].compute_kernel == TURBO_SSD]
        check_module(
            [c for c in configs if c.name in self._ours],
            {name: getattr(module, self._TABLES)[name].weight for name in self._ours},
            {name: plan[name].sharding_type for name in self._ours},
            self._SHARDING_TYPES,
            stock["env"],
            stock.get("device"),
        )

    def _close_stores(self) -> None:
        if self._stores is not None:
            self._stores.close()

    @abstractmethod
    def _shardings(self) -> Iterable[Any]:
        """TorchRec's sharding objects, in the order of `_sharding_types`."""

    @abstractmethod
    def _make_lookup(self, sharding_type: str, sharding: Any, context: LookupContext) -> nn.Module:
        """The lookup of a sharding type that has tables on SSD."""

    def _groups(self, sharding: Any, rank: int | None = None) -> Iterator[GroupedEmbeddingConfig]:
        """Groups of one rank, or of all."""
        by_rank = sharding._grouped_embedding_configs_per_rank
        for groups in by_rank if rank is None else [by_rank[rank]]:
            yield from groups

    def _create_lookups(self) -> None:
        rank = self._env.rank
        on_gpu = self._device is not None and has_dram_tier(self._device.type)
        shards, tables = [], []
        for sharding in self._shardings():
            for group in filter(is_ours, self._groups(sharding, rank)):
                optimizer = group_optimizer(group)
                row_state(optimizer, self._device)
                for table in group.embedding_tables:
                    shard = table_shard(table, optimizer, self._options.kernel.seed)
                    shards.append((shard, self.module_sharding_plan[table.name].key_value_params))
                    tables.append((table, shard))
        ranks = (rank, get_local_rank(self._env.world_size))
        path = getattr(self, "_module_fqn", None) or ""
        self._stores = RankStores(self._options.store, path, ranks, shards, "cuda" if on_gpu else "cpu")
        context = LookupContext(
            plan=self.module_sharding_plan,
            store=self._stores.store,
            load_factor=self._options.load_factor,
            kernel=self._options.kernel,
        )
        if on_gpu:
            budget = self._options.dram_budget_gb
            needs = [context.tier_need(table, shard) for table, shard in tables]
            tier = tier_rows(needs, None if budget is None else int(budget * 2**30))
            context = dataclasses.replace(context, tier=tier)
        for sharding_type, sharding in zip(self._sharding_types, self._shardings(), strict=True):
            # A rank without a shard on SSD needs our lookup no less: all ranks must agree on the order of features.
            ours = any(map(is_ours, self._groups(sharding)))
            made = self._make_lookup(sharding_type, sharding, context) if ours else sharding.create_lookup()
            self._lookups.append(made)

    def _initialize_torch_state(self, *args: Any, **kwargs: Any) -> None:
        super()._initialize_torch_state(*args, **kwargs)  # type: ignore[misc]
        tables = getattr(self, self._TABLES)
        for name in self._ours:
            # Ranks without a shard of the table.
            if not hasattr(tables[name], "weight"):
                tables[name].register_parameter("weight", placeholder())
        if not (args[0] if args else kwargs.get("skip_registering", False)):
            self._register_state_dict_hook(_add_weights)
            self._register_load_state_dict_pre_hook(_take_weights, with_module=True)

    def _load_initial(self, module: nn.Module) -> None:
        """Rows of a module that already has weights go to the store."""
        for name in self._ours:
            weight = getattr(module, self._TABLES)[name].weight
            if weight.device.type != "meta":
                load_weight(name, weight.detach(), self._on_ssd())

    def _kernels(self) -> Iterator[TurboSSDKernel]:
        for lookup in self._lookups:
            for kernel in getattr(lookup, "_emb_modules", []):
                if isinstance(kernel, TurboSSDKernel):
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
            optimizer_state: by name ("momentum1"), [N] for a row-wise state or [N, dim]; kept when not given. A
                row-wise state goes to every column shard of its row.

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
        if not self._specs:
            groups = (group for sharding in self._shardings() for group in self._groups(sharding))
            self._specs = {
                found.name: table_spec(found, group_optimizer(group), self._options.kernel.seed)
                for group in groups
                for found in group.embedding_tables
            }
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
            kernel.emb_module.check_idle()
        for kernel in self._kernels():
            kernel.emb_module.forget()
        if self._stores is not None:
            self._stores.clear()

    def read_stats(self) -> dict[str, TableReads]:
        """Reads, hits and misses of this rank's shards since the start, by SSD-backed table.

        Each shard counts what it is asked for: a lookup of a table in two column shards is a read of both.
        """
        counted: dict[str, TableReads] = {}
        for kernel in self._kernels():
            for shard, reads in zip(kernel.emb_module.shards, kernel.emb_module.rows.counters.read_each(), strict=True):
                name = shard.table.name
                counted[name] = counted[name] + reads if name in counted else reads
        return counted

    def record_access(self, on: bool = True, *, events: int = RECORDED_EVENTS) -> None:
        """Record which rows of SSD-backed tables are asked for, from now on and with nothing from before, or stop and
        forget. Not collective, but to be called on every rank between the same two steps.

        `AccessProfile.from_cache(sharded)` makes profiles of what was recorded, to plan with. It costs a step some time
        and the host some MiB a table, both for as long as it is on.

        Args:
            events: lookups of a table that each window of its sample keeps; see `AccessSample`.
        """
        self._check_open()
        for kernel in self._kernels():
            recorder = kernel.emb_module.rows.recorder
            if on:
                recorder.start(events)
            else:
                recorder.stop()

    def access_samples(self) -> dict[str, AccessSample]:
        """What was recorded since `record_access()`, by SSD-backed table, of all ranks together: collective, and every
        rank gets all.

        Raises:
            ConfigError: nothing is being recorded.
            SnapshotError: so it was on another rank.
        """
        self._check_open()
        return of_whole_tables(itertools.chain.from_iterable(everywhere(self._env.process_group, self._recorded)))

    def _recorded(self) -> list[tuple[TableShard, AccessSample]]:
        return [found for kernel in self._kernels() for found in kernel.emb_module.rows.recorder.samples()]

    @property
    def slots(self) -> dict[str, int]:
        """Usable slots of this rank's shards, by SSD-backed table: the sum where a table has several shards here."""
        found: dict[str, int] = {}
        for kernel in self._kernels():
            for shard, count in zip(kernel.emb_module.shards, kernel.emb_module.rows.cache.slots, strict=True):
                found[shard.table.name] = found.get(shard.table.name, 0) + count
        return found

    @property
    def dram_slots(self) -> dict[str, int]:
        """Rows of this rank's shards that the DRAM tier of a GPU keeps besides those in slots, by SSD-backed table."""
        found: dict[str, int] = {}
        for kernel in self._kernels():
            for shard, count in zip(kernel.emb_module.shards, kernel.dram_slots, strict=True):
                found[shard.table.name] = found.get(shard.table.name, 0) + count
        return found

    @property
    def fast_bytes(self) -> int:
        """Bytes of fast memory that this rank's SSD-backed shards take: slots, slot maps and bookkeeping."""
        return sum(kernel.emb_module.rows.nbytes for kernel in self._kernels())

    def close(self) -> None:
        """Release the row stores. What was not saved is lost; further calls raise `ClosedError`."""
        for kernel in self._kernels():
            kernel.emb_module.close()
        self._close_stores()
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
        destination[f"{prefix}{module._TABLES}.{name}.weight"] = sharded_weight(
            module._spec(name), module.module_sharding_plan[name], local, module._env.process_group
        )


def _take_weights(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    consume_weights(state_dict, f"{prefix}{module._TABLES}.", module._ours, module._on_ssd())


__all__ = ["TurboSSDOptions", "TurboSSDShardedModule"]
