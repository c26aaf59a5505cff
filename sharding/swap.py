"""The swap pass: tables of a plan, or of a model that is sharded already, onto SSD."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import CacheParams, ParameterSharding, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_turbossd.errors import ConfigError, UnknownTableError, UnsupportedError
from torchrec_turbossd.planner.kernel import KEY_VALUE, TURBO_SSD
from torchrec_turbossd.sharding.embedding import TurboSSDEmbeddingCollectionSharder
from torchrec_turbossd.sharding.embeddingbag import SHARDING_TYPES, TurboSSDEmbeddingBagCollectionSharder
from torchrec_turbossd.sharding.local_tables import in_windows, local_tables
from torchrec_turbossd.sharding.module import TurboSSDShardedModule
from torchrec_turbossd.sharding.progress import fused_kernels, optimizer_progress, restore_progress, saved_progress

_WINDOW_ROWS = 65536
_OPTIONS = ("dram_budget_gb", "policy", "read_threads", "seed")
_ModulePlan = dict[str, ParameterSharding]


@dataclass(frozen=True, kw_only=True)
class SwappedTable:
    """A table whose kernel is now this package's.

    module: path in the model. was: its compute kernel before. shards: how many it has on all ranks.
    """

    module: str
    table: str
    was: str
    sharding_type: str
    shards: int


def swap_to_turbo_ssd(
    target: ShardingPlan | DistributedModelParallel,
    tables: Collection[str] | None = None,
    *,
    load_factor: float | None = None,
    ssd_directory: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[SwappedTable]:
    """Put tables on SSD in a plan, or in a model that `DistributedModelParallel` has sharded; in place.

    A plan is swapped before the model is sharded with it. A model keeps its numbers: rows, optimizer state, step count
    and learning rate of the swapped modules are carried over, and training goes on as it would have; every rank calls
    this, between steps. While rows are carried over both forms of a module are in memory. Optimizers and pipelines
    that were made from the model before are to be made anew, and hooks on the swapped modules registered anew.

    Args:
        tables: names of tables; None: those whose kernel is KEY_VALUE.
        load_factor: share of a shard's rows that get slots, for tables whose plan has no `cache_params`.
        ssd_directory, options: for a model; `seed`, `policy`, `read_threads` and `dram_budget_gb` are those of
            `TurboSSDSharder`.

    Returns:
        What was swapped, in the order of the plan; not tables that were on SSD before.

    Raises:
        UnknownTableError: no such table. ConfigError: no tables are named, and none says KEY_VALUE or is on SSD.
        UnsupportedError: data-parallel tables, or modules that cannot be swapped. On all of these nothing has changed.
    """
    model = target if isinstance(target, DistributedModelParallel) else None
    if model is None and (ssd_directory is not None or options):
        given = sorted([*options, *(["ssd_directory"] if ssd_directory is not None else [])])
        raise ConfigError(f"{', '.join(given)}: for a model; with a plan, give them to the sharder")
    if load_factor is not None and not 0.0 < load_factor <= 1.0:
        raise ConfigError(f"load_factor must be in (0, 1], got {load_factor}")
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: not among the options of a swap, {', '.join(_OPTIONS)}; optimizers and their "
            "arguments are those that the model has"
        )
    plan = model.plan if model is not None else target
    wanted = _wanted(plan, tables)
    swapped = [_described(path, name, plan.plan[path][name]) for path, name in wanted]
    new_plans: dict[str, _ModulePlan] = {}
    for path, name in wanted:
        module_plan = new_plans.setdefault(path, dict(plan.plan[path]))
        module_plan[name] = _on_ssd(module_plan[name], load_factor)
    if model is not None:
        sharder_options = {"ssd_directory": ssd_directory, **options}
        _swap_modules(model, new_plans, sharder_options)
    for path, module_plan in new_plans.items():
        _update(plan.plan[path], module_plan)
    return swapped


def _wanted(plan: Any, tables: Collection[str] | None) -> list[tuple[str, str]]:
    everything = [(path, name, s) for path, module_plan in plan.plan.items() for name, s in module_plan.items()]
    names = [name for _, name, _ in everything]
    if isinstance(tables, str):
        raise ConfigError(f"tables must be a collection of names, got the string {tables!r}; give [{tables!r}]")
    if tables is None:
        found = [(path, name) for path, name, s in everything if s.compute_kernel == KEY_VALUE]
        if not found and not any(s.compute_kernel == TURBO_SSD for _, _, s in everything):
            raise ConfigError(
                f"no table of the plan has kernel {KEY_VALUE}; name the tables to swap, out of "
                f"{', '.join(map(repr, names))}"
            )
    else:
        unknown = sorted(set(tables) - set(names))
        if unknown:
            raise UnknownTableError(
                f"no table {', '.join(map(repr, unknown))}; the tables are {', '.join(map(repr, names))}"
            )
        found = [(path, name) for path, name, _ in everything if name in tables]
    for path, name in found:
        kind = plan.plan[path][name].sharding_type
        if kind not in SHARDING_TYPES:
            raise UnsupportedError(
                f"table {name!r}: sharding type {kind} is not supported on SSD; plan it as one of "
                f"{', '.join(SHARDING_TYPES)}"
            )
    return [(path, name) for path, name in found if plan.plan[path][name].compute_kernel != TURBO_SSD]


def _described(path: str, name: str, sharding: ParameterSharding) -> SwappedTable:
    spec: Any = sharding.sharding_spec
    return SwappedTable(
        module=path,
        table=name,
        was=sharding.compute_kernel,
        sharding_type=sharding.sharding_type,
        shards=len(spec.shards),
    )


def _on_ssd(sharding: ParameterSharding, load_factor: float | None) -> ParameterSharding:
    cache = sharding.cache_params
    if cache is None and load_factor is not None:
        cache = CacheParams(load_factor=load_factor)
    return dataclasses.replace(sharding, compute_kernel=TURBO_SSD, cache_params=cache)


def _update(module_plan: Any, new: Mapping[str, ParameterSharding]) -> None:
    for name, sharding in new.items():
        module_plan[name] = sharding


def _swap_modules(model: DistributedModelParallel, plans: Mapping[str, _ModulePlan], options: dict[str, Any]) -> None:
    root = model.module
    modules = {path: root.get_submodule(path) for path in plans}
    for path, module in modules.items():
        _check(path, module)
        places = [name for name, found in root.named_modules(remove_duplicate=False) if found is module]
        if len(places) > 1:
            raise UnsupportedError(
                f"module {path!r} is in the model more than once, as {', '.join(map(repr, places))}; swap the plan, "
                "before the model is sharded"
            )
    made: dict[str, Any] = {}
    try:
        for path, module in modules.items():
            made[path] = _rebuilt(module, plans[path], options)
            _carry_over(module, made[path])
    except BaseException:
        for module in made.values():
            module.close()
        raise
    for path, module in made.items():
        module.train(modules[path].training)
        if path:
            parent, _, name = path.rpartition(".")
            setattr(root.get_submodule(parent), name, module)
        else:
            model.module = module
    # Not of the wrapper, whose name DDP would put before every key.
    model._optim = model._init_optim(model.module)


def _check(path: str, module: Any) -> None:
    if isinstance(module, TurboSSDShardedModule) and module._ours:
        raise UnsupportedError(f"module {path!r} has tables on SSD already; swap all of its tables in one call")
    if not isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
        raise UnsupportedError(
            f"module {path!r} is a {type(module).__name__}; only EmbeddingBagCollection and EmbeddingCollection can be "
            "swapped once they are sharded: swap the plan, before"
        )
    resident = [
        n for n, s in module.module_sharding_plan.items() if s.sharding_type == ShardingType.DATA_PARALLEL.value
    ]
    if resident:
        raise UnsupportedError(
            f"module {path!r} has data-parallel tables {', '.join(map(repr, resident))}, whose optimizer would go on "
            "with the old ones: swap the plan, before the model is sharded"
        )


def _rebuilt(module: Any, plan: _ModulePlan, options: dict[str, Any]) -> TurboSSDShardedModule:
    """The same module sharded by this package, with rows that are still to come."""
    meta, stock = torch.device("meta"), {"qcomm_codecs_registry": module.qcomm_codecs_registry}
    sharder: Any
    plain: Any
    if isinstance(module, ShardedEmbeddingBagCollection):
        plain = EmbeddingBagCollection(
            tables=_without_init(module._embedding_bag_configs), is_weighted=module._is_weighted, device=meta
        )
        sharder = TurboSSDEmbeddingBagCollectionSharder(**options, **stock)
        weights = plain.embedding_bags
    else:
        plain = EmbeddingCollection(
            tables=_without_init(module._embedding_configs),
            device=meta,
            need_indices=module._need_indices,
            use_gather_select=module._use_gather_select,
        )
        sharder = TurboSSDEmbeddingCollectionSharder(**options, use_index_dedup=module._use_index_dedup, **stock)
        weights = plain.embeddings
    for name, fused_params in _fused_params(module):
        # How TorchRec learns a table's own optimizer; the class is among the arguments already.
        weights[name].weight._optimizer_classes = [None]
        weights[name].weight._optimizer_kwargs = [dict(fused_params)]
    made: TurboSSDShardedModule = sharder.shard(plain, plan, module._env, module._device, module._module_fqn)
    return made


def _without_init(configs: Collection[Any]) -> list[Any]:
    """Rows are all carried over, so that how they were initialised plays no part."""
    return [dataclasses.replace(config, init_fn=None) for config in configs]


def _shardings(module: Any) -> list[Any]:
    if isinstance(module, ShardedEmbeddingBagCollection):
        return list(module._embedding_shardings)
    return list(module._sharding_type_to_sharding.values())


def _fused_params(module: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for sharding in _shardings(module):
        for groups in sharding._grouped_embedding_configs_per_rank:
            for group in groups:
                for table in group.embedding_tables:
                    yield table.name, group.fused_params or {}


def _carry_over(old: nn.Module, new: Any) -> None:
    """Rows, optimizer state and progress."""
    names, seed = old._table_names, new._options.kernel.seed
    there = {(t.shard.table.name, tuple(t.metadata.shard_offsets)): t for t in new._local()}
    for table in local_tables(old._lookups, seed, names):  # type: ignore[arg-type]
        target = there[table.shard.table.name, tuple(table.metadata.shard_offsets)]
        for ids in in_windows(table.shard.rows, _WINDOW_ROWS):
            target.write(ids, table.read(ids))
    progress = optimizer_progress(fused_kernels(old._lookups))  # type: ignore[arg-type]
    for kernel in fused_kernels(new._lookups):
        found = saved_progress(kernel, progress)
        if found is not None:
            restore_progress(kernel, found)


__all__ = ["SwappedTable", "swap_to_turbo_ssd"]
